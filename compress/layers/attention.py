"""The attention that modelpress registers with transformers: fused, but for what a module's children change.

transformers calls the function that the config names, so no forward is copied. A module with a child `products`
computes its two products through it (see `compress.layers.products`); one with a `token_flow` adds the sizes of merged
tokens (see `compress.layers.tokens`); one with a `linear_attention` has no softmax (see
`compress.layers.linear_attention`). Any other module gets the fused attention of torch. A config never saves the name
of its implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.errors import Unsuitable

IMPLEMENTATION = "modelpress"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of `module`, as transformers' registry calls it.

    `query` (batch, heads, queries, size), `key` and `value` (batch, kv heads, keys, size), the mask additive and
    broadcastable to (batch, heads, queries, keys). Gives the mixture (batch, queries, heads, size).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    linear = getattr(module, "linear_attention", None)
    if linear is not None:
        _require_no_mask(attention_mask, kwargs)

        def softmax() -> Tensor:
            return sdpa_attention_forward(
                module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs
            )[0]

        return linear(query, key, value, softmax), None
    flow = getattr(module, "token_flow", None)
    if flow is not None:
        attention_mask = flow.attend(query, key, value, _added(attention_mask, kwargs), scaling)
    products = getattr(module, "products", None)
    if products is not None:
        addends = [one for one in (kwargs.get("position_bias"), attention_mask) if one is not None]
        return products(query, key, value, addends, scaling, dropout)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _added(mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The additive `mask` with the position bias among `kwargs`, which is taken out of them."""
    bias = kwargs.pop("position_bias", None)
    return mask if bias is None else bias if mask is None else bias + mask


def _require_no_mask(mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise `Unsuitable` if anything is added to the scores: a linear attention has none.

    In an export transformers makes a mask of zeros where a run has none, so that a mask says nothing there.
    """
    if torch.compiler.is_exporting():
        return
    if mask is not None or kwargs.get("position_bias") is not None:
        raise Unsuitable(
            "The model adds a mask or a bias to the scores of its attention, and a linear attention has no scores.",
            "Leave `simplify_attention` out for this model, or give inputs without a mask.",
        )


def use_attention(module: nn.Module) -> None:
    """Make every attention of `module` that goes through transformers' registry call `attention`."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    for model in models_of(module):
        model.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def routed(module: nn.Module, seen: Callable[[nn.Module, Tensor], None] | None = None) -> Iterator[None]:
    """`use_attention` inside the block, and what was set before after it.

    `seen` is called first with each module that calls the registry, and the queries that it gives.
    """
    before = {model: model.config._attn_implementation for model in models_of(module)}
    use_attention(module)

    def watched(caller: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if seen is not None:
            seen(caller, query)
        return attention(caller, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = watched  # hides the registered function until it is deleted
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        for model, implementation in before.items():
            model.set_attn_implementation(implementation)


def models_of(module: nn.Module) -> list[PreTrainedModel]:
    """The transformers models inside `module`, itself included: each has an implementation of its own."""
    return [model for model in module.modules() if isinstance(model, PreTrainedModel)]
