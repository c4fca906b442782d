"""MiniLM's question to a student: how the tokens of a batch are related in the last attention, for any widths."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import Unsuitable
from compress.graph.structure import Attention, Projection
from compress.model import Inputs, Model
from compress.numerics.relations import Heads, attention_relation_loss, heads_of, self_relation_loss
from compress.passes.calibration import tokens_of
from compress.training import Loss


def relations_loss(model: Model, teacher: Model, count: int | None) -> Loss:
    """MiniLM's loss of the last attention over its own sequence; with `count`, MiniLMv2's with so many heads.

    Queries and keys are what the projections give: before rotary positions and norms of heads.
    """
    wanted, given = last_attention(teacher, "teacher"), last_attention(model, "student")
    if count is None and wanted.heads != given.heads:
        raise Unsuitable(
            f"The teacher's last attention has {wanted.heads} heads and the student's {given.heads}.",
            "Set `relation_heads`, which relates models with different heads.",
        )
    for who, one in (("teacher", wanted), ("student", given)):
        if count is not None and one.heads * one.head_size % count:
            raise Unsuitable(
                f"The {who}'s {one.heads * one.head_size} features cannot be cut into {count} relation heads.",
                "Set `relation_heads` to a number that divides both widths.",
            )

    def loss(module: nn.Module, batch: Inputs) -> Tensor:
        with torch.no_grad():
            target = listen(teacher.module, wanted, batch)
        heads = listen(module, given, batch)
        tokens = tokens_of(batch, (heads.query.shape[0], heads.query.shape[2]))
        if count is None:
            return attention_relation_loss(target, heads, tokens, given.causal)
        return self_relation_loss(target, heads, count, tokens, given.causal)

    return loss


def last_attention(model: Model, who: str) -> Attention:
    """The last attention of `model` whose queries, keys and values are linear maps of one sequence."""
    found = [one for one in model.graph.attentions if one.query and one.key and one.value and not one.cross]
    if not found:
        raise Unsuitable(
            f"`loss: minilm` finds no attention in the {who} whose queries, keys and values are linear maps.",
            "Use `loss: hidden` or `logits`.",
        )
    return found[-1]


def listen(module: nn.Module, attention: Attention, batch: Inputs) -> Heads:
    """The queries, keys and values that `attention` makes of `batch`; keys and values repeated for shared heads."""
    sides = (attention.query, attention.key, attention.value)
    heard: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path in {side.path for side in sides if side is not None}:
            hooks.callback(module.get_submodule(path).register_forward_hook(_ear(heard, path)).remove)
        module(**batch)
    query, key, value = (_rows(heard[side.path], side) for side in sides if side is not None)
    shared = attention.heads // attention.kv_heads
    return Heads(
        heads_of(query, attention.heads),
        heads_of(key, attention.kv_heads, shared),
        heads_of(value, attention.kv_heads, shared),
    )


def _ear(heard: dict[str, Tensor], path: str) -> Callable[..., None]:
    def hear(_: nn.Module, __: Any, output: Tensor) -> None:
        heard[path] = output

    return hear


def _rows(output: Tensor, side: Projection) -> Tensor:
    """The features of `side` among those of its module, (batch, tokens, features), head after head."""
    if output.dim() != 3:
        raise Unsuitable(
            f"`loss: minilm` reads (batch, tokens, features), and `{side.path}` gives {tuple(output.shape)}.",
            "Use `loss: hidden` or `logits`.",
        )
    return torch.cat([output[..., start:stop] for start, stop in side.rows], -1)
