"""A pass over a model too large for memory: block by block, with weights streamed from safetensors files and back.

Each block is read, calibrated on what the blocks before it give in the original model, compressed alone, written, and
let go of. Memory holds one block, what the pass makes of it, and the hidden states of the calibration data. Of several
processes each compresses its share of the blocks. What stands around the stack is copied from file to file.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import processes
from compress.checkpoint import write_description
from compress.compare import parity, require_finite
from compress.data import Source, as_batches
from compress.data import batches as read_batches
from compress.devices import require_device
from compress.errors import RecipeError
from compress.folders import new_folder, partial_of
from compress.model import Model, load_processor, task_of
from compress.passes.base import Context, Pass, Result
from compress.pipeline import applied, nothing_to_do
from compress.progress import SILENT, Observer, track
from compress.recipe import Recipe, load_recipe
from compress.report import Change, Skip, Step
from compress.scope import Scope
from compress.stored import Shards, close_shards, stored_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.frame import Entry, Frame
    from compress.graph.structure import Stack
    from compress.skeleton import Skeleton

SHARD = 10**9
"""Bytes of tensors around the stack that are written to one file, if one tensor is not larger."""


@dataclass(frozen=True)
class _Done:
    """What the pass did to the block number `place`."""

    place: int
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    record: dict[str, Any]


def stream(
    folder: str | Path,
    recipe: str | Path | Recipe | Pass,
    out: str | Path,
    *,
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    task: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    force: bool = False,
    observer: Observer = SILENT,
) -> Step:
    """Apply one pass to the model in `folder`, block by block, and write the checkpoint `out`, which `load` reads.

    The pass is given itself, or in a recipe that has one pass and no export. It computes in float32, on `device`, and
    its result is stored in the types that the files have. Each block is calibrated on what the original model gives it.
    Under a launcher of several processes (`torchrun`) all must call this, and share the blocks.

    Raises `Unsuitable` for a pass that needs more than a block and its inputs, or a model without one stack of blocks
    in scope; `ModelError` for files that are missing or broken; `OutputError` if `out` is taken and not `force`;
    `NothingToDo` for a pass that changed nothing, and what the pass raises. A run that fails leaves no output.
    """
    require_device(device)
    settings, task, source = _asked(recipe, task)
    settings.require_local()
    skeleton, model = _opened(folder, task)
    stack = _stack(model, settings)
    data = _data(calibration, source, model)
    context = Context(device=processes.own_device(device), seed=seed, observer=observer)
    with _output(Path(out), force) as partial:
        return _streamed(_Run(skeleton, model, stack, settings, context, partial), data)


@dataclass(frozen=True)
class _Run:
    """All that stays the same during a run."""

    skeleton: Skeleton
    model: Model
    stack: Stack
    settings: Pass
    context: Context
    into: Path

    @property
    def frame(self) -> Frame:
        from compress.frame import Frame

        return Frame(self.skeleton, self.stack)


def _streamed(run: _Run, data: Sequence[Mapping[str, Tensor]]) -> Step:
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
    run: _Run, data: Sequence[Mapping[str, Tensor]], entries: Sequence[Entry], shards: Shards
) -> tuple[Tensor, list[_Done]]:
    """Go through the blocks, and compress and write every one that is this process's. Returns the hidden states that
    the original model has behind the last block for the example, and what was done.
    """
    from compress.memory import give_back

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


def _part(run: _Run, path: str) -> Model:
    """The block at `path` as a model of its own, with what is known of the structure of the whole."""
    from compress.frame import Part

    block = run.skeleton.module.get_submodule(path)
    part = Model(Part(block, path), {}, run.model.task, source=run.model.source)
    vars(part)["graph"] = run.model.graph.within(path)
    return part


def _behind(part: Model, hidden: Sequence[Tensor], calls: Sequence[Any], device: str) -> list[Tensor]:
    """The hidden states behind the block of `part`."""
    import torch

    with torch.no_grad(), part.on(device) as there:
        return [
            there.module(hidden=one.to(device), call=call).to(one.device)
            for one, call in zip(hidden, calls, strict=True)
        ]


def _tensors(run: _Run, path: str) -> dict[str, Tensor]:
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


def _joined(run: _Run, done: Sequence[_Done]) -> Result:
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


def _copy_rest(run: _Run, shards: Shards) -> None:
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


def _restore_others(run: _Run, done: Sequence[_Done], own: Sequence[_Done]) -> None:
    """Give the blocks that other processes compressed the structure that they have now."""
    from compress.skeleton import hollow

    mine = {one.place for one in own}
    for one in done:
        if one.place not in mine:
            run.settings.restore(run.skeleton.module, one.record)
    hollow(run.skeleton.module)


def _proved(run: _Run, result: Result, last: Tensor, seconds: float) -> Step:
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


def _written(run: _Run) -> Skeleton:
    """The model that was written, without its weights."""
    other = run.skeleton.aliases
    names = {name: other.get(name, name) for name in run.skeleton.module.state_dict()}
    return replace(run.skeleton, stored=stored_in(run.into), names=names)


def _outputs(skeleton: Skeleton, stack: Stack, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float outputs of a model for one batch, with one block in memory at a time."""
    import torch

    from compress.frame import Frame

    frame = Frame(skeleton, stack)
    (entry,) = frame.entries([batch])
    hidden = entry.hidden
    for path, call in zip(stack.blocks, entry.calls, strict=True):
        skeleton.fill(path)
        with torch.no_grad():
            hidden = call.run(skeleton.module.get_submodule(path), hidden)
        skeleton.empty(path)
    return frame.outputs(batch, hidden)


