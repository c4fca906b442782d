"""How far two sets of outputs are from each other, and whether that is close enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from compress.errors import Unproved
from compress.outputs import flatten_outputs, forward
from compress.report import Parity

if TYPE_CHECKING:
    import torch

__all__ = [
    "EXACT_TOLERANCE",
    "flatten_outputs",
    "forward",
    "lowest_cosine",
    "parity",
    "require_finite",
    "worst",
]

EXACT_TOLERANCE = 1e-4
"""Largest `Parity.relative` that a pass which claims to keep the function may show."""


def parity(
    reference: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], what: str = "output"
) -> Parity:
    """Compare `outputs` with `reference`, name by name.

    Raises `Unproved` where a name is missing, a shape differs, a value is not finite although the reference is, or
    there is nothing to compare. `what` names the thing that made `outputs` in the message.
    """
    if not reference:
        raise Unproved(f"The {what} cannot be compared: the reference has no float output.")
    return worst(_compare(name, value, outputs.get(name), what) for name, value in reference.items())


def worst(found: Iterable[Parity]) -> Parity:
    """The largest differences and the lowest cosine of several comparisons, of which there is at least one."""
    found = list(found)
    return Parity(
        max_abs=max(one.max_abs for one in found),
        relative=max(one.relative for one in found),
        cosine=min(one.cosine for one in found),
    )


def _compare(name: str, reference: torch.Tensor, value: torch.Tensor | None, what: str) -> Parity:
    if value is None:
        raise Unproved(f"The {what} has no output `{name}`.", "The model it is compared with has it.")
    if value.shape != reference.shape:
        raise Unproved(
            f"The {what} gives `{name}` of shape {tuple(value.shape)}, not {tuple(reference.shape)}."
        )
    return _distance(name, reference.detach().cpu().double(), value.detach().cpu().double(), what)


def _distance(name: str, reference: torch.Tensor, value: torch.Tensor, what: str) -> Parity:
    import torch

    comparable = torch.isfinite(reference)
    if not torch.isfinite(value[comparable]).all():
        bad = int((~torch.isfinite(value[comparable])).sum())
        raise Unproved(
            f"The {what} gives {bad} values that are not finite in `{name}`, of {value.numel()}.",
            "The result is unusable; leave the step out, or narrow its scope.",
        )
    reference, value = reference.where(comparable, 0.0), value.where(comparable, 0.0)
    largest = float((reference - value).abs().max()) if reference.numel() else 0.0
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    return Parity(largest, largest / max(scale, 1e-12), lowest_cosine(reference, value))


def lowest_cosine(reference: torch.Tensor, value: torch.Tensor) -> float:
    """The lowest cosine similarity over the last dimension; rows where both are zero count as equal.

    `reference` and `value` have one shape (..., features); a scalar or an empty tensor gives 1.
    """
    import torch

    if reference.dim() == 0 or reference.numel() == 0:
        return 1.0
    features = reference.shape[-1]
    rows, others = reference.reshape(-1, features), value.reshape(-1, features)
    norms = rows.norm(dim=-1) * others.norm(dim=-1)
    cosine = torch.where(
        norms > 0, (rows * others).sum(-1) / norms.clamp_min(1e-30), (rows == others).all(-1).double()
    )
    return float(cosine.min())


def require_finite(outputs: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise `Unproved` if any output is all NaN or holds a NaN. Infinities may be masks, and stay."""
    import torch

    for name, value in outputs.items():
        if torch.isnan(value).any():
            raise Unproved(
                f"The {what} gives {int(torch.isnan(value).sum())} NaN in `{name}`, of {value.numel()} values.",
                "Look for broken weights with `modelpress inspect`, or load the model in float32.",
            )
