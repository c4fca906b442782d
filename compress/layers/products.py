"""Attention products on integers: q k^T and p v, put into a model through transformers' attention registry.

transformers calls the function that the config names, so no forward is copied. The function is registered
under `IMPLEMENTATION` with the additive mask of eager attention; a module that has a child `products`
computes with it, and any other module in float. A config never saves the name of its implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.layers.quantized import Activation
from compress.numerics.affine import Affine, affine
from compress.numerics.ranges import Range
from compress.outputs import forward

IMPLEMENTATION = "modelpress_int8"


class SymmetricActivation(Activation):
    """An activation that is symmetric int8 in every scheme: the right operand of an integer product.

    ONNX Runtime's fast x86 kernel multiplies uint8 on the left by int8 on the right, and nothing else.
    """

    def grid(self) -> Affine:
        return affine(self.low, self.high, "symmetric")


class Products(nn.Module):
    """The two products of one attention, each operand mapped by a child: `query`, `key`, `value`,
    `probabilities`.

    New, the children are identities, and the inputs of `forward` can be watched to calibrate their ranges;
    `quantize` makes them activations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query: nn.Module = nn.Identity()
        self.key: nn.Module = nn.Identity()
        self.value: nn.Module = nn.Identity()
        self.probabilities: nn.Module = nn.Identity()

    def quantize(self, query: Range, key: Range, value: Range) -> None:
        """Round all operands, over the given ranges (low, high). Probabilities fill [0, 1] by nature."""
        self.query = Activation(*query)
        self.key = SymmetricActivation(*key)
        self.value = SymmetricActivation(*value)
        self.probabilities = Activation(0.0, 1.0)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, addends: list[Tensor], scaling: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """softmax(q k^T `scaling` + the sum of `addends`) v.

        `query` (batch, heads, queries, size), `key` and `value` (batch, kv heads, keys, size), `addends`
        broadcastable to (batch, heads, queries, keys). Gives the mixture (batch, queries, heads, size) and
        the probabilities (batch, heads, queries, keys). Heads that share a key are stacked along the queries,
        so that keys and values are never repeated. Each operand is rounded last, in the shape in which it is
        multiplied: a reshape or a transpose between the rounding and the product would keep runtimes from
        seeing an integer product.
        """
        batch, heads, queries, size = query.shape
        stacked = (batch, key.shape[1], heads // key.shape[1] * queries)
        scores = self.query(query.reshape(*stacked, size)) @ self.key(key.transpose(2, 3)) * scaling
        scores = sum(addends, scores.reshape(batch, heads, queries, -1))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, dropout, training=self.training)
        mixture = self.probabilities(weights.reshape(*stacked, -1)) @ self.value(value)
        return mixture.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights


def attention_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """What the registry calls: the attention of `module`, by its child `products`. Shapes as in
    `Products.forward`.

    Whoever sets this implementation compares outputs, since other keywords may stand for things it does not
    compute.
    """
    del kwargs
    products = getattr(module, "products", None) or Products()
    addends = [addend for addend in (position_bias, attention_mask) if addend is not None]
    return products(
        query, key, value, addends, query.shape[-1] ** -0.5 if scaling is None else scaling, dropout
    )


def use_products(module: nn.Module) -> None:
    """Make every attention of `module` that goes through transformers' registry call `attention_products`."""
    AttentionInterface.register(IMPLEMENTATION, attention_products)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    for model in _models(module):
        model.set_attn_implementation(IMPLEMENTATION)


def routed_attentions(module: nn.Module, example: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The paths of the modules whose attention can be sent through `attention_products`.

    Empty where the outputs for `example` would not stay the same: then an attention computes more than these
    products.
    """
    names = {layer: path for path, layer in module.named_modules()}
    expected = _outputs(module, example)
    with _routed(module), _recorded() as callers:
        found = _outputs(module, example)
    return tuple(names[caller] for caller in callers) if _agree(found, expected) else ()


@contextmanager
def watched_products(module: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Inside the block, the attentions at `paths` compute through a child `products`, in float."""
    callers = [module.get_submodule(path) for path in paths]
    for caller in callers:
        caller.products = Products()
    try:
        with _routed(module) if callers else nullcontext():
            yield
    finally:
        for caller in callers:
            del caller.products


@contextmanager
def _routed(module: nn.Module) -> Iterator[None]:
    """`use_products` inside the block, and what was set before after it."""
    before = {model: model.config._attn_implementation for model in _models(module)}
    use_products(module)
    try:
        yield
    finally:
        for model, implementation in before.items():
            model.set_attn_implementation(implementation)


def _models(module: nn.Module) -> list[PreTrainedModel]:
    return [model for model in module.modules() if isinstance(model, PreTrainedModel)]


@contextmanager
def _recorded() -> Iterator[dict[nn.Module, None]]:
    """The modules that call the registry's function inside the block, in the order of their first call."""
    callers: dict[nn.Module, None] = {}

    def record(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        callers[module] = None
        return attention_products(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = record  # hides the registered function until it is deleted
    try:
        yield callers
    finally:
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]


def _outputs(module: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    return [value.float() for value in forward(module, example).values()]


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in pairs)
