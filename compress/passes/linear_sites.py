"""Which attentions of a stack can become linear: those of all patches of a picture with each other, with no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import Unsuitable
from compress.graph.structure import Attention, Stack
from compress.report import Skip

if TYPE_CHECKING:
    from compress.layers.linear_attention import Grid
    from compress.model import Model

WHAT = "`simplify_attention`"
LEAVE_OUT = "Leave `simplify_attention` out for this model, or choose another stack with `scope`."


@dataclass(frozen=True)
class Site:
    """An attention that can become linear: the module at `path` calls the registry; sizes are those of a head."""

    path: str
    heads: int
    size: int
    value_size: int


def find_sites(model: Model, stack: Stack, layers: Sequence[int] | None) -> tuple[list[Site], list[Skip]]:
    """The attentions in the blocks number `layers` of `stack`, all if None, and those among them that must stay."""
    from compress.passes.token_fit import registry_calls

    calls = registry_calls(model)
    batch, count = _tokens(model, stack)
    sites, skips = [], []
    for block in _chosen(stack, layers):
        for one in model.graph.attentions:
            if not f"{one.path}.".startswith(f"{block}."):
                continue
            callers = [path for path in calls if f"{path}.".startswith(f"{one.path}.")]
            why = _reason(one) or _reason_by_calls([calls[path] for path in callers], batch, count)
            if why or one.value is None:
                skips.append(Skip(one.path, why or "its values are not made by one linear map"))
            else:
                value_size = one.value.features // one.kv_heads
                sites.append(Site(callers[0], one.heads, one.head_size, value_size))
    return sites, skips


def find_grid(model: Model, stack: Stack) -> Grid:
    """How the tokens of `stack` lie. Raises `Unsuitable` if they are no patches of a picture."""
    from compress.layers.linear_attention import Grid
    from compress.passes.blocks import run_stack
    from compress.passes.token_grid import grid_of
    from compress.passes.token_views import unchanging

    run = run_stack(model.module, stack.blocks, model.example, 1)
    special = unchanging(model.module, stack.blocks, model.example, run)
    rows, columns = grid_of(model, run.last.shape[1] - special, WHAT, LEAVE_OUT)
    return Grid(rows, columns, special)


def _tokens(model: Model, stack: Stack) -> tuple[int, int]:
    """Batch and number of tokens that the blocks of `stack` run on."""
    from compress.passes.blocks import run_stack

    last = run_stack(model.module, stack.blocks, model.example, 1).last
    if last.dim() != 3:
        raise Unsuitable(
            f"The blocks of `{stack.path}` run on states of shape {tuple(last.shape)}, and not on one row of tokens.",
            LEAVE_OUT,
        )
    return last.shape[0], last.shape[1]


def _chosen(stack: Stack, layers: Sequence[int] | None) -> Sequence[str]:
    if layers is None:
        return stack.blocks
    if wrong := [number for number in layers if number >= len(stack.blocks)]:
        raise Unsuitable(
            f"`layers: {list(layers)}` names block {wrong[0]}, and `{stack.path}` has blocks 0 to "
            f"{len(stack.blocks) - 1}.",
            "Name blocks by number, from 0 on.",
        )
    return [block for number, block in enumerate(stack.blocks) if number in layers]


def _reason(attention: Attention) -> str:
    """Why this attention must keep its softmax, by what the graph says of it, or ""."""
    if attention.causal:
        return "it is causal, and a linear attention would have to go token by token"
    if attention.cross:
        return "its keys come from another sequence, which lies on another grid or none"
    if attention.positions == "rotary":
        return (
            "queries and keys are rotated by their positions, and ReLU would cut off what that makes negative"
        )
    if attention.positions == "relative":
        return "a term is added to each score, and a linear attention has no scores"
    if attention.kv_heads != attention.heads:
        return f"{attention.heads} heads share {attention.kv_heads} of keys and values"
    return ""


def _reason_by_calls(queries: Sequence[tuple[int, ...]], batch: int, count: int) -> str:
    """Why an attention must keep its softmax, by the shapes of the queries that it gives to the registry, or ""."""
    if len(queries) != 1:
        return "it does not go through transformers' registry of attentions"
    windows, _, places, _ = queries[0]
    if (windows, places) != (batch, count):
        return f"it runs over {windows} windows of {places} places, and not over {batch} pictures of {count}"
    return ""
