"""A model around a stack of blocks, run without the weights of the blocks: what it gives each of them, and what it
makes of what the last one gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.calls import states, with_states
from compress.configs import using_cache
from compress.outputs import flatten_outputs
from compress.passes.blocks import Call, slot_of, without_cache
from compress.passes.calibration import Enough, run_batch
from compress.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import Tensor

    from compress.graph.structure import Stack

Stub = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""What stands in for the forward of a block: given its number in the stack and its arguments."""


@dataclass(frozen=True)
class Entry:
    """How one batch enters a stack: the call of each block without the hidden states, and those before the first."""

    calls: tuple[Call, ...]
    hidden: Tensor


@dataclass(frozen=True)
class Frame:
    """`skeleton` around the blocks of `stack`. Of these only the first is ever run."""

    skeleton: Skeleton
    stack: Stack

    def entries(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Entry]:
        """How each batch enters the stack. Raises `Unsuitable` if a block does not take what the one before gives."""
        with self._filled([*self._around, self.stack.blocks[0]], keep=True):
            return [self._entry(batch, number) for number, batch in enumerate(batches, start=1)]

    def outputs(self, batch: Mapping[str, Tensor], last: Tensor) -> dict[str, Tensor]:
        """The float outputs of the model for `batch`, if its last block gives the hidden states `last`.

        The first block runs on what it holds: only the form of its output counts.
        """
        made: list[Any] = []

        def stub(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            del args, kwargs
            return with_states(made[0], last) if number == len(self.stack.blocks) - 1 else made[0]

        with self._filled(self._around, keep=False), self._stubs(stub, made):
            return flatten_outputs(self._run(batch, 1))

    def _entry(self, batch: Mapping[str, Tensor], number: int) -> Entry:
        made: list[Any] = []
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stub(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen.append((args, kwargs))
            if place == len(self.stack.blocks) - 1:
                raise Enough
            return made[0]

        with self._stubs(stub, made, seen), suppress(Enough):
            self._run(batch, number)
        hidden = states(made[0])
        slots = [
            slot_of(*call, hidden, path) for call, path in zip(seen[1:], self.stack.blocks[1:], strict=True)
        ]
        calls = [Call(*call, slot) for call, slot in zip(seen, [slots[0], *slots], strict=True)]
        return Entry(tuple(call.bare() for call in calls), calls[0].hidden)

    def _run(self, batch: Mapping[str, Tensor], number: int) -> Any:
        import torch

        module = self.skeleton.module
        with torch.no_grad(), using_cache(module, False):
            return run_batch(module, without_cache(module, batch), number)

    @contextmanager
    def _stubs(
        self, stub: Stub, made: list[Any], seen: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    ) -> Iterator[None]:
        """Let `stub` stand in for all blocks but the first, whose output goes to `made` and whose call to `seen`."""
        first, *others = map(self.skeleton.module.get_submodule, self.stack.blocks)

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            made.append(output)
            if seen is not None:
                seen.append((args, kwargs))

        def forward(number: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stub(number, args, kwargs)

        with ExitStack() as undo:
            undo.callback(first.register_forward_hook(after, with_kwargs=True).remove)
            for number, block in enumerate(others, start=1):
                # The block itself stays in its place: models read attributes of their blocks.
                vars(block)["forward"] = forward(number)
                undo.callback(vars(block).pop, "forward")
            yield

    @contextmanager
    def _filled(self, parts: Sequence[str], keep: bool) -> Iterator[None]:
        """Fill each of `parts` when it is entered; give it back when it is left, or at the end if `keep`."""
        with ExitStack() as undo:
            for path in self._holders:
                self.skeleton.fill(path, recurse=False)
                undo.callback(self.skeleton.empty, path, recurse=False)
            for path in parts:
                undo.callback(self.skeleton.empty, path)
                part = self.skeleton.module.get_submodule(path)
                undo.callback(part.register_forward_pre_hook(self._filling(path, once=keep)).remove)
                if not keep:
                    undo.callback(part.register_forward_hook(self._emptying(path)).remove)
            yield

    @property
    def _holders(self) -> list[str]:
        """The modules that the blocks are in; they may have tensors of their own."""
        pieces = [path.split(".") for path in self.stack.blocks]
        return sorted({".".join(one[:end]) for one in pieces for end in range(len(one))})

    @property
    def _around(self) -> list[str]:
        """The modules that hold no block, as large as can be."""
        holders = set(self._holders)
        apart = {*holders, *self.stack.blocks}
        named = [path for path, _ in self.skeleton.module.named_modules() if path not in apart]
        return [path for path in named if path.rpartition(".")[0] in holders]

    def _filling(self, path: str, once: bool) -> Callable[..., None]:
        filled: list[str] = []

        def fill(*_: Any) -> None:
            if not (once and filled):
                filled.append(path)
                self.skeleton.fill(path)

        return fill

    def _emptying(self, path: str) -> Callable[..., None]:
        return lambda *_: self.skeleton.empty(path)


class Part(nn.Module):
    """One block of a model as a module of its own, at the path that it has in the model.

    Its forward takes the hidden states before the block and the `Call` of the block, and whatever else the model's
    batch holds: padding is told by that.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__()
        self.path = path
        *around, leaf = path.split(".")
        holder: nn.Module = self
        for name in around:
            inner = nn.Module()
            holder.add_module(name, inner)
            holder = inner
        holder.add_module(leaf, block)
        self.eval()

    def forward(self, hidden: Tensor, call: Call, **batch: Any) -> Tensor:
        """The hidden states behind the block."""
        del batch
        return call.on(hidden.device).run(self.get_submodule(self.path), hidden)
