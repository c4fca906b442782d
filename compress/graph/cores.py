"""The core of an attention: the product of queries and keys, the softmax, and the mixture of the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch.fx import Node

from compress.graph.masks import Bias, side_inputs
from compress.graph.ops import ELEMENTWISE, MOVES, PRODUCTS, SAME, op, operand, readers, shape
from compress.graph.record import Trace
from compress.graph.weights import Product


@dataclass(frozen=True)
class Operand:
    """One operand of an attention: its node, and its axes of places and of the features of a head."""

    node: Node
    places: int
    features: int

    @property
    def count(self) -> int:
        """Number of places."""
        return shape(self.node)[self.places]

    @property
    def size(self) -> int:
        """Number of features of a head."""
        return shape(self.node)[self.features]

    @property
    def lead(self) -> int:
        """Number of places in the other axes: batch and heads."""
        return prod(shape(self.node)) // (self.count * self.size)


@dataclass(frozen=True)
class Core:
    """What one attention multiplies, what meets its scores, and the node that holds the mixture of the values.

    `scores` is the product of queries and keys, None where it is no op of its own.
    """

    query: Operand
    key: Operand
    value: Operand
    mixture: Node
    biases: tuple[Bias, ...]
    is_causal: bool
    scores: Node | None = None


@dataclass(frozen=True)
class Factor:
    """One operand of a matrix product: its axis that the result keeps, and its axis that is summed over."""

    node: Node
    kept: int
    summed: int


def find_cores(trace: Trace, products: dict[Node, Product]) -> Iterator[Core]:
    """The core of every attention: one op, or two products around a softmax."""
    for node in trace.nodes:
        if op(node) == "scaled_dot_product_attention":
            yield from_op(node)
        elif op(node) in ("softmax", "_softmax"):
            found = from_softmax(trace, node, products)
            if found is not None:
                yield found


def from_op(node: Node) -> Core:
    """The core that is one op."""
    query, key, value = (Operand(read, -2, -1) for read in node.args[:3])
    mask = operand(node, 3, "attn_mask")
    biases = (Bias(mask, "mask"),) if isinstance(mask, Node) else ()
    return Core(query, key, value, node, biases, bool(operand(node, 5, "is_causal")))


def from_softmax(trace: Trace, softmax: Node, products: dict[Node, Product]) -> Core | None:
    """The core around a softmax over keys; None where it is not the softmax of an attention."""
    if operand(softmax, 1, "dim") not in (-1, len(shape(softmax)) - 1):
        return None
    scores, biases = above(softmax, products)
    mixture = below(softmax, products)
    left = factors(scores) if scores is not None else None
    right = factors(mixture) if mixture is not None else None
    if left is None or right is None or mixture is None or not trace.depends(right[0].node, softmax):
        return None
    return Core(
        query=Operand(left[0].node, left[0].kept, left[0].summed),
        key=Operand(left[1].node, left[1].kept, left[1].summed),
        value=Operand(right[1].node, right[1].summed, right[1].kept),
        mixture=mixture,
        biases=tuple(biases),
        is_causal=False,
        scores=scores,
    )


def above(softmax: Node, products: dict[Node, Product]) -> tuple[Node | None, list[Bias]]:
    """The product whose result reaches the softmax through scales, masks and sums, and what came in on the way."""
    biases: list[Bias] = []
    node = operand(softmax, 0, "self")
    while isinstance(node, Node) and op(node) in MOVES | ELEMENTWISE:
        node, sides = side_inputs(node, products)
        biases += sides
    if not isinstance(node, Node) or op(node) not in PRODUCTS or node in products:
        return None, biases
    if op(node) == "baddbmm":
        biases.append(Bias(operand(node, 0, "self"), "add"))
    return node, biases


def below(softmax: Node, products: dict[Node, Product]) -> Node | None:
    """The product that the probabilities go into, and nothing else; None where they go elsewhere."""
    node = softmax
    while True:
        users = [user for user in readers(node) if op(user) != "output"]
        if len(users) != 1:
            return None
        node = users[0]
        if op(node) in PRODUCTS and node not in products:
            return node
        if op(node) not in SAME | {"view", "reshape", "expand", "masked_fill", "mul", "nan_to_num", "where"}:
            return None


def factors(node: Node) -> tuple[Factor, Factor] | None:
    """Both operands of a product whose result has the kept axes of the first and of the second last."""
    if op(node) == "einsum":
        return einsum_factors(node)
    start = 1 if op(node) == "baddbmm" else 0
    first, second = (operand(node, place, "") for place in (start, start + 1))
    return Factor(first, kept=-2, summed=-1), Factor(second, kept=-1, summed=-2)


def einsum_factors(node: Node) -> tuple[Factor, Factor] | None:
    """Both operands of an einsum that is a batched matrix product of its two tensors, in this order."""
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or "." in inputs:
        return None
    batch = [letter for letter in terms[0] if letter in terms[1] and letter in output]
    summed = [letter for letter in terms[0] if letter in terms[1] and letter not in output]
    kept = [[letter for letter in term if letter in output and letter not in batch] for term in terms]
    if len(summed) != 1 or [len(letters) for letters in kept] != [1, 1]:
        return None
    if list(output) != [*batch, *kept[0], *kept[1]]:
        return None
    first, second = (
        Factor(tensor, kept=term.index(letters[0]), summed=term.index(summed[0]))
        for tensor, term, letters in zip(node.args[1], terms, kept, strict=True)
    )
    return first, second
