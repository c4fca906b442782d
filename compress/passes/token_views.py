"""Which positions of a stack are read behind each of its blocks, and which are the same for every input.

Found by trial on the model's example: positions are filled with noise where only those can see it who look at the
states between blocks, and whoever answers otherwise has looked. So no list of class tokens, registers, poolers or
feature taps is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calls import placed, states, with_states
from compress.outputs import forward
from compress.passes.blocks import Call, Run, run_stack

MOST_PROTECTED = 8
"""More leading tokens than this are no class token and registers."""


@dataclass(frozen=True)
class Views:
    """`protected`: so many leading tokens are special. `restored`: behind which blocks other positions are read."""

    protected: int
    restored: tuple[bool, ...]


def find_views(module: nn.Module, blocks: Sequence[str], example: Mapping[str, Tensor], run: Run) -> Views:
    """What reads the states of `blocks`, a stack whose `run` on `example` is given."""
    special = unchanging(module, blocks, example, run)
    wanted = forward(module, example)

    def is_read(number: int, protected: int) -> bool:
        return not _equal(_answer(module, blocks, number, protected, example, run), wanted)

    last = len(blocks) - 1
    # A classifier that reads one token of a text makes that token special, although it differs from text to text.
    choices = [count for count in range(special, MOST_PROTECTED + 1) if count < run.last.shape[1]]
    alone = next((count for count in choices if not is_read(last, count)), None)
    protected = special if alone is None else alone
    return Views(protected, tuple(is_read(number, protected) for number in range(len(blocks))))


def unchanging(module: nn.Module, blocks: Sequence[str], example: Mapping[str, Tensor], run: Run) -> int:
    """How many leading tokens of the stack's input are the same for another input."""
    other = run_stack(module, blocks, {name: _another(value) for name, value in example.items()}, 1)
    same = (run.hidden[0] == other.hidden[0]).all(-1).all(0)
    return int(same.int().cumprod(0).sum())


def _another(value: Tensor) -> Tensor:
    """Another input of the same kind: other floats, tokens in reverse order; masks stay."""
    if value.is_floating_point():
        return value.flip(0) * 0.5 + 0.1
    return value.flip(1) if value.dim() == 2 and value.max() > 1 else value


def _answer(
    module: nn.Module,
    blocks: Sequence[str],
    number: int,
    protected: int,
    example: Mapping[str, Tensor],
    run: Run,
) -> dict[str, Tensor]:
    """What the model gives if all but the next block see noise behind block `number`, protected positions aside."""
    true: list[Tensor] = []

    def spoil(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = states(output)
        true.append(hidden)
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(hidden.shape, generator=generator).to(hidden) * hidden.std()
        return with_states(output, torch.cat([hidden[:, :protected], noise[:, protected:]], 1))

    with ExitStack() as hooks:
        layer = module.get_submodule(blocks[number])
        # Before the hooks that record hidden states, which are among those who may look.
        hooks.callback(layer.register_forward_hook(spoil, prepend=True).remove)
        if number + 1 < len(blocks):
            following = module.get_submodule(blocks[number + 1])
            mend = _mender(run.calls[number + 1], true)
            hooks.callback(following.register_forward_pre_hook(mend, with_kwargs=True).remove)
        return forward(module, example)


def _mender(call: Call, true: list[Tensor]) -> Callable[..., Any]:
    """A hook that gives the next block the true states."""

    def mend(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return placed(call.slot, args, kwargs, true[-1])

    return mend


def _equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in wanted)
