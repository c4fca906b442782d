"""What is added to or masked out of attention scores: whether it hides the future, whether it tells positions apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from compress.graph.flow import compute, fits
from compress.graph.ops import ELEMENTWISE, MOVES, PRODUCTS, op
from compress.graph.record import Trace
from compress.graph.weights import Product

HIDDEN = -99.0
"""A score lowered by this much counts as masked; learned and linear biases are far smaller."""

HEAVY = PRODUCTS | frozenset(
    ["linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention"]
)


@dataclass(frozen=True)
class Bias:
    """One tensor that meets the scores: added ("add"), or true where they are shown ("show") or hidden ("hide").

    "mask" is the mask of an attention op: shown where true if it is boolean, added if it is float.
    """

    node: Node
    how: Literal["add", "mask", "show", "hide"]


def side_inputs(node: Node, products: dict[Node, Product]) -> tuple[Node | None, list[Bias]]:
    """The operand of `node` that holds the scores, and the others as biases. None if that is not plain."""
    inputs = node.all_input_nodes
    main = [read for read in inputs if leads_to_product(read, products)]
    if len(main) != 1:
        return None, []
    others = [read for read in inputs if read is not main[0]]
    if op(node) in ("add", "sub"):
        return main[0], [Bias(other, "add") for other in others]
    if op(node) == "masked_fill":
        return main[0], [Bias(node.args[1], "hide")]
    if op(node) == "where":
        return main[0], [Bias(node.args[0], "show" if node.args[1] is main[0] else "hide")]
    return main[0], []


def leads_to_product(node: Node, products: dict[Node, Product]) -> bool:
    """Whether `node` is a product of two activations, through moves and element-wise ops."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if op(node) in PRODUCTS and node not in products:
            return True
        if op(node) in MOVES | ELEMENTWISE:
            queue += node.all_input_nodes
    return False


def reads_parameters(trace: Trace, node: Node) -> bool:
    """Whether `node` is computed from any parameter."""
    return any(above in trace.parameters for above in trace.above(node))


def value_of(trace: Trace, node: Node, known: dict[Node, Any]) -> Tensor | None:
    """The value of `node` for the example, or None where it takes more than cheap ops to compute."""
    if any(op(above) in HEAVY or above in trace.overwritten for above in trace.above(node)):
        return None
    value = compute(trace, node, known)
    return value if isinstance(value, Tensor) else None


def is_relative(trace: Trace, biases: tuple[Bias, ...], known: dict[Node, Any]) -> bool:
    """Whether the scores get a learned term, or one that differs between places that are shown."""
    added = [bias.node for bias in biases if bias.how in ("add", "mask")]
    if any(reads_parameters(trace, node) for node in added):
        return True
    return any(varies(value_of(trace, node, known)) for node in added)


def varies(value: Tensor | None) -> bool:
    """Whether a float bias takes several values that hide nothing."""
    if value is None or not value.is_floating_point():
        return False
    shown = value[value > HIDDEN]
    return bool(shown.numel()) and float(shown.max() - shown.min()) > 1e-6


def is_causal(
    trace: Trace, biases: tuple[Bias, ...], places: tuple[int, int], known: dict[Node, Any]
) -> bool:
    """Whether no place is shown any place after it. `places` is the number of queries and keys."""
    if places[0] != places[1] or places[0] < 2:
        return False
    future = torch.ones(places, dtype=torch.bool).triu(1)
    hidden = torch.zeros_like(future)
    for bias in biases:
        value = value_of(trace, bias.node, known)
        if value is not None and fits(value, (*value.shape[:-2], *places)):
            hides = hidden_by(bias, value.detach().cpu()).expand(*value.shape[:-2], *places)
            hidden |= hides.reshape(-1, *places).all(0)
    return bool(hidden[future].all())


def hidden_by(bias: Bias, value: Tensor) -> Tensor:
    """Where a bias hides the scores."""
    if bias.how == "hide":
        return value.bool()
    if bias.how == "show" or not value.is_floating_point():
        return ~value.bool()
    return value <= HIDDEN
