"""Whether the data that shaped a compressed model speaks for held-out data: measured, and said where it does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING

from compress.compare import forward
from compress.data import without_labels
from compress.model import Model
from compress.passes.base import Batches, Context, Pass
from compress.report import Caution
from compress.verdict import rows

if TYPE_CHECKING:
    from torch import Tensor

BATCHES = 4
"""So many batches of either data are compared."""
TIMES = 2.0
"""So many times the error is worth a word. Measured on a language model of 24 M parameters, a fifth of its linear maps
gone by `factorize` with `svd_llm`: 1.3 on text like the 32 windows of 256 tokens that it was calibrated on; with 8 of
those windows 2.2, and 0.07 more log-perplexity; with 32 of two other kinds of text 2.3 and 3.2, and 0.21 more. With
`svd`, which no data can mislead, 0.9 to 1.1 on five texts; 8-bit weights and activations gave 1.1 and 1.6."""
NEGLIGIBLE = 1e-4
"""A relative squared error that is as good as none, whatever the other: one per cent of the outputs' norm."""


def mismatches(
    original: Model, compressed: Model, passes: Sequence[Pass], context: Context
) -> tuple[Caution, ...]:
    """A caution if `compressed` is more than `TIMES` as far from `original` on the held-out data as on the data that
    the last pass with a need for data used; none where one of the two is missing.
    """
    use = next((one.needs for one in reversed(passes) if one.needs != "nothing"), None)
    shaping = {"calibration": context.calibration, "training": context.training, None: None}[use]
    if shaping is None or context.heldout is None:
        return ()
    near = relative_error(original, compressed, shaping)
    far = relative_error(original, compressed, context.heldout)
    if far <= max(TIMES * near, NEGLIGIBLE):
        return ()
    return (
        Caution(
            f"The squared error of the compressed model's outputs, relative to the original's, is {far:.2g} on the "
            f"held-out data and {near:.2g} on the {use} data, which does not speak for the other.",
            f"Give {use} data like that which the model is used for, and more of it; or correct `data.heldout` if it "
            "is the one that is not like that.",
        ),
    )


def relative_error(original: Model, compressed: Model, batches: Batches) -> float:
    """The squared error of the outputs of `compressed` over the square of those of `original`, the mean over outputs.

    Sums run over the first `BATCHES` batches; padding is left out, and so are values that are not finite.
    """
    errors: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for batch in map(without_labels, islice(batches, BATCHES)):
        expected = rows(forward(original.module, batch), batch, original.task)
        given = rows(forward(compressed.module, batch), batch, original.task)
        for name, value in expected.items():
            error, size = _squares(value, given[name])
            errors[name] += error
            sizes[name] += size
    return fmean(errors[name] / size for name, size in sizes.items() if size > 0)


def _squares(expected: Tensor, given: Tensor) -> tuple[float, float]:
    """The sums of squares of the difference and of `expected`, a few rows at a time: logits are large."""
    error = size = 0.0
    for one, other in zip(expected.split(64), given.split(64), strict=True):
        kept = one.isfinite()
        one, other = one[kept].float(), other[kept].float()
        error += float((other - one).square().sum())
        size += float(one.square().sum())
    return error, size
