"""The linear maps that a pass may write in another form: weights of their own, which one matrix product uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compress.report import Skip
from compress.scope import Scope

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Weight
    from compress.model import Model


def dense_linear(layer: nn.Module) -> str:
    """Why `layer` is no linear map without zeros that stay, or ""."""
    from compress.layers.linear import is_linear
    from compress.layers.sparse import is_sparse

    if not is_linear(layer):
        return f"{type(layer).__name__} is not a plain linear map"
    return "its weight is sparse, and another form would fill its zeros" if is_sparse(layer) else ""


def plain_maps(
    model: Model, scope: Scope, head: bool, refuse: Callable[[nn.Module], str] = dense_linear
) -> tuple[list[Weight], list[Skip]]:
    """The plain linear maps in `scope`, the output head among them if `head`; and why other weights there are none.

    `head` is a setting of the pass that asks, which the reason names. `refuse` says why a layer will not do, or "".
    """
    found, skips = [], sparse_codes(model, scope)
    for weight in model.graph.weights:
        if weight.path in scope:
            why = _by_role(weight, head) or refuse(model.module.get_submodule(weight.path))
            why = why or _shared(model, weight)
            skips += [Skip(weight.path, why)] if why else []
            found += [] if why else [weight]
    return found, skips


def sparse_codes(model: Model, scope: Scope) -> list[Skip]:
    """The sparse codes of `factorize_sparse` in `scope`, which have no other form. (Their dictionaries are plain.)"""
    from compress.layers.coded import Codes

    return [
        Skip(
            path,
            "sparse codes, stored as their non-zeros and a bit for each place; another form would be larger",
        )
        for path, part in model.module.named_modules()
        if isinstance(part, Codes) and path in scope
    ]


def thin_maps(model: Model, scope: Scope, head: bool, multiple: int) -> tuple[list[Weight], list[Skip]]:
    """Those of `plain_maps` that two factors of a rank of `multiple` would make smaller, and why others are none."""
    from compress.layers.linear import matrix

    weights, skips = plain_maps(model, scope, head)
    found = []
    for weight in weights:
        out, width = matrix(model.module.get_submodule(weight.path)).shape
        if multiple * (out + width) < out * width:
            found.append(weight)
        else:
            skips.append(
                Skip(weight.path, f"{out}x{width} has no rank of {multiple} or more that saves anything")
            )
    return found, skips


def _by_role(weight: Weight, head: bool) -> str:
    if weight.role == "embedding":
        return "an embedding; look-ups have no product to save"
    if weight.role == "head" and not head:
        return "the output head; set `head: true` to include it"
    return ""


def _shared(model: Model, weight: Weight) -> str:
    sharers = model.graph.sharers(f"{weight.path}.weight")
    return f"its weight is tied with {', '.join(sharers)}" if sharers else ""
