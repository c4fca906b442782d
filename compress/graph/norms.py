"""Norms, whether one op or written out, and who reads what they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from compress.graph.flow import follow, in_order, label
from compress.graph.ops import MOVES, QUOTIENTS, SAME, op, operand, readers, shape, strip
from compress.graph.record import Trace, path_of
from compress.graph.structure import Norm
from compress.graph.weights import Product

Kind = Literal["layer", "rms", "batch", "group"]

ONE_OP: dict[str, tuple[Kind, int]] = {
    "layer_norm": ("layer", 2),
    "native_layer_norm": ("layer", 2),
    "rms_norm": ("rms", 2),
    "batch_norm": ("batch", 1),
    "group_norm": ("group", 2),
}
"""The kind of norm of each op, and the position of its weight."""


@dataclass(frozen=True)
class Normalization:
    """A norm in the trace: it reads `input`, and `output` is its last op; `axis` is the axis of the features."""

    input: Node
    output: Node
    path: str
    kind: Kind
    axis: int


def find_normalizations(trace: Trace) -> list[Normalization]:
    """All norms of the trace, in order."""
    found = []
    for node in trace.nodes:
        made = from_op(trace, node) if op(node) in ONE_OP else written_out(trace, node)
        if made is not None:
            found.append(made)
    return found


def from_op(trace: Trace, node: Node) -> Normalization:
    """A norm that is one op."""
    kind, position = ONE_OP[op(node)]
    weight = operand(node, position, "weight")
    axis = -1 if kind in ("layer", "rms") else 1
    return Normalization(node.args[0], node, owner_of(trace, [weight], node), kind, axis)


def written_out(trace: Trace, root: Node) -> Normalization | None:
    """A norm written as ops, known by its `rsqrt` or `sqrt`: x / sqrt(mean(x²) + eps), times a weight."""
    squared = mean_square(root)
    if squared is None:
        return None
    scaled = next((user for user in after(root) if scales_by(user, root, squared)), None)
    if scaled is None:
        return None
    centred = op(squared) == "sub" and is_mean(squared.args[1], squared.args[0])
    output, weights = affine_part(trace, scaled)
    read = strip(squared.args[0]) if centred else squared
    return Normalization(read, output, owner_of(trace, weights, root), "layer" if centred else "rms", -1)


def mean_square(root: Node) -> Node | None:
    """x, where `root` is sqrt(mean(x²) + eps), its inverse, or that to the power -1/2; None otherwise."""
    is_power = op(root) == "pow" and operand(root, 1, "exponent") in (0.5, -0.5)
    if op(root) not in ("rsqrt", "sqrt") and not is_power:
        return None
    inner = strip(root.args[0])
    if op(inner) in ("add", "clamp", "clamp_min") and len(inner.all_input_nodes) == 1:
        inner = strip(inner.all_input_nodes[0])
    if op(inner) != "mean" or not over_last_axis(inner):
        return None
    return square_of(strip(inner.args[0]))


def over_last_axis(mean: Node) -> bool:
    """Whether `mean` is over the last axis and keeps it."""
    axes = operand(mean, 1, "dim")
    last = len(shape(mean.args[0])) - 1
    return bool(operand(mean, 2, "keepdim")) and list(axes or ()) in ([-1], [last])


def square_of(node: Node) -> Node | None:
    """x, where `node` is x², or None."""
    if op(node) == "pow" and operand(node, 1, "exponent") == 2:
        return strip(node.args[0])
    if op(node) == "square":
        return strip(node.args[0])
    if op(node) == "mul" and len(node.args) == 2 and strip(node.args[0]) is strip(node.args[1]):
        return strip(node.args[0])
    return None


def is_mean(node: object, of: Node) -> bool:
    """Whether `node` is the mean of `of` over the last axis."""
    inner = strip(node)
    return isinstance(inner, Node) and op(inner) == "mean" and strip(inner.args[0]) is strip(of)


def after(node: Node) -> list[Node]:
    """The readers of `node`, looking through casts."""
    return [later for user in readers(node) for later in (after(user) if op(user) in SAME else [user])]


def scales_by(user: Node, root: Node, squared: Node) -> bool:
    """Whether `user` is x times `root`, or x divided by it, where `squared` is x."""
    if op(user) == "mul":
        return {strip(read) for read in user.args[:2]} == {squared, root} and op(root) != "sqrt"
    return op(user) in QUOTIENTS and strip(user.args[0]) is squared and strip(user.args[1]) is root


def affine_part(trace: Trace, scaled: Node) -> tuple[Node, list[Node]]:
    """The last op of a norm and its weights: `scaled`, or a product with a weight after it, or a sum with a bias."""
    output, weights = scaled, []
    for name in ("mul", "add"):
        users = after(output)
        if len(users) != 1 or op(users[0]) != name or len(users[0].all_input_nodes) != 2:
            continue
        sides = [read for read in users[0].all_input_nodes if strip(read) is not output]
        if len(sides) == 1 and from_weights(trace, sides[0]) and vector(sides[0]) == shape(scaled)[-1]:
            output = users[0]
            weights.append(sides[0])
    return output, weights


def vector(node: Node) -> int:
    """The length of a tensor that is a vector up to axes of size one; 0 for any other."""
    return max(shape(node), default=0) if sum(size > 1 for size in shape(node)) <= 1 else 0


def from_weights(trace: Trace, node: Node) -> bool:
    """Whether `node` is computed from parameters and constants alone, with at least one parameter."""
    leaves = [above for above in trace.above(node) if above.op == "placeholder"]
    return any(leaf in trace.parameters for leaf in leaves) and all(leaf in trace.names for leaf in leaves)


def owner_of(trace: Trace, weights: list[Node | None], node: Node) -> str:
    """Path of the module that owns the first of `weights`; of the module running at `node` where there is none."""
    for weight in weights:
        for above in trace.above(weight) if isinstance(weight, Node) else ():
            if above in trace.parameters:
                return trace.names[above].rpartition(".")[0]
    return path_of(node)


def find_norms(
    trace: Trace, normalizations: list[Normalization], products: dict[Node, Product]
) -> tuple[Norm, ...]:
    """The norms with their readers, one answer a module; one that runs twice has the readers of both runs."""
    runs: dict[str, list[Normalization]] = {}
    for made in normalizations:
        runs.setdefault(made.path, []).append(made)
    return tuple(with_readers(trace, path, made, products) for path, made in runs.items())


def with_readers(trace: Trace, path: str, made: list[Normalization], products: dict[Node, Product]) -> Norm:
    """The weighted modules that read a norm feature by feature, and nothing but it; and whether anything else does."""
    calls: set[Node] = set()
    residual = False
    for one in made:
        found, others = direct_readers(trace, one, products)
        calls |= found
        residual |= others
    owners = dict.fromkeys(products[node].owner for node in products if node in calls)
    mixed = {call.owner for node, call in products.items() if call.owner in owners and node not in calls}
    readers = tuple(owner for owner in owners if owner not in mixed)
    return Norm(path, made[0].kind, readers, residual or bool(mixed))


def direct_readers(
    trace: Trace, made: Normalization, products: dict[Node, Product]
) -> tuple[set[Node], bool]:
    """The weighted ops that read one run of a norm feature by feature, and whether anything else reads it."""
    reached = follow(trace, made.output, label(made.output, made.axis), MOVES)
    found: set[Node] = set()
    others = made.output in trace.overwritten
    for node in reached:
        for user in readers(node):
            reader = products.get(user)
            if reader is not None and reads_features(made, reader, node, reached):
                found.add(user)
            elif user not in reached:
                others = True
    return found, others


def reads_features(made: Normalization, reader: Product, node: Node, labels: dict) -> bool:
    """Whether input feature i of `reader` is feature i of the norm, everywhere."""
    if reader.input is not node or reader.kind == "embedding":
        return False
    return in_order(labels[node], reader.axis, shape(made.output)[made.axis])
