"""Multiply-accumulates of every op of a trace, and of every module."""

from __future__ import annotations

from math import prod

from torch.fx import Node

from compress.graph.ops import CONVOLUTIONS, op, shape
from compress.graph.record import Trace, modules_of
from compress.graph.weights import Product


def count_macs(trace: Trace) -> dict[Node, int]:
    """Multiply-accumulates of each op that has any, for the example inputs. Element-wise work is not counted, nor are
    products that make a weight, which a runtime computes once."""
    counted = {
        node: macs(node)
        for node in trace.nodes
        if node.op == "call_function" and not trace.makes_weight(node)
    }
    return {node: number for node, number in counted.items() if number}


def macs(node: Node) -> int:
    """Multiply-accumulates of one op."""
    name = op(node)
    if name == "linear":
        return prod(shape(node)) * shape(node.args[1])[1]
    if name in CONVOLUTIONS:
        return prod(shape(node)) * prod(shape(node.args[1])[1:])
    if name.startswith("conv_transpose"):
        return prod(shape(node.args[0])) * prod(shape(node.args[1])[1:])
    if name in ("matmul", "mm", "bmm"):
        return prod(shape(node)) * shape(node.args[0])[-1]
    if name in ("addmm", "baddbmm"):
        return prod(shape(node)) * shape(node.args[1])[-1]
    if name == "einsum":
        return einsum_macs(node)
    if name == "scaled_dot_product_attention":
        return attention_macs(node)
    return 0


def einsum_macs(node: Node) -> int:
    """Sizes of all indices of an einsum of two tensors, multiplied."""
    equation, tensors = node.args[0], node.args[1]
    letters = "".join(str(equation).replace(" ", "").split("->")[0].split(","))
    sizes = [size for tensor in tensors for size in shape(tensor)]
    return prod(dict(zip(letters, sizes, strict=False)).values()) if len(letters) == len(sizes) else 0


def attention_macs(node: Node) -> int:
    """Queries by keys, and mixture by values, of one attention op; masked places are counted."""
    query, key, value = (shape(read) for read in node.args[:3])
    return prod(query) * key[-2] + prod(query[:-1]) * key[-2] * value[-1]


def sum_macs(trace: Trace, macs: dict[Node, int], products: dict[Node, Product]) -> dict[str, int]:
    """Multiply-accumulates of every module path, children included."""
    total = {path: 0 for path, _ in trace.module.named_modules(remove_duplicate=False)}
    for node, number in macs.items():
        for path in places(node, products):
            total[path] = total.get(path, 0) + number
    return total


def places(node: Node, products: dict[Node, Product]) -> set[str]:
    """The modules that an op counts for: those running, the owner of its weight, and all those around them.

    A list of modules never runs itself, but holds those that do.
    """
    inner = [*modules_of(node), *([products[node].owner] if node in products else [])]
    parts = [path.split(".") for path in inner if path]
    return {"", *(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))}
