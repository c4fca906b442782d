"""A pass taken through a stack block by block, with the weights of one block in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import processes
from compress.checkpoint import write_description
from compress.compare import parity, require_finite
from compress.frame import Entry, Frame, Part
from compress.memory import give_back
from compress.model import Model
from compress.passes.base import Context, Pass, Result
from compress.passes.blocks import Call
from compress.pipeline import applied, nothing_to_do
from compress.progress import SILENT, track
from compress.report import Change, Skip, Step
from compress.skeleton import Skeleton, hollow
from compress.stored import Shards, close_shards, stored_in

if TYPE_CHECKING:
    from torch import Tensor

    from compress.graph.structure import Stack

SHARD = 10**9
"""Bytes of tensors around the stack that are written to one file, if one tensor is not larger."""


@dataclass(frozen=True)
class _Done:
    """What the pass did to the block number `place`."""

    place: int
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    record: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run works on, and with: the model twice, without weights and as a value with a graph; the stack; the pass;
    and the folder to write to, which exists.
    """

    skeleton: Skeleton
    model: Model
    stack: Stack
    settings: Pass
    context: Context
    into: Path

    @property
    def frame(self) -> Frame:
        return Frame(self.skeleton, self.stack)


def run_blocks(run: Run, data: Sequence[Mapping[str, Tensor]]) -> Step:
    """Apply the pass of `run` to every block, calibrated on `data`, and write the checkpoint.

    Of several processes all must call it: each compresses and writes its share of the blocks, the main one the rest.
    """
    begun = time.perf_counter()
    shards = Shards(run.into, processes.rank())
    # The example goes along as the last batch, which no pass sees.
    entries = run.frame.entries([*data, run.model.example])
    last, own = _compressed(run, data, entries, shards)
    done = sorted((one for some in processes.gathered(own) for one in some), key=lambda one: one.place)
    result = _joined(run, done)
    if not result.changes and not run.settings.allow_empty:
        raise nothing_to_do(run.settings, result)
    step = None
    if processes.is_main():
        _copy_rest(run, shards)
    written = processes.gathered(shards.written)
    if processes.is_main():
        close_shards(run.into, {name: file for one in written for name, file in one.items()})
        _restore_others(run, done, own)
        step = _proved(run, result, last, time.perf_counter() - begun)
        _describe(run, step)
    step = processes.shared(step)
    assert step is not None, "the main process made it"
    return step


def _compressed(
    run: Run, data: Sequence[Mapping[str, Tensor]], entries: Sequence[Entry], shards: Shards
) -> tuple[Tensor, list[_Done]]:
    """Go through the blocks, and compress and write every one that is this process's. Returns the hidden states that
    the original model has behind the last block for the example, and what was done.
    """
    hidden, done = [entry.hidden for entry in entries], []
    for place, path in enumerate(
        track(run.context.observer, f"stream: {run.settings.use}", run.stack.blocks)
    ):
        run.skeleton.fill(path)
        part = _part(run, path)
        calls = [entry.calls[place] for entry in entries]
        given = [
            {**batch, "hidden": one, "call": call}
            for batch, one, call in zip(data, hidden, calls, strict=False)
        ]
        behind = _behind(part, hidden, calls, run.context.device)
        if place % processes.count() == processes.rank():
            context = replace(run.context, calibration=given or None, observer=SILENT)
            result = applied(run.settings, part, context)
            shards.write(_tensors(run, path))
            done.append(_Done(place, result.changes, result.skips, result.record))
        run.skeleton.empty(path)
        hidden = behind
        give_back()
    return hidden[-1], done


def _part(run: Run, path: str) -> Model:
    """The block at `path` as a model of its own, with what is known of the structure of the whole."""
    block = run.skeleton.module.get_submodule(path)
    part = Model(Part(block, path), {}, run.model.task, source=run.model.source)
    vars(part)["graph"] = run.model.graph.within(path)
    return part


def _behind(part: Model, hidden: Sequence[Tensor], calls: Sequence[Call], device: str) -> list[Tensor]:
    """The hidden states behind the block of `part`."""
    import torch

    with torch.no_grad(), part.on(device) as there:
        return [
            there.module(hidden=one.to(device), call=call).to(one.device)
            for one, call in zip(hidden, calls, strict=True)
        ]


