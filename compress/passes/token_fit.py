"""Whether the tokens of a stack can be reduced: its attentions are global, and every position is like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import Unsuitable
from compress.graph.structure import Attention, Stack

if TYPE_CHECKING:
    from compress.model import Model
    from compress.passes.merge_tokens import MergeTokens

LEAVE_OUT = "Leave `merge_tokens` out for this model, or choose another stack with `scope`."


def require_mergeable(model: Model, stack: Stack, settings: MergeTokens) -> None:
    """Raise `Unsuitable` with the reason if an attention of `stack` counts on places that a token left lacks."""
    mixes = settings.method == "cluster" or (settings.method == "prune" and settings.fuse)
    for block in stack.blocks:
        inside = [one for one in model.graph.attentions if f"{one.path}.".startswith(f"{block}.")]
        for one in inside:
            if why := _reason(one, mixes):
                raise Unsuitable(f"The attention `{one.path}` {why}.", LEAVE_OUT)


def _reason(attention: Attention, mixes: bool) -> str:
    """Why tokens that meet in this attention cannot be reduced, or nothing.

    `mixes`: whether some token left has no place of its own.
    """
    if attention.causal:
        return "is causal, and what comes later must not be merged into what comes before"
    if attention.cross:
        return "reads another sequence, whose places the model counts on"
    if attention.positions == "rotary":
        return "rotates queries and keys by their positions, which a merged token has several of"
    if attention.positions == "relative" and mixes:
        return "adds a term for each pair of positions, and a mean of many tokens has none"
    return ""


def routed_attentions(model: Model, stack: Stack, batch: int, count: int) -> tuple[str, ...]:
    """The modules of `stack`, which runs on `batch` sequences of `count` tokens, that call transformers' registry.

    Raises `Unsuitable` if a block has none, or attends in windows.
    """
    shapes = {path: (query[0], query[2]) for path, query in registry_calls(model).items()}
    found = []
    for block in stack.blocks:
        own = [path for path in shapes if f"{path}.".startswith(f"{block}.")]
        if not own:
            raise Unsuitable(
                f"The attention in `{block}` does not go through transformers' registry of attentions, so the sizes "
                "of merged tokens cannot reach it.",
                LEAVE_OUT,
            )
        for path in own:
            if shapes[path] != (batch, count):
                raise Unsuitable(
                    f"The attention `{path}` runs over {shapes[path][0]} windows of {shapes[path][1]} places, and the "
                    f"block over {batch} sequences of {count}: places have to stay on their grid.",
                    LEAVE_OUT,
                )
        found += own
    return tuple(found)


def registry_calls(model: Model) -> dict[str, tuple[int, ...]]:
    """The modules that call transformers' registry of attentions on the example, with the shape of their queries:
    (batch, heads, places, size)."""
    from compress.layers.attention import routed
    from compress.outputs import forward

    names = {part: path for path, part in model.module.named_modules()}
    shapes: dict[str, tuple[int, ...]] = {}
    with routed(model.module, lambda caller, query: shapes.update({names[caller]: tuple(query.shape)})):
        forward(model.module, model.example)
    return shapes
