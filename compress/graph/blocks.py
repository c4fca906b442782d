"""Stacks: runs of structurally equal modules, each reading the one before it."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise

from torch.fx import Node

from compress.graph.norms import Normalization
from compress.graph.ops import MOVES, op
from compress.graph.record import Trace, modules_of
from compress.graph.structure import Stack
from compress.graph.weights import Product

Signature = frozenset[Hashable]


def find_stacks(
    trace: Trace, products: dict[Node, Product], normalizations: list[Normalization]
) -> tuple[Stack, ...]:
    """All runs of at least two equal blocks, one container after the other, in the order of execution."""
    blocks = candidates(trace, products)
    equal = {path: signature(trace, path, products, normalizations) for path in blocks}
    found = []
    for container in dict.fromkeys(path.rpartition(".")[0] for path in blocks):
        children = [path for path in blocks if path.rpartition(".")[0] == container]
        for run in split_runs(trace, children, blocks, equal):
            if len(run) > 1:
                found.append(Stack(container, tuple(run)))
    return tuple(found)


def candidates(trace: Trace, products: dict[Node, Product]) -> dict[str, set[Node]]:
    """Modules with at least two weighted ops, and the nodes that run inside them, in the order of execution."""
    inside: dict[str, set[Node]] = {}
    weighted: dict[str, set[str]] = {}
    for node in trace.nodes:
        paths = list(modules_of(node))
        if node in products:
            owner = products[node].owner.split(".")
            paths += [".".join(owner[:end]) for end in range(1, len(owner) + 1)]
            for path in paths:
                weighted.setdefault(path, set()).add(products[node].parameter)
        for path in paths:
            inside.setdefault(path, set()).add(node)
    return {path: nodes for path, nodes in inside.items() if path and len(weighted.get(path, ())) > 1}


def signature(
    trace: Trace, path: str, products: dict[Node, Product], normalizations: list[Normalization]
) -> Signature:
    """What a block is made of, with paths relative to it: weighted ops, norms and other parameters with their sizes."""
    start = len(path) + 1
    prefix = path + "."
    weighted = {
        (made.owner[start:], made.kind, made.inputs, made.outputs, made.kernel, made.stride, made.groups)
        for made in products.values()
        if made.owner.startswith(prefix)
    }
    norms = {(made.path[start:], made.kind) for made in normalizations if made.path.startswith(prefix)}
    answered = {made.parameter for made in products.values()}
    others = {
        (name, tuple(parameter.shape))
        for name, parameter in trace.module.get_submodule(path).named_parameters()
        if prefix + name not in answered
    }
    return frozenset(weighted | norms | others)


def split_runs(
    trace: Trace, children: list[str], blocks: dict[str, set[Node]], equal: dict[str, Signature]
) -> list[list[str]]:
    """Children of one container as runs of equal blocks in which each reads the one before it."""
    children = sorted(children, key=lambda path: min(trace.index[node] for node in blocks[path]))
    found: list[list[str]] = [children[:1]]
    for before, path in pairwise(children):
        if equal[before] == equal[path] and chained(trace, blocks[before], blocks[path]):
            found[-1].append(path)
        else:
            found.append([path])
    return found


def chained(trace: Trace, before: set[Node], after: set[Node]) -> bool:
    """Whether `after` reads what `before` makes, with nothing but moves and a residual sum between them."""
    if before & after:
        return False
    seen: set[Node] = set()
    queue = [user for node in before for user in node.users if user not in before]
    while queue:
        node = queue.pop()
        if node in after:
            return True
        if node in seen or node in before or not (op(node) in MOVES or is_residual_sum(trace, node)):
            continue
        seen.add(node)
        queue += node.users
    return False


def is_residual_sum(trace: Trace, node: Node) -> bool:
    """Whether `node` adds a tensor and something computed from it."""
    sides = [side for side in node.args[:2] if isinstance(side, Node)] if op(node) == "add" else []
    return len(sides) == 2 and (trace.depends(sides[0], sides[1]) or trace.depends(sides[1], sides[0]))
