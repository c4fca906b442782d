"""What a parsed network really multiplies: read from TensorRT's own layers, after its parser has done its
work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compress.errors import Unproved

_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION")
_RESHAPING = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")
"""Layers that move values and change none; TensorRT's broadcasts of a weight are among them."""


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution: what its two operands are, "int8" if they come straight from a
    dequantization.

    `weighted` is True where one operand is a constant, False for the product of two activations.
    """

    name: str
    left: str
    right: str
    weighted: bool

    @property
    def is_int8(self) -> bool:
        """Whether both operands are integers, so that TensorRT can take an int8 kernel."""
        return self.left == self.right == "int8"


def products(trt: Any, network: Any) -> tuple[Product, ...]:
    """Every matrix product and convolution of an `INetworkDefinition`, in its order."""
    makers = {output.name: layer for layer in layers(network) for output in _outputs(layer)}
    found = (layer for layer in layers(network) if layer.type.name in _PRODUCTS)
    return tuple(_product(trt, layer, makers) for layer in found)


def layers(network: Any) -> Iterator[Any]:
    """The layers of an `INetworkDefinition`."""
    return (network.get_layer(index) for index in range(network.num_layers))


def attentions(network: Any) -> int:
    """The number of attentions that the parser kept as one op, which TensorRT fuses where it has a kernel."""
    return sum(layer.type.name == "ATTENTION_INPUT" for layer in layers(network))


def allow_decomposition(trt: Any, network: Any) -> None:
    """Let every attention be computed in parts where TensorRT has no fused kernel for its head size and
    type.
    """
    for layer in layers(network):
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python interface casts a layer down
            layer.attention.decomposable = True


def require_int8(found: tuple[Product, ...], expected: int) -> None:
    """Raise `Unproved` unless at least `expected` products take int8 on both sides."""
    integer = [product for product in found if product.is_int8]
    if len(integer) >= expected:
        return
    rest = "" if len(found) - len(integer) <= 5 else ", ..."
    others = [f"{one.name} ({one.left} x {one.right})" for one in found if not one.is_int8]
    raise Unproved(
        f"The module has {expected} quantized products, but TensorRT sees int8 on both inputs of only "
        f"{len(integer)}, of {len(found)}. Not int8: {', '.join(others[:5])}{rest}.",
        "A step between a dequantization and its product is in the way: exclude these layers from "
        "the quantize pass with its scope, or export with precision: float16.",
    )


def _outputs(layer: Any) -> Iterator[Any]:
    return (layer.get_output(index) for index in range(layer.num_outputs))


def _product(trt: Any, layer: Any, makers: dict[str, Any]) -> Product:
    if (
        layer.num_inputs < 2
    ):  # a convolution whose kernel is not a tensor of the network, but a plain float constant
        kernel = layer.get_output(0).dtype
        return Product(layer.name, _operand(trt, layer.get_input(0), makers)[0], _dtype_name(kernel), True)
    (left, left_constant), (right, right_constant) = (
        _operand(trt, layer.get_input(at), makers) for at in (0, 1)
    )
    return Product(layer.name, left, right, left_constant or right_constant)


def _operand(trt: Any, tensor: Any, makers: dict[str, Any]) -> tuple[str, bool]:
    """What `tensor` holds ("int8", "float16", "float32", ...), and whether it is a constant."""
    maker = _past_reshaping(tensor, makers)
    if maker is None:
        return _dtype_name(tensor.dtype), False
    if maker.type.name == "DEQUANTIZE" and maker.get_input(0).dtype == trt.int8:
        source = _past_reshaping(maker.get_input(0), makers)
        return "int8", source is not None and source.type.name == "CONSTANT"
    return _dtype_name(tensor.dtype), maker.type.name == "CONSTANT"


def _past_reshaping(tensor: Any, makers: dict[str, Any]) -> Any | None:
    """The layer that computes `tensor`'s values; None for an input of the network."""
    maker = makers.get(tensor.name)
    while maker is not None and maker.type.name in _RESHAPING:
        maker = makers.get(maker.get_input(0).name)
    return maker


def _dtype_name(dtype: Any) -> str:
    return {"FLOAT": "float32", "HALF": "float16"}.get(dtype.name) or str(dtype.name).lower()
