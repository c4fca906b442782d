"""Runs the calibration batches through a model and shows the inputs of chosen modules to those who ask.

Padding is left out: where a batch has `input_ids` and an `attention_mask` for them (with or without a prefix
such as `decoder_`), and the tensor that is watched runs over the same batch and sequence, only the positions
that the mask keeps are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import DataError, ModelpressError, Unproved
from compress.passes.base import Context
from compress.progress import track

if TYPE_CHECKING:
    from torch import Tensor, nn


class Enough(Exception):
    """Ends a run of a model whose rest is not wanted."""


@dataclass(frozen=True)
class Watch:
    """A watched module: `see(index, values)` is called with each positional tensor that it is given. It may raise
    `Enough`, and the batch goes no further.

    `sequence` is the dimension of its inputs that runs over the sequence, if any does. With padding left out,
    values come as (positions, ...); otherwise in their own shape.
    """

    see: Callable[[int, Tensor], None]
    sequence: int | None = 1


def watch(module: nn.Module, context: Context, watches: Mapping[str, Watch], what: str) -> None:
    """Run every calibration batch through `module`, which must be in evaluation mode; keys are module paths.

    Raises `DataError` if there is no batch or the model cannot take one, `Unproved` if a watched input is not
    finite.
    """
    import torch

    with torch.no_grad():
        for number, batch in numbered(context, what):
            with ExitStack() as hooks:
                for path, one in watches.items():
                    hooks.enter_context(_hooked(module.get_submodule(path), path, one, batch, number))
                with suppress(Enough):
                    run_batch(module, batch, number)


def numbered(context: Context, what: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The calibration batches with their numbers from 1, shown as progress on `what`.

    Raises `DataError` if there is none.
    """
    number = 0
    for number, batch in enumerate(track(context.observer, what, required(context, what)), start=1):
        yield number, dict(batch)
    if not number:
        raise DataError(
            f"{what}: the calibration data gives no batches.",
            "Check that the file of `data: {calibration: ...}` is not empty and `samples` is at least 1.",
        )


def required(context: Context, what: str) -> Any:
    """The calibration batches. Raises `DataError` if the recipe names no data for them."""
    if context.calibration is None:
        raise DataError(
            f"{what} needs calibration data, and there is none.",
            "Name a file: `data: {calibration: {text: FILE}}` in the recipe, or `--calibration FILE`.",
        )
    return context.calibration


def run_batch(module: nn.Module, batch: Mapping[str, Tensor], number: int) -> Any:
    """What `module` returns for `batch`. Raises `DataError` if it cannot take it."""
    try:
        return module(**batch)
    except ModelpressError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError) as cause:
        shapes = ", ".join(
            f"{name} {tuple(value.shape)}" for name, value in batch.items() if hasattr(value, "shape")
        )
        raise DataError(
            f"The model cannot take calibration batch {number} ({shapes}): {type(cause).__name__}: {cause}",
            "The batches must be keyword arguments of the model's forward, in shapes that it takes.",
        ) from cause


@contextmanager
def _hooked(
    layer: nn.Module, path: str, one: Watch, batch: Mapping[str, Tensor], number: int
) -> Iterator[None]:
    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, value in enumerate(_floats((*args, *kwargs.values()))):
            kept = unpadded(value, batch, one.sequence)
            if kept.numel():
                _require_finite(kept, path, number)
                one.see(index, kept)

    handle = layer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _floats(values: Iterable[Any]) -> list[Tensor]:
    import torch

    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _require_finite(values: Tensor, path: str, number: int) -> None:
    low, high = values.aminmax()  # one pass over the values, and NaN comes through
    if not (low.isfinite() and high.isfinite()):
        raise Unproved(
            f"The input of `{path}` holds values that are not finite in calibration batch {number}.",
            "Check the model's weights and that batch; a model in float16 may overflow, load it in float32.",
        )


def unpadded(values: Tensor, batch: Mapping[str, Tensor], sequence: int | None) -> Tensor:
    """`values` (batch, ..., sequence, ...) without padding: (positions, ...); all of them if nothing says
    what is padding.

    The last dimension holds features, whatever its size: a pooled (batch, features) tensor has no sequence.
    """
    if sequence is None or values.dim() <= sequence + 1:
        return values
    values = values.movedim(sequence, 1)
    mask = tokens_of(batch, values.shape[:2])
    return values if mask is None else values[mask]


def tokens_of(batch: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """Where there are tokens in a tensor over (batch, sequence) of `shape`, as booleans; None if nothing says so.

    A position counts if any of the batch's sequences of that length has a token there.
    """
    import torch

    masks = [
        batch.get(name.replace("input_ids", "attention_mask"), torch.ones_like(ids))
        for name, ids in batch.items()
        if name.endswith("input_ids") and ids.shape == shape
    ]
    if not masks or any(mask.shape != shape for mask in masks):
        return None
    return torch.stack([mask.bool() for mask in masks]).any(0)
