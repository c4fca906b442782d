"""The blocks of a stack, run one by one on what the model gave them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.calls import Slot, given, placed, states, with_states
from compress.configs import using_cache
from compress.errors import Unsuitable
from compress.graph.structure import Stack
from compress.passes.calibration import Enough, run_batch
from compress.scope import Scope

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from compress.model import Model


@dataclass(frozen=True)
class Call:
    """How the model called one block on one batch: its arguments, and where the hidden states are among them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: Slot

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the block was given, (batch, ...)."""
        return given(self.slot, self.args, self.kwargs)

    def bare(self) -> Call:
        """The same without the hidden states, to be kept for later."""
        return Call(*placed(self.slot, self.args, self.kwargs, None), self.slot)

    def on(self, device: torch.device) -> Call:
        """The same with all its tensors on `device`."""
        import torch
        from torch.utils import _pytree as pytree

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(move, (self.args, self.kwargs))
        return Call(args, kwargs, self.slot)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What `block` makes of `hidden` with the other arguments of this call."""
        args, kwargs = placed(self.slot, self.args, self.kwargs, hidden)
        return states(block(*args, **kwargs))


@dataclass(frozen=True)
class Run:
    """One batch through a stack: the call of each block, and the hidden states behind the last."""

    calls: tuple[Call, ...]
    last: Tensor

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        """The hidden states before each block, and behind the last one."""
        return (*(call.hidden for call in self.calls), self.last)


def chosen_stack(
    model: Model, scope: Scope, what: str, suits: Callable[[Stack], bool] = lambda _: True
) -> Stack:
    """The stack whose blocks are in `scope`, and which `suits`. Raises `Unsuitable` if there is none, or several."""
    stacks = [
        stack
        for stack in model.graph.stacks
        if suits(stack) and any(block in scope for block in stack.blocks)
    ]
    # A stack inside a block of another one (a run of equal convolutions) goes with its block.
    outer = [
        stack
        for stack in stacks
        if not any(f"{stack.path}.".startswith(f"{block}.") for one in stacks for block in one.blocks)
    ]
    if not outer:
        raise Unsuitable(
            f"{what} found no stack of repeated blocks in scope that it could work on.",
            "`modelpress inspect MODEL` shows the stacks; widen the scope.",
        )
    if len(outer) > 1:
        names = ", ".join(f"`{stack.path}` ({len(stack.blocks)} blocks)" for stack in outer)
        raise Unsuitable(
            f"{what} works on one stack of blocks, and there are {len(outer)}: {names}.",
            f'Choose one: `scope: {{include: ["{outer[0].path}.*"]}}`.',
        )
    return outer[0]


def attends(model: Model) -> Callable[[Stack], bool]:
    """Whether each block of a stack has an attention."""
    paths = [f"{one.path}." for one in model.graph.attentions]
    return lambda stack: all(any(path.startswith(f"{block}.") for path in paths) for block in stack.blocks)


def run_stack(module: nn.Module, blocks: Sequence[str], batch: Mapping[str, Tensor], number: int) -> Run:
    """Run batch `number` through `module` up to the last of `blocks`, neighbours in a stack, and keep what they saw.

    The module must be in evaluation mode; no cache is used. Raises `Unsuitable` if a block does not take what the
    block before it gives.
    """
    import torch

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    made: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        made.append(states(output))
        if len(made) == len(blocks):
            raise Enough

    with ExitStack() as hooks:
        for layer in map(module.get_submodule, blocks):
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(after).remove)
        hooks.enter_context(using_cache(module, False))
        with torch.no_grad(), suppress(Enough):
            run_batch(module, without_cache(module, batch), number)
    slots = {
        slot_of(*call, hidden, path)
        for hidden, call, path in zip(made[:-1], calls[1:], blocks[1:], strict=True)
    }
    if len(slots) != 1:
        raise Unsuitable(
            f"The blocks take their input in different places: {', '.join(sorted(map(str, slots)))}.",
            "Blocks that are called in different ways cannot be run one by one: leave the pass out.",
        )
    slot = slots.pop()
    return Run(tuple(Call(args, kwargs, slot) for args, kwargs in calls), made[-1])


def without_cache(module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments `batch` for `module`, and that it use no cache, if it takes that as one."""
    takes = "use_cache" in inspect.signature(module.forward).parameters
    return {**batch, **({"use_cache": False} if takes else {})}


def slot_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor, path: str) -> Slot:
    """Where `hidden`, that the block before made, is among the arguments of the block at `path`.

    Raises `Unsuitable` if it is not among them.
    """
    for place, value in [*enumerate(args), *kwargs.items()]:
        if value is hidden:
            return place
    raise Unsuitable(
        f"The block `{path}` does not take what the block before it gives as it is.",
        "Blocks between which the model computes something cannot be run one by one: leave the pass out.",
    )


@contextmanager
def passed_over(block: nn.Module, call: Call) -> Iterator[None]:
    """Let `block` return its hidden states unchanged inside the block, in the form of its own output."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_states(output, given(call.slot, args, kwargs))

    handle = block.register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
