"""How a block is called: where its hidden states are, among its arguments and in what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Slot = int | str
"""Where a block takes its hidden states: the number of a positional argument, or the name of a keyword."""


def given(slot: Slot, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states among the arguments of a block."""
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def placed(
    slot: Slot, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with other hidden states."""
    if isinstance(slot, int):
        return (*args[:slot], hidden, *args[slot + 1 :]), dict(kwargs)
    return args, {**kwargs, slot: hidden}


def states(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of several values."""
    return output[0] if isinstance(output, tuple | list) else output


def with_states(output: Any, hidden: Tensor) -> Any:
    """What a block returns, with other hidden states in it."""
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden
