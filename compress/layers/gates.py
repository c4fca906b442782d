"""Gated attention: each head's mixture of values times a gate that is computed from what the attention reads.

Bondarenko et al. 2023, "Quantizable Transformers", arXiv 2306.12929: a head that wants to add nothing can close its
gate, and need not push its probabilities to one for that, which is where outliers come from.

No forward is copied: the gate listens to the map of the queries in a hook, and multiplies what the output map reads in
another. `compress.layers.quantized.swap` carries hooks over to what takes a map's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.layers.linear import matrix

GateKind = Literal["linear", "mlp", "all"]


class OutputGate(nn.Module):
    """Gives sigmoid(g(x)) for each head, times `scale`: (..., features) to (..., heads).

    maps    g: one `nn.Linear` (heads, features), or two with a ReLU between. Of `linear` and `mlp` they are block
            diagonal: the gate of a head reads the head's share of the features alone.
    scale   a factor for training; `fold` moves it into the output map

    The last map begins with zero weights and the bias at which the sigmoid is 1 / `scale`, so that the gate is one.
    """

    def __init__(self, kind: GateKind, features: int, heads: int, scale: float = 1.0) -> None:
        super().__init__()
        self.kind: GateKind = kind
        self.heads = heads
        self.scale = scale
        widths = [features, heads]
        if kind == "mlp":
            widths.insert(1, heads * max(1, features // heads // 4))
        first, *rest = (nn.Linear(one, other) for one, other in pairwise(widths))
        self.maps = nn.Sequential(first, *(part for one in rest for part in (nn.ReLU(), one)))
        self.read: Tensor | None = None

    def reset(self, generator: torch.Generator) -> None:
        """Begin as a gate that is one."""
        first, last = self.maps[0], self.maps[-1]
        with torch.no_grad():
            for weight, mask in self._masks():
                values = (
                    torch.randn(weight.shape, generator=generator) * (self.heads / weight.shape[1]) ** 0.5
                )
                weight.copy_(values.to(weight) * mask)
            first.bias.zero_()
            last.weight.zero_()
            last.bias.fill_(-math.log(self.scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        opened = self.maps(x).sigmoid()
        return opened if self.scale == 1 else opened * self.scale

    def listen(self, query: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook before the map of the queries."""
        del query
        self.read = args[0]

    def close(self, output: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook before the output map, which reads the mixture (..., heads * size), head after head."""
        del output
        assert self.read is not None, "the output map of an attention has run before its map of the queries"
        gates, self.read = self(self.read), None
        mixture = args[0]
        return ((mixture.unflatten(-1, (self.heads, -1)) * gates[..., None]).flatten(-2), *args[1:])

    def fold(self, output: nn.Module) -> None:
        """Move the scale into the weight of the output map, in place."""
        matrix(output).mul_(self.scale)
        self.scale = 1.0

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        """Inside the block, what is zero because heads are apart gets no gradient."""
        with ExitStack() as hooks:
            for weight, mask in self._masks():
                hooks.callback(weight.register_hook(_masked(mask)).remove)
            yield

    def _masks(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The weights of block-diagonal maps, and ones where they may be other than zero."""
        if self.kind == "all":
            return []
        weights = [part.weight for part in self.maps if isinstance(part, nn.Linear)]
        return [(weight, _blocks(weight, self.heads)) for weight in weights]


def install_gate(module: nn.Module, holder: str, query: str, output: str, gate: OutputGate) -> None:
    """Put `gate` into the module at `holder`, in place, between the maps at `query` and `output`."""
    module.get_submodule(holder).output_gate = gate
    module.get_submodule(query).register_forward_pre_hook(gate.listen)
    module.get_submodule(output).register_forward_pre_hook(gate.close)


def is_gated(module: nn.Module) -> bool:
    """Whether an attention inside `module` has a gate."""
    return any(isinstance(part, OutputGate) for part in module.modules())


def _blocks(weight: Tensor, heads: int) -> Tensor:
    """Ones in `heads` equal blocks on the diagonal of a matrix of the shape of `weight`."""
    rows, columns = weight.shape
    block = weight.new_ones(rows // heads, columns // heads)
    return torch.block_diag(*[block] * heads)


def _masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask.to(gradient.device)
