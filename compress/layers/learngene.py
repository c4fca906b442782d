"""Blocks that share a learngene: two tensors for each parameter of a block, whatever the number of blocks.

After TLEG (Xia et al. 2024, arXiv 2312.05614). Each parameter of each block is computed where it is read, through
`torch.nn.utils.parametrize`, so that any kind of module can be in a block, and what trains is the gene.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.numerics.learngene import Line, on_line

Gene = Mapping[str, Line]
"""The lines by the names of a block's parameters; their tensors are the parameters that the blocks share."""


class Expansion(nn.Module):
    """Gives the tensor of one block, `base + fraction * slope`, from the base that it is called with.

    slope      parameter, of the shape of the tensor, one for all blocks
    fraction   the block's number by the number of blocks
    """

    def __init__(self, slope: nn.Parameter, fraction: float) -> None:
        super().__init__()
        self.slope = slope
        self.fraction = fraction

    def forward(self, base: Tensor) -> Tensor:
        return on_line(base, self.slope, self.fraction)

    def extra_repr(self) -> str:
        return f"fraction={self.fraction:.4g}"


def gene_of(block: nn.Module) -> dict[str, Line]:
    """The gene that `block` is made from; empty if it has weights of its own."""
    found = {}
    for path, part in block.named_modules():
        if parametrize.is_parametrized(part):
            for name, steps in part.parametrizations.items():  # type: ignore[union-attr, operator]
                if isinstance(steps[0], Expansion):
                    found[f"{path}.{name}".removeprefix(".")] = Line(steps.original, steps[0].slope)
    return found


def blank_gene(block: nn.Module) -> dict[str, Line]:
    """A gene for blocks like `block`, which has weights of its own: to be loaded."""
    return {name: Line(one.detach(), torch.zeros_like(one)) for name, one in block.named_parameters()}


def share(blocks: Sequence[nn.Module], gene: Gene) -> None:
    """Let `blocks`, which have weights of their own and are alike, share `gene` instead, in place."""
    for name, line in gene.items():
        path, _, leaf = name.rpartition(".")
        trained = blocks[0].get_parameter(name).requires_grad
        base, slope = (nn.Parameter(one.detach(), requires_grad=trained) for one in (line.base, line.slope))
        for place, block in enumerate(blocks):
            part = block.get_submodule(path)
            setattr(part, leaf, base)
            parametrize.register_parametrization(part, leaf, Expansion(slope, place / len(blocks)))


def write(blocks: Sequence[nn.Module], gene: Gene) -> None:
    """Give `blocks`, which have weights of their own, the values that `gene` has for them, in place."""
    for name, line in gene.items():
        for place, block in enumerate(blocks):
            block.get_parameter(name).data = line.at(place, len(blocks)).detach()
