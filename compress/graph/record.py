"""Run a module once under `torch.export`; keep the ops in order, and what is behind their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from compress.configs import using_cache
from compress.errors import Unsuitable
from compress.graph.ops import MOVES, in_place, op, operand, readers


@dataclass(frozen=True)
class Trace:
    """One run of `module` as a list of ops. `names` gives each parameter's and buffer's node its dotted name."""

    module: nn.Module
    nodes: tuple[Node, ...]
    names: Mapping[Node, str]
    values: Mapping[Node, Any]
    """The tensors behind the nodes that are no ops: parameters, buffers, constants and example inputs."""
    given: frozenset[Node]
    """The nodes of example inputs."""
    overwritten: frozenset[Node]
    """Nodes that another op writes into while others still read them: what they hold is not what they made."""

    @cached_property
    def index(self) -> dict[Node, int]:
        """The place of each node in the order of execution."""
        return {node: place for place, node in enumerate(self.nodes)}

    @cached_property
    def ancestors(self) -> dict[Node, int]:
        """All nodes that each node depends on, itself included, as a set of bits numbered by `index`."""
        found: dict[Node, int] = {}
        for place, node in enumerate(self.nodes):
            bits = 1 << place
            for read in node.all_input_nodes:
                bits |= found[read]
            found[node] = bits
        return found

    @cached_property
    def parameters(self) -> frozenset[Node]:
        """The nodes of trainable parameters."""
        known = dict(self.module.named_parameters(remove_duplicate=False))
        return frozenset(node for node, name in self.names.items() if name in known)

    @cached_property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """All names of the tensor behind each parameter and buffer name; tied parameters have several."""
        together: dict[int, list[str]] = {}
        for find in (self.module.named_parameters, self.module.named_buffers):
            for name, tensor in find(remove_duplicate=False):
                together.setdefault(id(tensor), []).append(name)
        return {name: tuple(names) for names in together.values() for name in names}

    def depends(self, node: Node, on: Node) -> bool:
        """Whether `node` is computed from `on`, or is it."""
        return bool(self.ancestors[node] >> self.index[on] & 1)

    @cached_property
    def fixed(self) -> frozenset[Node]:
        """The nodes that are computed from the model's own tensors alone: the same in every run."""
        found: set[Node] = set()
        for node in self.nodes:
            own = node.op == "placeholder" and node not in self.given
            if own or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
                found.add(node)
        return frozenset(found)

    def makes_weight(self, node: Node) -> bool:
        """Whether `node` computes, from the model's own tensors, the weight of a linear map: once, in a runtime."""
        return node in self.fixed and any(
            (op(user) == "linear" and user.args[1] is node) or (op(user) in MOVES and self.makes_weight(user))
            for user in readers(node)
        )

    def above(self, node: Node) -> list[Node]:
        """All nodes that `node` is computed from, itself included, in order."""
        bits = self.ancestors[node]
        return [other for place, other in enumerate(self.nodes) if bits >> place & 1]


def modules_of(node: Node) -> tuple[str, ...]:
    """Paths of the modules whose forward was running at `node`, outermost first; empty where the trace lost them."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    # A module that runs a second time is told from its first run by a suffix "@1".
    return tuple(path.split("@")[0] for path, _ in stack)


def path_of(node: Node) -> str:
    """Path of the innermost module running at `node`; "" for the model, and where the trace lost it."""
    return (modules_of(node) or ("",))[-1]


def told(node: Node) -> str:
    """A node, in words."""
    if op(node) == "placeholder":
        return "an input of the model"
    if op(node) == "output":
        return "the output of the model"
    return f"{op(node)} of `{path_of(node)}`" if path_of(node) else op(node)


def record(module: nn.Module, example: Mapping[str, Tensor]) -> Trace:
    """Trace `module` on the keyword arguments `example`. The module is as it was before.

    Raises `Unsuitable` if `torch.export` cannot trace it.
    """
    inputs = dict(example)
    if "use_cache" in inspect.signature(module.forward).parameters:
        inputs["use_cache"] = False
    try:
        with evaluating(module), using_cache(module, False), torch.no_grad():
            program = torch.export.export(module, (), kwargs=inputs, strict=False)
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsuitable(
            f"{type(module).__name__} cannot be traced with inputs "
            f"{', '.join(f'{name} {tuple(value.shape)}' for name, value in example.items())}: "
            f"{type(error).__name__}: {cause}",
            "Check that the module runs on these inputs. Where its forward branches on values of tensors, "
            "compress the submodule that does not, or rewrite the branch with torch.where.",
        ) from error
    _require_known_shapes(module, program)
    return from_program(module, program)


def _require_known_shapes(module: nn.Module, program: ExportedProgram) -> None:
    """Raise `Unsuitable` if the shape of a tensor in the graph depends on the values of another."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and free_unbacked_symbols(value):
            raise Unsuitable(
                f"{type(module).__name__} computes shapes from the values of tensors, in `{path_of(node)}` for one, "
                "so its structure cannot be read from one run.",
                "Compress a submodule that does not, such as the vision tower or the language model.",
            )


def from_program(module: nn.Module, program: ExportedProgram) -> Trace:
    """The ops that the outputs depend on, and the tensors behind the inputs of the graph."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**named, **signature.inputs_to_lifted_tensor_constants}
    tensors = {**program.state_dict, **program.constants}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = {placeholders[name]: tensors[key] for name, key in constants.items() if key in tensors}
    given = pytree.tree_leaves(program.example_inputs)
    users = [spec.arg.name for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
    values |= {
        placeholders[name]: value for name, value in zip(users, given, strict=True) if name in placeholders
    }
    overwritten = find_overwritten(program.graph)
    return Trace(
        module=module,
        nodes=drop_dead(program.graph),
        given=frozenset(placeholders[name] for name in users if name in placeholders),
        overwritten=overwritten,
        names={placeholders[name]: key for name, key in named.items()},
        values=values,
    )


def find_overwritten(graph: Graph) -> frozenset[Node]:
    """The nodes that an op in place changes behind the back of their other readers, as `x[:, 0] = 1` does."""
    found: set[Node] = set()
    for node in graph.nodes:
        if not in_place(node):
            continue
        target, views = operand(node, 0, "self"), []
        while isinstance(target, Node):
            views.append(target)
            target = operand(target, 0, "self") if op(target) in MOVES else None
        if not readers(node) or any(len(readers(view)) > 1 for view in views):
            found.update(views)
    return frozenset(found)


def drop_dead(graph: Graph) -> tuple[Node, ...]:
    """The nodes that the output depends on, in order; the rest (assertions) is erased from `graph`."""
    wanted: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node in wanted:
            wanted.update(node.all_input_nodes, (node,))
        else:
            graph.erase_node(node)
    return tuple(graph.nodes)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode inside the block, and every submodule back as it was after it."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
