"""Steps that multiply and shift each feature by constants: batch norms, also written out, and layer scales."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import Node

from compress.graph.flow import compute
from compress.graph.ops import FACTORS, SAME, ends, op, operand, readers, shape, source
from compress.graph.record import Trace, modules_of, path_of
from compress.graph.weights import name_here

SUMS = frozenset(["add", "sub"])


@dataclass(frozen=True)
class Step:
    """A rescale in the trace: `first`, its first op, reads `input`; `output` is its last; `axis` counts from the last.

    It is all that the module at `path` does, or the product with its `parameter`. Where it must stay as it is, `why`
    says why.
    """

    first: Node
    input: Node
    output: Node
    axis: int
    path: str
    parameter: str = ""
    why: str = ""

    @property
    def name(self) -> str:
        """What neighbours call it."""
        return f"{self.path}.{self.parameter}".strip(".")

    @property
    def features(self) -> int:
        """Number of features."""
        return shape(self.output)[self.axis]


def find_steps(trace: Trace, norms: set[str]) -> list[Step]:
    """All steps, in order. `norms` are modules whose vectors are weights of other norms, and no steps."""
    live = live_nodes(trace)
    inside: dict[str, list[Node]] = {}
    for node in trace.nodes:
        for path in modules_of(node) if node in live else ():
            inside.setdefault(path, []).append(node)
    runs = Counter(path_of(node) for node in trace.nodes if op(node) == "batch_norm")
    found: dict[tuple[str, str], Step] = {}
    for node in trace.nodes:
        read = rescaled(node, live)
        if read is not None:
            path = path_of(node)
            step = whole_module(path, inside.get(path, []), live)
            if step is None and op(node) == "batch_norm":
                why = f"it runs {runs[path]} times" if runs[path] > 1 else "its module does more than this"
                step = Step(node, read[0], node, read[1], path, why=why)
            step = step or vector(trace, node, read, live, norms)
            if step is not None:
                found.setdefault((step.path, step.parameter), step)
    return list(found.values())


def live_nodes(trace: Trace) -> frozenset[Node]:
    """The nodes that depend on an input of the model, inputs included; all others are constants."""
    inputs = [node for node in trace.nodes if node.op == "placeholder" and node not in trace.names]
    bits = sum(1 << trace.index[node] for node in inputs)
    return frozenset(node for node in trace.nodes if trace.ancestors[node] & bits)


def rescaled(node: Node, live: frozenset[Node]) -> tuple[Node, int] | None:
    """The tensor that `node` rescales by constants, and its feature axis from the last; None if it does not."""
    if op(node) == "batch_norm":
        constants = [read for read in node.all_input_nodes if read not in live]
        alone = node in live and len(constants) == len(node.all_input_nodes) - 1
        return (node.args[0], 1 - len(shape(node))) if alone else None
    if op(node) not in FACTORS | SUMS or not all(isinstance(side, Node) for side in node.args[:2]):
        return None
    sides = sorted(node.args[:2], key=lambda side: side not in live)
    if [side in live for side in sides] != [True, False] or shape(node) != shape(sides[0]):
        return None
    if op(node) not in ("mul", "add", "sub") and sides[0] is not node.args[0]:
        return None
    sizes = shape(sides[1])
    axes = [place - len(sizes) for place, size in enumerate(sizes) if size > 1]
    return (sides[0], axes[0]) if len(axes) == 1 else None


def whole_module(path: str, nodes: list[Node], live: frozenset[Node]) -> Step | None:
    """The step that is all of `nodes`, which run inside the module at `path`; None if they are anything else."""
    start, before, axes, scales = None, None, set(), False
    for node in nodes:
        read = (node.args[0], None) if op(node) in SAME else rescaled(node, live)
        if read is None or (before is not None and (read[0] is not before or len(readers(before)) > 1)):
            return None
        start = read[0] if start is None else start
        before = node
        axes |= {read[1]} - {None}
        scales |= op(node) in FACTORS | {"batch_norm"}
    if not path or start is None or before is None or len(axes) != 1 or not scales:
        return None
    batch = any(op(node) == "batch_norm" and operand(node, 5, "training") for node in nodes)
    why = "it takes its statistics from each batch" if batch else ""
    return Step(nodes[0], start, before, axes.pop(), path, why=why)


def vector(
    trace: Trace, node: Node, read: tuple[Node, int], live: frozenset[Node], norms: set[str]
) -> Step | None:
    """The step that multiplies by one parameter of a larger module; None where `node` is anything else."""
    constant = next(side for side in node.all_input_nodes if side not in live)
    factor = source(constant)
    if op(node) != "mul" or factor not in trace.parameters:
        return None
    path, _, parameter = name_here(trace, trace.names[factor], node).rpartition(".")
    if path in norms:
        return None
    why = "" if shrinks(trace, constant, factor) else f"`{parameter}` is reshaped to its full size"
    if ends(factor) != {node}:
        why = f"`{parameter}` is used elsewhere too"
    return Step(node, read[0], node, read[1], path, parameter, why)


def shrinks(trace: Trace, constant: Node, factor: Node) -> bool:
    """Whether `constant` could be computed from a single number in place of the parameter `factor`."""
    try:
        one = compute(trace, constant, {factor: torch.ones([1] * len(shape(factor)))})
        return one.expand(shape(constant)).shape == shape(constant)
    except RuntimeError:
        return False
