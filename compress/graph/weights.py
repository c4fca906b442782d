"""Linear maps, convolutions and look-ups: which module's weight an op uses, over which features, at what cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from compress.graph.flow import along, label, step
from compress.graph.ops import CONVOLUTIONS, MOVES, SAME, op, operand, readers, shape, source, strip
from compress.graph.record import Trace, modules_of, path_of
from compress.graph.structure import Projection, Runs, Weight


@dataclass(frozen=True)
class Product:
    """One op that multiplies activations by a weight of the model.

    `rows` numbers the features of the output in the whole weight: 0, 1, ... unless a part of the weight is used.
    `axis` is the feature axis of the output and of the input.
    """

    node: Node
    input: Node
    owner: str
    parameter: str
    kind: Literal["linear", "conv", "embedding"]
    rows: Tensor
    inputs: int
    axis: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    stride: tuple[int, ...] = ()
    whole: bool = True

    @property
    def outputs(self) -> int:
        """Number of output features of this op."""
        return len(self.rows)

    @property
    def pointwise(self) -> bool:
        """Whether each place is mapped alone, by the same matrix."""
        alone = self.groups == 1 and all(size == 1 for size in (*self.kernel, *self.stride))
        return self.kind == "linear" or (self.kind == "conv" and alone)

    @property
    def depthwise(self) -> bool:
        """Whether each feature is mapped alone."""
        return self.kind == "conv" and self.groups == self.inputs == self.outputs > 1


def find_products(trace: Trace) -> dict[Node, Product]:
    """Every op of the trace that multiplies activations by one weight of the model, in order."""
    found = {node: product(trace, node) for node in trace.nodes}
    return {node: made for node, made in found.items() if made is not None}


def product(trace: Trace, node: Node) -> Product | None:
    """`node` as a product with a weight, or None."""
    name = op(node)
    if name in ("linear", *CONVOLUTIONS):
        return weighted(trace, node, node.args[0], node.args[1], out=0)
    if name == "addmm":
        return weighted(trace, node, node.args[1], node.args[2], out=1)
    if name in ("mm", "matmul"):
        return weighted(trace, node, node.args[0], node.args[1], out=1)
    if name == "embedding":
        return weighted(trace, node, node.args[1], node.args[0], out=1)
    return None


def weighted(trace: Trace, node: Node, data: Node, weight: Node, out: int) -> Product | None:
    """The product of `data` and `weight`, whose axis `out` makes the output features; None if it is no weight."""
    root = weight
    while op(root) in MOVES and root.args and isinstance(root.args[0], Node):
        root = root.args[0]
    if root not in trace.names or len(shape(weight)) < 2 or source(data) in trace.names:
        return None
    if trace.makes_weight(node):
        return None
    rows, whole = rows_of(weight, root, out)
    if rows is None:
        return None
    parameter = name_here(trace, trace.names[root], node)
    is_conv = op(node) in CONVOLUTIONS
    kind = "conv" if is_conv else "embedding" if op(node) == "embedding" else "linear"
    groups = shape(data)[1] // shape(weight)[1] if is_conv else 1
    return Product(
        node=node,
        input=data,
        owner=parameter.rpartition(".")[0],
        parameter=parameter,
        kind=kind,
        rows=rows,
        inputs=shape(data)[1] if is_conv else shape(weight)[1 - out],
        axis=1 if is_conv else -1,
        kernel=shape(weight)[2:],
        groups=groups,
        stride=tuple(operand(node, 3, "stride") or ()) if is_conv else (),
        whole=whole,
    )


def rows_of(weight: Node, root: Node, out: int) -> tuple[Tensor | None, bool]:
    """Which features of the whole weight `root` the axis `out` of `weight` holds, and whether it is all of them."""
    size = shape(weight)[out]
    if strip(weight) is root:
        return torch.arange(size), True
    chain = [weight]
    while chain[-1] is not root:
        chain.append(chain[-1].args[0])
    for axis in range(2):
        known = {root: label(root, axis)}
        for node in reversed(chain[:-1]):
            known[node] = step(node, known)
        rows = along(known[weight], out)
        if rows is not None:
            return rows, shape(root) in (shape(weight), shape(weight)[::-1])
    return None, False


def name_here(trace: Trace, name: str, node: Node) -> str:
    """Of all names of a tied parameter, the one whose module is running at `node`; `name` where none is."""
    running = modules_of(node)
    names = trace.aliases.get(name, (name,))
    here = [other for other in names if other.rpartition(".")[0] in running]
    return max(here, key=len) if here and name not in here else name


def runs(rows: Tensor | list[int]) -> Runs:
    """Row numbers in order, as half-open runs."""
    found: list[list[int]] = []
    for row in (int(row) for row in rows):
        if found and found[-1][1] == row:
            found[-1][1] += 1
        else:
            found.append([row, row + 1])
    return tuple((start, stop) for start, stop in found)


def projection(product: Product, rows: Tensor | list[int] | None = None) -> Projection:
    """`product` as an answer: all its features, or `rows` of the whole weight."""
    return Projection(product.owner, runs(product.rows if rows is None else rows))


def ambiguous(products: dict[Node, Product]) -> set[str]:
    """Modules that own several weights, so that their path alone names none of them."""
    parameters: dict[str, set[str]] = {}
    for made in products.values():
        parameters.setdefault(made.owner, set()).add(made.parameter)
    return {owner for owner, names in parameters.items() if len(names) > 1}


def find_weights(trace: Trace, products: dict[Node, Product], macs: dict[Node, int]) -> tuple[Weight, ...]:
    """The look-ups, and the modules that are one weighted op and nothing else, so that another can stand in."""
    calls: dict[str, list[Product]] = {}
    for made in products.values():
        calls.setdefault(made.owner, []).append(made)
    names = tensor_names(trace)
    busy = modules_that_do_more(trace, products)
    return tuple(
        Weight(
            path=owner,
            kind=made[0].kind,
            role=role(trace, made[0]),
            reads="|".join(sorted({names[read_by(trace, call)] for call in made})),
            macs=sum(macs.get(call.node, 0) for call in made),
        )
        for owner, made in calls.items()
        if not holds_others(owner, calls) and (made[0].kind == "embedding" or replaceable(made, busy))
    )


def read_by(trace: Trace, call: Product) -> Node:
    """The node whose values `call` reads; itself where others write into them, so that it shares with none."""
    found = source(call.input)
    return call.node if found in trace.overwritten else found


def holds_others(path: str, owners: Collection[str]) -> bool:
    """Whether a module with a weight lies inside the module at `path`."""
    return any(owner != path and (not path or owner.startswith(path + ".")) for owner in owners)


def replaceable(calls: list[Product], busy: set[str]) -> bool:
    """Whether the module that owns the weight does nothing but these calls."""
    return all(call.whole and call.owner not in busy and runs_inside(call) for call in calls)


def runs_inside(call: Product) -> bool:
    """Whether the op runs in the forward of the module that owns its weight, and not in that of a module around it."""
    running = modules_of(call.node)
    return not running or running[-1] == call.owner


def modules_that_do_more(trace: Trace, products: dict[Node, Product]) -> set[str]:
    """Modules whose own forward has ops on activations other than one weighted op with its bias."""
    found = ambiguous(products)
    for node in trace.nodes:
        if node in products or node.op != "call_function" or op(node) in MOVES or not modules_of(node):
            continue
        if not adds_bias(trace, node, products):
            found.add(path_of(node))
    return found


def adds_bias(trace: Trace, node: Node, products: dict[Node, Product]) -> bool:
    """Whether `node` adds a parameter of the module that runs to the output of its weighted op."""
    reads = [source(read) for read in node.all_input_nodes]
    return (
        op(node) == "add"
        and any(read in products for read in reads)
        and any(read in trace.parameters for read in reads)
    )


def role(trace: Trace, made: Product) -> Literal["body", "head", "embedding"]:
    """What the product is for: see `Weight`."""
    if made.kind == "embedding":
        return "embedding"
    return "head" if only_output(trace, made.node) else "body"


CHEAP = MOVES | frozenset(["add", "sub", "mul", "div", "neg"])


def only_output(trace: Trace, node: Node) -> bool:
    """Whether the values of `node` go nowhere but, through cheap ops, into the model's output.

    A sum with a tensor that `node` was computed from is a residual stream, and none of these ops.
    """
    users = readers(node)
    return bool(users) and all(
        op(user) == "output"
        or (
            (op(user) in CHEAP or soft_cap(user))
            and not any(trace.depends(node, other) for other in user.all_input_nodes if other is not node)
            and only_output(trace, user)
        )
        for user in users
    )


def soft_cap(node: Node) -> bool:
    """Whether `node` is the tanh of a soft cap, `cap * tanh(x / cap)`, and not an activation."""

    def scales(other: Node) -> bool:
        return op(other) in ("mul", "div") and len(other.all_input_nodes) == 1

    return op(node) == "tanh" and scales(node.args[0]) and all(scales(user) for user in readers(node))


def tensor_names(trace: Trace) -> dict[Node, str]:
    """A name for every tensor that does not change when fake quantization comes in: module, op, and count."""
    count: dict[str, int] = {}
    names = {}
    for node in trace.nodes:
        if op(node) in SAME:
            continue
        name = f"{path_of(node)}/{node.name if node.op == 'placeholder' else op(node)}"
        count[name] = count.get(name, -1) + 1
        names[node] = f"{name}.{count[name]}" if count[name] else name
    return names
