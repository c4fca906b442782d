"""A linear map as a small dictionary and sparse codes, with the same count of non-zeros in each row of them.

DSFormer (Chand et al. 2023, arXiv 2312.13211): W (out, in) = S D, with the dictionary D (atoms, in) and the codes S
(out, atoms). Of a map with more inputs than outputs it is the transpose that is written so: the rows are those of the
longer side, and the dictionary spans the shorter one.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from compress.layers.low_rank import LowRankLinear
from compress.numerics.bit_masks import gathered, pack_bits, packed_width, spread


class Coded(nn.Module):
    """What both forms share: input (..., in), output (..., out), by codes (rows, atoms) that a subclass has.

    atoms   parameter (atoms, side)
    bias    parameter (out,), or None
    """

    def __init__(self, atoms: Tensor, bias: Tensor | None, turned: bool) -> None:
        """`turned`: rows are inputs, and the dictionary spans outputs."""
        super().__init__()
        self.atoms = nn.Parameter(atoms.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.turned = turned

    def codes(self) -> Tensor:
        """The codes (rows, atoms), zeros included."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The product (out, in): some models look at the type of a layer's weight."""
        made = self.codes() @ self.atoms
        return made.T if self.turned else made

    def forward(self, x: Tensor) -> Tensor:
        linear, codes = nn.functional.linear, self.codes()
        size, side = self.atoms.shape
        if not thinner(len(codes), side, size):
            made = codes @ self.atoms
            return linear(x, made.T if self.turned else made, self.bias)
        if self.turned:
            return linear(linear(x, codes.T), self.atoms.T, self.bias)
        return linear(linear(x, self.atoms), codes, self.bias)

    def extra_repr(self) -> str:
        size, side = self.atoms.shape
        return f"{size} atoms of {side}{' outputs' if self.turned else ' inputs'}"


class LatentCoded(Coded):
    """The form that trains: full codes, of which each row's `count` largest take part.

    The gradient of a code that takes no part is that of one that does (straight through, the paper's STF): it may
    grow until it does.

    latent   parameter (rows, atoms)
    """

    def __init__(self, codes: Tensor, atoms: Tensor, bias: Tensor | None, turned: bool, count: int) -> None:
        super().__init__(atoms, bias, turned)
        self.latent = nn.Parameter(codes.detach().contiguous())
        self.count = count
        self.kept: Tensor | None = None

    def support(self) -> Tensor:
        """Which codes take part, (rows, atoms): the largest, or those that did when they were frozen."""
        if self.kept is not None:
            return self.kept
        latent = self.latent.detach()
        picked = latent.abs().topk(self.count, dim=1).indices
        return torch.zeros_like(latent, dtype=torch.bool).scatter(1, picked, True)

    def freeze(self) -> None:
        """From now on the codes that take part stay the same, and no other has a gradient."""
        self.kept = self.support()

    def codes(self) -> Tensor:
        chosen = self.latent * self.support()
        return chosen if self.kept is not None else self.latent + (chosen - self.latent).detach()

    def packed(self) -> CodedLinear:
        """The form that is stored, with atoms of unit length: 1 is what a code of 1 adds to a row."""
        support, atoms = self.support(), self.atoms.detach()
        lengths = atoms.norm(dim=1).clamp(min=torch.finfo(atoms.dtype).tiny)
        values = gathered(self.latent.detach() * lengths, support)
        return CodedLinear(values, pack_bits(support), atoms / lengths[:, None], self.bias, self.turned)


class CodedLinear(Coded):
    """The form that is stored: the non-zero codes, and a bit for each place.

    values   parameter (rows, count)
    places   buffer (rows, ceil(atoms / 8)), uint8
    """

    places: Tensor

    def __init__(
        self, values: Tensor, places: Tensor, atoms: Tensor, bias: Tensor | None, turned: bool
    ) -> None:
        super().__init__(atoms, bias, turned)
        self.values = nn.Parameter(values.detach().contiguous())
        self.register_buffer("places", places)

    def codes(self) -> Tensor:
        return spread(self.values, self.places, len(self.atoms))

    def unpacked(self) -> nn.Module:
        """The same map with nothing to unpack: two plain linear maps, or one where that is less work."""
        codes, atoms = self.codes(), self.atoms
        factors = (atoms.T, codes.T) if self.turned else (codes, atoms)
        made = LowRankLinear(*factors, self.bias)
        return made if thinner(len(codes), atoms.shape[1], len(atoms)) else made.dense()


def thinner(rows: int, side: int, atoms: int) -> bool:
    """Whether two products by `atoms` features are less work than one of (rows, side)."""
    return atoms * (rows + side) < rows * side


def empty_coded(like: Tensor, bias: Tensor | None, atoms: int, count: int) -> CodedLinear:
    """A packed layer with any values, for a weight like `like` (out, in)."""
    out, width = like.shape
    rows, side = max(out, width), min(out, width)
    places = torch.zeros(rows, packed_width(atoms), dtype=torch.uint8, device=like.device)
    return CodedLinear(like.new_empty(rows, count), places, like.new_empty(atoms, side), bias, out < width)


def is_coded(module: nn.Module) -> bool:
    """Whether `module` holds any layer of sparse codes."""
    return any(isinstance(part, Coded) for part in module.modules())


def unpacked_copy(module: nn.Module) -> nn.Module:
    """`module` if it has no packed layers, else a copy of it in which they are unpacked."""
    from compress.layers.quantized import swap

    if not is_coded(module):
        return module
    copied = copy.deepcopy(module)
    layers = [part for part in copied.modules() if isinstance(part, CodedLinear)]
    swap(copied, {part: part.unpacked().train(part.training) for part in layers})
    return copied
