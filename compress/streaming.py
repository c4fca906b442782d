"""A pass over a model too large for memory: block by block, with weights streamed from safetensors files and back.

Each block is read, calibrated on what the blocks before it give in the original model, compressed alone, written, and
let go of. Memory holds one block, what the pass makes of it, and the hidden states of the calibration data. Of several
processes each compresses its share of the blocks. What stands around the stack is copied from file to file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress import processes
from compress.data import Source, as_batches
from compress.data import batches as read_batches
from compress.devices import require_device
from compress.errors import RecipeError
from compress.folders import new_folder, partial_of
from compress.model import Model, load_processor, task_of
from compress.passes.base import Context, Pass
from compress.progress import SILENT, Observer
from compress.recipe import Recipe, load_recipe
from compress.report import Step
from compress.scope import Scope

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.graph.structure import Stack
    from compress.skeleton import Skeleton


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
    from compress.blockwise import Run, run_blocks

    with _output(Path(out), force) as partial:
        return run_blocks(Run(skeleton, model, stack, settings, context, partial), data)


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
