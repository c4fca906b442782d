"""Attention products on integers: q k^T and p v, put into a model as a child of its attention.

The attention that modelpress registers with transformers computes through it: see `compress.layers.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from compress.layers.attention import Maps, multiplied, routed
from compress.layers.clip import SoftmaxClip
from compress.layers.linear_attention import is_linear_attention
from compress.layers.quantized import Activation
from compress.numerics.affine import Affine, affine
from compress.numerics.ranges import Range
from compress.outputs import forward


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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        addends: list[Tensor],
        scaling: float,
        dropout: float,
        clip: SoftmaxClip | None = None,
    ) -> tuple[Tensor, Tensor]:
        """softmax(q k^T `scaling` + the sum of `addends`) v: see `multiplied`, whose operands the children map."""

        def weigh(weights: Tensor) -> Tensor:
            weights = weights if clip is None else clip(weights, addends)
            return nn.functional.dropout(weights, dropout, training=self.training)

        maps = Maps(self.query, self.key, self.value, self.probabilities)
        return multiplied(query, key, value, addends, scaling, weigh, maps)


def routed_attentions(module: nn.Module, example: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The paths of the modules whose attention can be computed by `Products`.

    Empty where the outputs for `example` would not stay the same: then an attention computes more than these
    products.
    """
    names = {layer: path for path, layer in module.named_modules()}
    expected = _outputs(module, example)
    callers: dict[nn.Module, None] = {}

    def compute_by_products(caller: nn.Module, _: Tensor) -> None:
        if is_linear_attention(caller):
            return
        callers[caller] = None
        caller.products = Products()

    try:
        with routed(module, compute_by_products):
            found = _outputs(module, example)
    finally:
        for caller in callers:
            del caller.products
    return tuple(names[caller] for caller in callers) if _agree(found, expected) else ()


@contextmanager
def watched_products(module: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Inside the block, the attentions at `paths` compute through a child `products`, in float."""
    callers = [module.get_submodule(path) for path in paths]
    for caller in callers:
        caller.products = Products()
    try:
        with routed(module) if callers else nullcontext():
            yield
    finally:
        for caller in callers:
            del caller.products


def _outputs(module: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    return [value.float() for value in forward(module, example).values()]


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in pairs)