def _tensors(run: Run, path: str) -> dict[str, Tensor]:
    """The tensors of the compressed block at `path`, in the types of the files.

    New ones, such as factors, have the type of the first matrix that the block had.
    """
    kinds, block = run.skeleton.kinds(path), run.skeleton.module.get_submodule(path)
    usual = next(iter(kinds.values()), None)
    named = {f"{path}.{name}": value for name, value in block.state_dict().items()}
    return {
        name: (value.to(kinds.get(name, usual)) if value.is_floating_point() else value).contiguous()
        for name, value in named.items()
        if name not in run.skeleton.aliases
    }


def _joined(run: Run, done: Sequence[_Done]) -> Result:
    """What was done to all blocks, and what in scope is in none of them."""
    inside = [f"{path}." for path in run.stack.blocks]
    outside = [
        Skip(weight.path, "is outside the stack of blocks, which a streamed run leaves as it is")
        for weight in run.model.graph.weights
        if weight.path in run.settings.scope and not weight.path.startswith(tuple(inside))
    ]
    return Result(
        run.skeleton.module,
        tuple(change for one in done for change in one.changes),
        (*outside, *(skip for one in done for skip in one.skips)),
        run.settings.joined([one.record for one in done]),
    )


def _copy_rest(run: Run, shards: Shards) -> None:
    """Write the tensors that are in no block, as the files have them."""
    skeleton, state = run.skeleton, run.skeleton.module.state_dict()
    inside = tuple(f"{path}." for path in run.stack.blocks)
    batch: dict[str, Tensor] = {}
    for name in state:
        if name in skeleton.aliases or name.startswith(inside):
            continue
        kept = skeleton.names.get(name)
        value = state[name] if kept is None else skeleton.stored.read([kept])[kept]
        if batch and sum(one.nbytes for one in batch.values()) + value.nbytes > SHARD:
            shards.write(batch)
            batch = {}
        batch[name] = value.contiguous()
    if batch:
        shards.write(batch)


def _restore_others(run: Run, done: Sequence[_Done], own: Sequence[_Done]) -> None:
    """Give the blocks that other processes compressed the structure that they have now."""
    mine = {one.place for one in own}
    for one in done:
        if one.place not in mine:
            run.settings.restore(run.skeleton.module, one.record)
    hollow(run.skeleton.module)


def _proved(run: Run, result: Result, last: Tensor, seconds: float) -> Step:
    """The step, proved on the example: what was written is read back, and run part by part.

    `last` are the hidden states behind the last block of the original model.
    """
    made, what = _written(run), f"model after `{run.settings.use}`"
    reference = run.frame.outputs(run.model.example, last)
    outputs = _outputs(made, run.stack, run.model.example)
    found = parity(reference, outputs, what)
    require_finite(outputs, what)
    return Step(
        name=run.settings.use,
        settings=run.settings.model_dump(mode="json"),
        effect=run.settings.effect,
        changes=result.changes,
        skips=result.skips,
        record=result.record,
        parity=found,
        bytes_before=run.skeleton.bytes,
        bytes_after=made.bytes,
        seconds=seconds,
    )


def _written(run: Run) -> Skeleton:
    """The model that was written, without its weights."""
    other = run.skeleton.aliases
    names = {name: other.get(name, name) for name in run.skeleton.module.state_dict()}
    return replace(run.skeleton, stored=stored_in(run.into), names=names)


def _outputs(skeleton: Skeleton, stack: Stack, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float outputs of a model for one batch, with one block in memory at a time."""
    import torch

    frame = Frame(skeleton, stack)
    (entry,) = frame.entries([batch])
    hidden = entry.hidden
    for path, call in zip(stack.blocks, entry.calls, strict=True):
        skeleton.fill(path)
        with torch.no_grad():
            hidden = call.run(skeleton.module.get_submodule(path), hidden)
        skeleton.empty(path)
    return frame.outputs(batch, hidden)


def _describe(run: Run, step: Step) -> None:
    """Write the files beside the weights; the config says the type that most of these have."""
    module: Any = run.skeleton.module
    kinds = run.skeleton.kinds(run.stack.blocks[-1])
    if kinds:
        module.config.dtype = next(iter(kinds.values()))
    write_description(replace(run.model, history=(step,)), run.into, run.skeleton.aliases)
