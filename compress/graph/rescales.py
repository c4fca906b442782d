"""What lies beside each step that rescales features: what writes its input, and what reads its output."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from compress.graph.flow import CARRIERS, ZERO, follow, in_order, label
from compress.graph.norms import Normalization
from compress.graph.ops import AVERAGES, MOVES, op, operand, readers, shape
from compress.graph.record import Trace, told
from compress.graph.rescale_steps import Step, find_steps
from compress.graph.structure import Neighbour, Rescale
from compress.graph.takers import Takers, transposed
from compress.graph.weights import Product


@dataclass(frozen=True)
class Surroundings:
    """The weighted ops of a trace, and the steps by their first and last ops."""

    trace: Trace
    takers: Takers
    begins: dict[Node, Step]
    closes: dict[Node, Step]


def find_rescales(
    trace: Trace, products: dict[Node, Product], normalizations: list[Normalization]
) -> tuple[Rescale, ...]:
    """All rescales of the trace with their neighbours, in order.

    A vector of a larger module is one only if it multiplies what a neighbour writes, or if its product is added to
    something.
    """
    steps = find_steps(trace, {made.path for made in normalizations if made.kind != "batch"})
    around = Surroundings(
        trace=trace,
        takers=Takers(trace, {**products, **transposed(trace)}),
        begins={step.first: step for step in steps},
        closes={step.output: step for step in steps},
    )
    found = [(step, answer(step, around)) for step in steps]
    return tuple(made for step, made in found if not step.parameter or made.writer or is_added(step.output))


def answer(step: Step, around: Surroundings) -> Rescale:
    """`step` with its neighbours."""
    sizes = [1] * len(shape(step.input))
    sizes[step.axis] = step.features
    bare = Rescale(step.path, tuple(sizes), parameter=step.parameter, no_writer=step.why)
    if step.why:
        return bare
    writer, no_writer = writer_of(step, around)
    found, no_readers = readers_of(step, around)
    return replace(bare, writer=writer, readers=found, no_writer=no_writer, no_readers=no_readers)


def writer_of(step: Step, around: Surroundings) -> tuple[Neighbour | None, str]:
    """What alone writes the tensor that `step` reads, or why there is no such thing."""
    node, user = step.input, step.first
    while True:
        if others := [one for one in readers(node) if one is not user]:
            return None, f"{told(others[0])} reads its input too"
        if node in around.trace.overwritten:
            return None, "its input is written over in place"
        if node in around.takers.products or node in around.closes:
            break
        if op(node) not in MOVES | AVERAGES or not isinstance(node.args[0], Node):
            return None, f"it reads {told(node)}"
        node, user = node.args[0], node
    made = around.takers.products.get(node) or around.closes[node]
    if why := unfit(made, around):
        return None, why
    start = label(node, made.axis)
    within = around.trace.ancestors[step.input]
    labels = follow(around.trace, node, start, CARRIERS | AVERAGES, within).get(step.input)
    if shape(node)[made.axis] != step.features or not in_order(labels, step.axis, step.features):
        return None, f"its features are not those of `{name_of(made)}`"
    return Neighbour(name_of(made), has_zeros(labels)), ""


def readers_of(step: Step, around: Surroundings) -> tuple[tuple[Neighbour, ...], str]:
    """All that reads what `step` makes, or () and why these are not weighted modules and steps alone."""
    if step.output in around.trace.overwritten:
        return (), "its output is written over in place"
    reached = follow(around.trace, step.output, label(step.output, step.axis), MOVES | AVERAGES)
    found: dict[str, Neighbour] = {}
    for node, labels in reached.items():
        for user in readers(node):
            if user in reached:
                continue
            made = around.takers.products.get(user) or around.begins.get(user)
            if made is None or made.input is not node or not in_order(labels, made.axis, step.features):
                return (), f"{told(user)} reads it"
            if why := unfit(made, around):
                return (), why
            found[name_of(made)] = Neighbour(name_of(made), has_zeros(labels) or pads(made))
    return tuple(found.values()), "" if found else "nothing reads it"


def has_zeros(labels: Tensor) -> bool:
    """Whether some of `labels` are padded zeros."""
    return bool((labels == ZERO).any())


def pads(made: Product | Step) -> bool:
    """Whether `made` reads zeros beside its input: a padding, or the gaps and borders of a transposed convolution."""
    if isinstance(made, Step) or made.kind != "conv":
        return False
    if op(made.node).startswith("conv_transpose"):
        return any(size > 1 for size in (*made.kernel, *made.stride))
    padding = operand(made.node, 4, "padding") or (0,)
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in made.kernel)
    return any(padding)


def unfit(made: Product | Step, around: Surroundings) -> str:
    """Why a neighbour can take nothing on, or ""."""
    if isinstance(made, Step):
        return f"{made.name}: {made.why}" if made.why else ""
    return around.takers.refusal(made)


def name_of(made: Product | Step) -> str:
    """What a neighbour is called."""
    return made.owner if isinstance(made, Product) else made.name


def is_added(node: Node) -> bool:
    """Whether `node`, through moves, is added to another tensor."""
    users = readers(node)
    while len(users) == 1 and op(users[0]) in MOVES:
        users = readers(users[0])
    return any(op(user) == "add" and len(user.all_input_nodes) == 2 for user in users)
