"""Attentions that passes can take over: those that go through transformers' registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.report import Skip

if TYPE_CHECKING:
    from compress.model import Model
    from compress.scope import Scope


def routed_in(model: Model, scope: Scope) -> tuple[list[str], list[Skip]]:
    """The modules in `scope` whose attention can be computed by products, and the attentions there that cannot be."""
    from compress.layers.products import routed_attentions

    routed = routed_attentions(model.module, model.example)
    why = "its attention does not go through transformers' registry, or computes more than softmax(q k^T) v"
    skips = [
        Skip(one.path, why)
        for one in model.graph.attentions
        if one.path in scope and not any(f"{path}.".startswith(f"{one.path}.") for path in routed)
    ]
    return [path for path in routed if path in scope], skips
