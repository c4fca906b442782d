"""What a model is made of, as a tree of parts with their parameters, bytes and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.tree import Tree
    from torch import nn

    from compress.graph import Attention, Graph, Mlp
    from compress.model import Model


@dataclass(frozen=True)
class Part:
    """A module that was found to be something, or that holds several such modules.

    `kind` says what it is in words. `parameters` and `bytes` (with buffers) count each tensor once within the part;
    tied tensors count in every part that holds them. `macs` are multiply-accumulates for the model's example.
    """

    path: str
    kind: str
    parameters: int
    bytes: int
    macs: int
    children: tuple[Part, ...]


def inspect(model: Model) -> Part:
    """The whole model as a tree of parts. Raises `Unsuitable` if the model cannot be traced."""
    return part(model.module, "", model.graph, kinds(model))


def part(module: nn.Module, path: str, graph: Graph, known: dict[str, str]) -> Part:
    """The part at `path`. Modules that are nothing by themselves and hold a single part are left out."""
    children = [
        part(child, f"{path}.{name}".strip("."), graph, known)
        for name, child in module.named_children()
        if f"{path}.{name}".strip(".") in known or holds_tensors(child)
    ]
    if path and path not in known and len(children) == 1 and not own_tensors(module):
        return children[0]
    return Part(
        path=path,
        kind=known.get(path, type(module).__name__),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        bytes=sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())),
        macs=graph.macs.get(path, 0),
        children=tuple(children),
    )


def holds_tensors(module: nn.Module) -> bool:
    """Whether a parameter lies anywhere in `module`."""
    return next(module.parameters(), None) is not None


def own_tensors(module: nn.Module) -> bool:
    """Whether `module` has a parameter of its own, outside its children."""
    return next(module.parameters(recurse=False), None) is not None


def kinds(model: Model) -> dict[str, str]:
    """What each module was found to be, in words."""
    graph = model.graph
    said: dict[str, list[str]] = {}
    for stack in graph.stacks:
        said.setdefault(stack.path, []).append(f"stack of {len(stack.blocks)} blocks")
        for block in stack.blocks:
            said.setdefault(block, []).append("block")
    for attention in graph.attentions:
        said.setdefault(attention.path, []).append(describe_attention(attention))
    for mlp in graph.mlps:
        said.setdefault(mlp.path, []).append(describe_mlp(mlp))
    for norm in graph.norms:
        said.setdefault(norm.path, []).append({"rms": "RMS"}.get(norm.kind, norm.kind) + " norm")
    for weight in graph.weights:
        kind = "look-up" if weight.kind == "embedding" else weight.kind
        sizes = weight_sizes(model.module.get_submodule(weight.path))
        said.setdefault(weight.path, []).append(
            f"{kind}, weight {sizes}" + (", head" if weight.role == "head" else "")
        )
    return {path: "; ".join(words) for path, words in said.items()}


def describe_attention(attention: Attention) -> str:
    """An attention in words."""
    words = [f"attention, {attention.heads} heads of {attention.head_size}"]
    if attention.kv_heads != attention.heads:
        words.append(f"{attention.kv_heads} key-value heads")
    words += ["causal"] if attention.causal else []
    words += ["cross"] if attention.cross else []
    words += [] if attention.positions == "none" else [f"{attention.positions} positions"]
    return ", ".join(words)


def describe_mlp(mlp: Mlp) -> str:
    """A feed-forward part in words."""
    return f"mlp, {'gated, ' if mlp.gate else ''}{mlp.activation}, {mlp.up.features} hidden"


def weight_sizes(module: nn.Module) -> str:
    """The sizes of the largest tensor that `module` itself holds, such as 40 × 72."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    largest = max(own, key=lambda tensor: tensor.numel())
    return " × ".join(str(size) for size in largest.shape)


def as_tree(part: Part) -> Tree:
    """`part` as a tree to print; equal parts in a row are one line."""
    from rich.tree import Tree

    tree = Tree(line(part, part.kind))
    grow(tree, part)
    return tree


def grow(tree: Tree, part: Part) -> None:
    """Add the children of `part`, one line for each run of equal ones."""
    for _, run in groupby(part.children, key=alike):
        same = list(run)
        first, last = (name_within(child, part) for child in (same[0], same[-1]))
        name = first if len(same) == 1 else f"{first} … {last}"
        repeated = "" if len(same) == 1 else f" [bold]× {len(same)}[/bold]"
        grow(tree.add(line(same[0], f"[cyan]{name}[/cyan] {same[0].kind}{repeated}")), same[0])


def name_within(part: Part, parent: Part) -> str:
    """The path of `part` without that of its parent."""
    return part.path[len(parent.path) :].lstrip(".")


def alike(part: Part) -> tuple[object, ...]:
    """What two parts that are printed as one have in common: all but their paths."""
    return (part.kind, part.parameters, part.bytes, part.macs, tuple(alike(child) for child in part.children))


def line(part: Part, text: str) -> str:
    """One line of the tree, with sizes."""
    sizes = [scaled(part.parameters, " parameters"), scaled(part.bytes, "B")]
    sizes += [scaled(part.macs, " MACs")] if part.macs else []
    return f"{text} [dim]{', '.join(sizes)}[/dim]"


def scaled(number: int, unit: str) -> str:
    """A number in three digits with its unit: 950 B, 22.7 M parameters, 1.2 G MACs."""
    for prefix, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number} {unit.strip()}"
