"""A linear map as a small dictionary and sparse codes, with the same count of non-zeros in each row of them.

DSFormer (Chand et al. 2023, arXiv 2312.13211): W (out, in) = S D, with the dictionary D (atoms, in) and the codes S
(out, atoms). Of a map with more inputs than outputs it is the transpose that is written so: the rows are those of the
longer side, and the dictionary spans the shorter one. The dictionary is a plain linear map inside the layer.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from compress.layers.low_rank import LowRankLinear, plain_linear
from compress.numerics.bit_masks import gathered, pack_bits, packed_width, spread


class Codes(nn.Module, ABC):
    """A linear map by sparse codes S (rows, atoms): input (..., atoms), output (..., rows); the other way if `turned`.

    bias   parameter (rows,), or None
    """

    def __init__(self, bias: Tensor | None, turned: bool) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.turned = turned

    @abstractmethod
    def matrix(self) -> Tensor:
        """The codes (rows, atoms), zeros included."""

    def forward(self, x: Tensor) -> Tensor:
        codes = self.matrix()
        return nn.functional.linear(x, codes.T if self.turned else codes, self.bias)


class LatentCodes(Codes):
    """The form that trains: full codes, of which each row's `count` largest take part.

    The gradient of a code that takes no part is that of one that does (straight through, the paper's STF): it may
    grow until it does.

    latent   parameter (rows, atoms)
    kept     buffer (rows, atoms), bool: where codes were frozen; None before
    """

    kept: Tensor | None

    def __init__(self, codes: Tensor, count: int, bias: Tensor | None, turned: bool) -> None:
        super().__init__(bias, turned)
        self.latent = nn.Parameter(codes.detach().contiguous())
        self.count = count
        self.register_buffer("kept", None, persistent=False)

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

    def matrix(self) -> Tensor:
        chosen = self.latent * self.support()
        return chosen if self.kept is not None else self.latent + (chosen - self.latent).detach()


class PackedCodes(Codes):
    """The form that is stored: the non-zeros, and a bit for each place.

    values   parameter (rows, count)
    places   buffer (rows, ceil(atoms / 8)), uint8
    """

    places: Tensor

    def __init__(self, values: Tensor, places: Tensor, atoms: int, bias: Tensor | None, turned: bool) -> None:
        super().__init__(bias, turned)
        self.values = nn.Parameter(values.detach().contiguous())
        self.register_buffer("places", places)
        self.atoms = atoms

    def matrix(self) -> Tensor:
        return spread(self.values, self.places, self.atoms)

    def extra_repr(self) -> str:
        return f"{len(self.values)} rows, {self.values.shape[1]} of {self.atoms} atoms each"


class CodedLinear(nn.Module):
    """A linear map, input (..., in) and output (..., out), by codes and a dictionary.

    Two products, or one with the product of both where that is less work. The bias is that of the last.

    codes        `Codes` (rows, atoms)
    dictionary   linear map (atoms, in), or (out, atoms) if `turned`
    """

    def __init__(self, codes: Codes, dictionary: nn.Module, apart: bool) -> None:
        super().__init__()
        self.codes = codes
        self.dictionary = dictionary
        self.apart = apart

    @property
    def weight(self) -> Tensor:
        """The product (out, in): some models look at the type of a layer's weight."""
        codes, dictionary = self.codes.matrix(), self.dictionary.weight
        return dictionary @ codes.T if self.codes.turned else codes @ dictionary

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (out,), if there is one."""
        return self.dictionary.bias if self.codes.turned else self.codes.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not self.apart:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.codes.turned:
            return self.dictionary(self.codes(x))
        return self.codes(self.dictionary(x))

    def packed(self) -> CodedLinear:
        """One with the codes as they are stored, and atoms of unit length: 1 is what a code of 1 adds to a row."""
        assert isinstance(self.codes, LatentCodes)
        turned, support = self.codes.turned, self.codes.support()
        weight = self.dictionary.get_parameter("weight").detach()
        atoms = weight.T if turned else weight
        lengths = atoms.norm(dim=1).clamp(min=torch.finfo(atoms.dtype).tiny)
        values = gathered(self.codes.latent.detach() * lengths, support)
        return packed_linear(values, pack_bits(support), atoms / lengths[:, None], self.bias, turned)


def latent_linear(codes: Tensor, count: int, atoms: Tensor, bias: Tensor | None, turned: bool) -> CodedLinear:
    """The layer that trains, from codes (rows, atoms) of which `count` a row take part and atoms (atoms, side).

    `turned`: rows are inputs, and the dictionary spans outputs.
    """
    return _assembled(LatentCodes(codes, count, None if turned else bias, turned), len(codes), atoms, bias)


def packed_linear(
    values: Tensor, places: Tensor, atoms: Tensor, bias: Tensor | None, turned: bool
) -> CodedLinear:
    """The layer that is stored, from the non-zeros (rows, count), their places as bits, and atoms (atoms, side)."""
    codes = PackedCodes(values, places, len(atoms), None if turned else bias, turned)
    return _assembled(codes, len(values), atoms, bias)


def empty_coded(like: Tensor, bias: Tensor | None, atoms: int, count: int) -> CodedLinear:
    """A layer as it is stored, with any values, for a weight like `like` (out, in)."""
    out, width = like.shape
    rows, side = max(out, width), min(out, width)
    places = torch.zeros(rows, packed_width(atoms), dtype=torch.uint8, device=like.device)
    return packed_linear(like.new_empty(rows, count), places, like.new_empty(atoms, side), bias, out < width)


def thinner(rows: int, side: int, atoms: int) -> bool:
    """Whether two products by `atoms` features are less work than one of (rows, side)."""
    return atoms * (rows + side) < rows * side


def unpacked_copy(module: nn.Module) -> nn.Module:
    """`module` if it has no packed codes, else a copy of it in which plain linear maps do the same."""
    from compress.layers.quantized import swap

    if not any(isinstance(part, PackedCodes) for part in module.modules()):
        return module
    copied = copy.deepcopy(module)
    layers = [part for part in copied.modules() if isinstance(part, CodedLinear)]
    swap(copied, {layer: _unpacked(layer).train(layer.training) for layer in layers})
    return copied


def _unpacked(layer: CodedLinear) -> nn.Module:
    if not layer.apart:
        return plain_linear(layer.weight, layer.bias)
    codes, dictionary = layer.codes.matrix(), layer.dictionary.weight
    assert isinstance(dictionary, Tensor)
    if layer.codes.turned:
        made = LowRankLinear(dictionary, codes.T, layer.bias)
        made.expand = layer.dictionary  # itself: it may be more than its weight
    else:
        made = LowRankLinear(codes, dictionary, layer.bias)
        made.reduce = layer.dictionary
    return made


def _assembled(codes: Codes, rows: int, atoms: Tensor, bias: Tensor | None) -> CodedLinear:
    size, side = atoms.shape
    dictionary = plain_linear(atoms.T, bias) if codes.turned else plain_linear(atoms, None)
    return CodedLinear(codes, dictionary, thinner(rows, side, size))
