"""Pieces of a model whose tokens are reduced: one block, one reduction, and one that costs nothing."""

from __future__ import annotations

from torch import Tensor, nn

import compress
from compress.layers.tokens import TokenFlow, TokenReducer


class Block(nn.Module):
    """One block of a model, on its own."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        self.block = module.get_submodule(path)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block(hidden)


class Reduction(nn.Module):
    """The first reduction of a model on its own, but of tokens that were merged before: all operations that it adds.

    What it does in the attention before it is included; queries and keys are the states here, as their numbers make no
    difference to the time. Gives the states, the sizes, and their terms for the attentions behind it.
    """

    def __init__(self, flow: TokenFlow, heads: int, width: int) -> None:
        super().__init__()
        self.flow = flow
        self.heads = heads
        self.width = width

    def forward(self, hidden: Tensor, size: Tensor) -> tuple[Tensor | None, ...]:
        """`hidden` (batch, tokens, width); `size` (batch, tokens), how many each stands for."""
        flow, count = self.flow, self.flow.layout.count
        wanted = count, self.width
        if hidden.shape[1:] != wanted or size.shape[1] != count:  # so a trace takes the numbers as fixed
            raise ValueError(
                f"States are {tuple(hidden.shape[1:])}, with {size.shape[1]} sizes, not {wanted}."
            )
        flow.count, flow.wants, flow.size = count, True, size
        seen = hidden.unflatten(2, (self.heads, -1)).transpose(1, 2)
        flow.attend(seen, seen, seen, None, seen.shape[-1] ** -0.5)
        reduced = flow.reduce(hidden, fewer(flow), 1)
        given = reduced, flow.size, flow.bias
        flow.clear()
        return given


def flow_of(model: compress.Model) -> TokenFlow:
    """What the reducers of `model` share."""
    return next(part.flow for part in model.module.modules() if isinstance(part, TokenReducer))


def fewer(flow: TokenFlow) -> int:
    """How many tokens the first reduction leaves."""
    return next(left for left in flow.layout.left if left < flow.layout.count)


def cut_off(model: compress.Model) -> compress.Model:
    """`model`, whose reducers from now on only cut off the last tokens: as many as they reduced, and for no work."""

    def reduce(hidden: Tensor, left: int, number: int) -> Tensor:
        del number
        return hidden[:, :left]

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        del value, scaling
        return None if mask is None else mask[..., : query.shape[2], : key.shape[2]]

    flow = flow_of(model)
    flow.reduce, flow.attend = reduce, attend
    return model