def _describe(run: _Run, step: Step) -> None:
    """Write the files beside the weights; the config says the type that most of these have."""
    module: Any = run.skeleton.module
    kinds = run.skeleton.kinds(run.stack.blocks[-1])
    if kinds:
        module.config.dtype = next(iter(kinds.values()))
    write_description(replace(run.model, history=(step,)), run.into, run.skeleton.aliases)


# What was asked for.


def _asked(recipe: str | Path | Recipe | Pass, task: str | None) -> tuple[Pass, str | None, Source | None]:
    """The one pass, the task, and where the calibration data comes from, if a recipe says so."""
    if isinstance(recipe, Pass):
        return recipe, task, None
    found = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    more = {
        f"has {len(found.passes)} passes": len(found.passes) != 1,
        "exports": bool(found.export),
        f"sets `dtype: {found.model.dtype}`": found.model.dtype != "float32",
    }
    if said := [what for what, holds in more.items() if holds]:
        raise RecipeError(
            f"A streamed run applies one pass and writes a checkpoint, and this recipe {' and '.join(said)}.",
            "Leave that out; `modelpress export` takes the checkpoint, where memory allows. Weights are computed with "
            "in float32 and written in the types that the files have.",
        )
    return found.passes[0], task or found.model.task, found.data.source("calibration")


def _opened(folder: str | Path, task: str | None) -> tuple[Skeleton, Model]:
    """The model without its weights, and the same as a value with a graph."""
    from compress.example import example_inputs
    from compress.skeleton import open_skeleton

    skeleton = open_skeleton(folder, task)
    processor = load_processor(str(folder), False)
    example = example_inputs(skeleton.module, processor)
    task = task or task_of(skeleton.module)
    return skeleton, Model(skeleton.module, example, task, source=str(folder), processor=processor)


def _stack(model: Model, settings: Pass) -> Stack:
    """The one stack with weights in the scope of the pass. Traces the model, which must still be as it was opened."""
    from compress.passes.blocks import chosen_stack

    settings.scope.require_matches(path for path, _ in model.module.named_modules() if path)
    settings.check(model)
    paths = [weight.path for weight in model.graph.weights if weight.path in settings.scope]

    def suits(stack: Stack) -> bool:
        return any(path.startswith(f"{block}.") for path in paths for block in stack.blocks)

    return chosen_stack(model, Scope(), "A streamed run", suits)


def _data(
    calibration: Iterable[Mapping[str, Tensor]] | None, source: Source | None, model: Model
) -> list[Mapping[str, Tensor]]:
    """The calibration batches, those that are given before those of a recipe."""
    if calibration is not None:
        return list(as_batches(calibration, model))
    return list(read_batches(source, model)) if source else []


@contextmanager
def _output(out: Path, force: bool) -> Iterator[Path]:
    """The folder to write to, which becomes `out` when all processes have left the block, or is removed."""
    if processes.is_main():
        with new_folder(out, force) as partial:
            processes.shared(None)
            yield partial
    else:
        processes.shared(None)
        yield partial_of(out)
    processes.shared(None)
