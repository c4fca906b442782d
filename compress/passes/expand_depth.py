"""Learngene: all blocks of a stack from two tensors for each of their parameters, for a stack of any depth.

TLEG (Xia et al. 2024, arXiv 2312.05614): block l of L is `base + (l / L) slope`. The paper trains such a gene from the
start, by distillation; here it is fitted to the blocks that there are, in closed form, and trained after that by a
pass such as `distill`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.passes.drop_layers import require_depth_first
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Stack
    from compress.layers.learngene import Gene
    from compress.model import Model
    from compress.numerics.learngene import Line
    from compress.scope import Scope


class ExpandDepth(Pass):
    """Make all blocks of a stack from one gene, in any number."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "nothing"

    use: Literal["expand_depth"] = "expand_depth"
    depth: int | None = Field(default=None, ge=1)
    """How many blocks to make; without it, as many as there are."""
    form: Literal["gene", "plain"] = "gene"
    """`gene`: the blocks share the gene, which is stored once, and is what trains. `plain`: weights of their own, for
    passes that change them, and for training that leaves the gene behind."""
    unhealed: bool = False
    """Go on with the blocks although no pass after this one trains them."""

    def owes(self, before: Sequence[Pass]) -> str:
        genes = [one for one in before if isinstance(one, ExpandDepth) and one.scope == self.scope][-1:]
        same = any(one.form == "gene" and self.depth in (None, one.depth) for one in genes)
        # A gene that is made plain at its own depth stays the same function, trained or not.
        return "" if self.unhealed or same else "blocks that were not trained, or not at this depth"

    def check(self, model: Model) -> None:
        require_depth_first(model, self.use)

    def apply(self, model: Model, context: Context) -> Result:
        from compress.layers.learngene import gene_of
        from compress.passes.blocks import chosen_stack

        del context  # a gene is fitted to weights alone
        self.check(model)
        stack = chosen_stack(model, self.scope, "`expand_depth`")
        count = len(stack.blocks)
        depth = self.depth or count
        gene: Gene = gene_of(model.module.get_submodule(stack.blocks[0]))
        if gene and self.form == "gene" and depth == count:
            return Result(model.module, (), (Skip(stack.path, f"it is a gene with {count} blocks already"),))
        if gene:
            before, after = f"gene with {count} blocks", f"{self.form} with {depth} blocks"
            changes = [Change(stack.path, "expanded", before, after)]
        else:
            _require_alike(model, stack, self.scope)
            gene, changes = _fitted(model.module, stack, depth)
        self._install(model.module, stack.path, depth, gene)
        return Result(
            model.module, tuple(changes), record={"stack": stack.path, "count": count, "depth": depth}
        )

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        found = len(list(module.get_submodule(record["stack"]).children()))
        # A module that was built from a later config has its last depth already.
        self._install(module, record["stack"], record["depth"] if found == record["count"] else found, None)
        return module

    def _install(self, module: nn.Module, path: str, depth: int, gene: Gene | None) -> None:
        """Give the stack at `path` its depth and form, and the values of `gene`, or none that count."""
        from compress.depth import resize_blocks
        from compress.layers.learngene import blank_gene, share, write
        from compress.plain import make_plain

        make_plain(module.get_submodule(path))
        resize_blocks(module, path, depth)
        blocks = list(module.get_submodule(path).children())
        if self.form == "gene":
            share(blocks, blank_gene(blocks[0]) if gene is None else gene)
        elif gene is not None:
            write(blocks, gene)


def _fitted(module: nn.Module, stack: Stack, depth: int) -> tuple[dict[str, Line], list[Change]]:
    """The gene that fits the blocks of `stack` best, and for each tensor how well."""
    from compress.numerics.learngene import fit_line

    blocks = [module.get_submodule(path) for path in stack.blocks]
    gene, changes = {}, []
    for name, first in blocks[0].named_parameters():
        fit = fit_line([block.get_parameter(name) for block in blocks])
        gene[name] = fit.line
        before = f"{len(blocks)} tensors {'x'.join(map(str, first.shape))}"
        said = f"2 for {depth} blocks, R^2 {fit.r2:.4f}, {100 * fit.error:.3g} % of the energy lost"
        changes.append(Change(f"{stack.path}.*.{name}", "fitted", before, said))
    return gene, changes


def _require_alike(model: Model, stack: Stack, scope: Scope) -> None:
    """Raise `Unsuitable` if the modules in the container of `stack` cannot all be made from one gene."""
    container = model.module.get_submodule(stack.path)
    blocks = {f"{stack.path}.{name}": block for name, block in container.named_children()}
    _require_equal_shapes(blocks)
    if set(blocks) != set(stack.blocks):
        raise Unsuitable(
            f"Only {len(stack.blocks)} of the {len(blocks)} modules in `{stack.path}` are equal blocks that read one "
            "another.",
            "A gene makes all blocks of a list: leave the pass out.",
        )
    outside = [
        path for path, _ in model.module.named_modules() if _inside(path, blocks) and path not in scope
    ]
    if outside:
        raise Unsuitable(
            f"A gene makes whole blocks, and `{outside[0]}` is not in the scope.",
            f'Choose the whole stack: `scope: {{include: ["{stack.path}.*"]}}`.',
        )
    _require_own_tensors(model, blocks)


def _inside(path: str, blocks: dict[str, nn.Module]) -> bool:
    return any(f"{path}.".startswith(f"{block}.") for block in blocks)


def _require_equal_shapes(blocks: dict[str, nn.Module]) -> None:
    (first, one), *others = blocks.items()
    shapes = {name: tuple(tensor.shape) for name, tensor in one.named_parameters()}
    for path, block in others:
        found = {name: tuple(tensor.shape) for name, tensor in block.named_parameters()}
        for name in shapes | found:
            if shapes.get(name) != found.get(name):
                raise Unsuitable(
                    f"The blocks are not of equal shapes: `{name}` is {_shown(shapes.get(name))} in `{first}` and "
                    f"{_shown(found.get(name))} in `{path}`.",
                    "One gene makes equal blocks only: choose another stack by the scope, or leave the pass out.",
                )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def _require_own_tensors(model: Model, blocks: dict[str, nn.Module]) -> None:
    """Raise `Unsuitable` if a parameter is no float or has other names, or a buffer differs between the blocks."""
    import torch

    first, *others = blocks.values()
    for path, block in blocks.items():
        for name, parameter in block.named_parameters(remove_duplicate=False):
            if sharers := model.graph.sharers(f"{path}.{name}"):
                why = f"shares its tensor with {', '.join(sharers)}"
            elif not parameter.is_floating_point():
                why = f"holds {str(parameter.dtype).removeprefix('torch.')}"
            else:
                continue
            raise Unsuitable(
                f"`{path}.{name}` {why}, and cannot be made from a gene.",
                "Choose another stack by the scope, or leave the pass out.",
            )
    for name, buffer in first.named_buffers():
        if not all(torch.equal(buffer, block.get_buffer(name)) for block in others):
            raise Unsuitable(
                f"The buffer `{name}` differs between the blocks, and a gene makes parameters only.",
                "Put `expand_depth` before the pass that put it in, or leave it out.",
            )
