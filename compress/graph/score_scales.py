"""The numbers by which attentions multiply their scores, as 1 / sqrt(head size), and the maps that could do it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from compress.graph.attention import Side
from compress.graph.cores import Core, find_cores
from compress.graph.flow import CARRIERS, follow, label, without_copies
from compress.graph.ops import FACTORS, MOVES, op, readers
from compress.graph.record import Trace, path_of, told
from compress.graph.structure import ScoreScale
from compress.graph.takers import Takers
from compress.graph.ways import bent, between, numbers
from compress.graph.weights import Product


def find_score_scales(trace: Trace, products: dict[Node, Product]) -> tuple[ScoreScale, ...]:
    """The factors that are ops of their own, in order. One that a fused attention takes as an argument is none."""
    takers = Takers(trace, products)
    found: dict[tuple[str, str], ScoreScale] = {}
    for core in find_cores(trace, products):
        side = Side(trace, core.query, products, CARRIERS)
        way = [] if side.product is None else between(trace, side.product.node, core.query.node)
        for node, factor in factors(core, way):
            path, (attribute, why) = path_of(node), attribute_of(trace, node)
            why = why or obstacle(trace, takers, core, side, way)
            query = None if why else side.projection(False)
            found[path, attribute] = ScoreScale(path, attribute, factor, query, why)
    return tuple(found.values())


def obstacle(trace: Trace, takers: Takers, core: Core, side: Side, way: list[Node]) -> str:
    """Why the map of the queries cannot take a factor on, or ""."""
    if side.product is None or side.rows is None:
        return "its queries come from no single map"
    if refused := takers.refusal(side.product):
        return refused
    if (node := bent(trace, side.product.node, way)) is not None:
        return f"{told(node)} stands between the map of its queries and its scores"
    return shared(trace, side.product, side.rows, way, core)


def factors(core: Core, way: list[Node]) -> Iterator[tuple[Node, float]]:
    """The products with a number on the way of the queries and right after the scores, with the number."""
    node, after = core.scores, []
    while node is not None and len(users := readers(node)) == 1 and op(users[0]) in MOVES | FACTORS:
        node = users[0]
        after.append(node)
    for node in (*way, *after):
        number = node.args[1] if op(node) in FACTORS and len(node.args) > 1 else None
        if isinstance(number, int | float) and number not in (0, 1):
            yield node, float(number) if op(node) == "mul" else 1 / number


def attribute_of(trace: Trace, node: Node) -> tuple[str, str]:
    """The attribute of the module running at `node` that holds its number; "" and why where none does alone."""
    path, number = path_of(node), node.args[1]
    held = vars(trace.module.get_submodule(path)).items()
    names = [name for name, value in held if type(value) is float and value == number]
    if not names:
        return "", f"none of its attributes is {number:.4g}, the factor of its scores"
    if len(names) > 1:
        return "", f"{' and '.join(names)} are both {number:.4g}, the factor of its scores"
    uses = sum(number in numbers((*other.args, *other.kwargs.values())) for other in running(trace, path))
    return names[0], "" if uses == 1 else f"it uses `{names[0]}` {uses} times"


def running(trace: Trace, path: str) -> list[Node]:
    """The nodes that run in the forward of the module at `path` itself."""
    return [node for node in trace.nodes if node.op == "call_function" and path_of(node) == path]


def shared(trace: Trace, made: Product, rows: Tensor, way: list[Node], core: Core) -> str:
    """What else reads the features `rows` of `made`, which the queries are made of, or ""."""
    reached = follow(trace, made.node, label(made.node, made.axis, made.rows), MOVES)
    tensors = {node: labels for node, labels in reached.items() if isinstance(labels, Tensor)}
    wanted = rows.flatten()
    carriers = [
        node for node, labels in tensors.items() if torch.isin(without_copies(labels).flatten(), wanted).any()
    ]
    for node in dict.fromkeys((*carriers, *way)):
        for user in readers(node):
            is_core = node is core.query.node and user in (core.scores, core.mixture)
            if user not in way and user not in reached and not is_core:
                return f"{told(user)} reads its queries too"
    return ""
