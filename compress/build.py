"""The whole flow: a recipe becomes a compressed checkpoint, exported artifacts, and the proof beside them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import open_model, write_checkpoint
from compress.data import as_batches, batches
from compress.devices import require_device
from compress.errors import NotAccepted, RecipeError
from compress.folders import disk_errors, empty, kept_folder, partial_of
from compress.labels import labelled_batches
from compress.manifest import Manifest
from compress.mismatch import mismatches
from compress.model import Model
from compress.passes.base import Context, Pass
from compress.pipeline import Outcome, run
from compress.progress import SILENT, Observer, task
from compress.recipe import Recipe, load_recipe
from compress.report import Caution, Step
from compress.target import Artifact, Target, files_of
from compress.verdict import judge, shortfalls

if TYPE_CHECKING:
    import torch

STEPS = "steps"
"""The folder of the model after its last finished pass, within the folder of a build that is under way."""


def apply(
    model: Model,
    recipe: str | Path | Recipe | Sequence[Pass],
    *,
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    training: Iterable[Mapping[str, torch.Tensor]] | None = None,
    heldout: Iterable[Mapping[str, torch.Tensor]] | None = None,
    device: str = "cpu",
    seed: int = 0,
    observer: Observer = SILENT,
) -> Outcome:
    """Run the passes of a recipe (its name, path or value) or a list of passes over a copy of `model`.

    Data given here goes before the recipe's. Passes run on `device`, such as "cuda"; the result is where `model` is.
    With held-out data the outcome's `warnings` say whether the other data misleads. Nothing is written. Raises what the
    passes raise, `UsageError` for a device that torch does not have, `NothingToDo` for a pass that changed nothing, and
    `Unproved` for a step whose outputs are wrong.
    """
    require_device(device)
    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe)
    passes = recipe.passes if isinstance(recipe, Recipe) else tuple(recipe)
    context = replace(
        recipe_context(recipe, model) if isinstance(recipe, Recipe) else Context(),
        device=device,
        seed=seed,
        observer=observer,
    )
    given = {"calibration": calibration, "training": training, "heldout": heldout}
    given = {
        name: as_batches(data, model, labels=name == "training")
        for name, data in given.items()
        if data is not None
    }
    return _run(model, passes, replace(context, **given))


def recipe_context(recipe: Recipe, model: Model) -> Context:
    """The data and targets that a recipe names, as its passes take them."""
    calibration, training = recipe.data.source("calibration"), recipe.data.source("training")
    heldout = recipe.data.heldout
    read = labelled_batches if recipe.learns_labels else batches
    return Context(
        calibration=batches(calibration, model) if calibration else None,
        training=read(training, model) if training else None,
        heldout=batches(heldout, model) if heldout else None,
        targets=tuple(target.use for target in recipe.export),
    )


def build(
    recipe: Recipe,
    into: str | Path,
    *,
    device: str = "cpu",
    observer: Observer = SILENT,
    force: bool = False,
) -> Manifest:
    """Compress, export and prove as `recipe` says, into the new folder `into`. Passes run on `device`, such as "cuda".

    The folder holds `checkpoint/`, one folder an export, and `manifest.json`. It appears whole: until then the work
    is in `into.partial`, from whose last finished pass a later run goes on. Where a launcher has started several
    processes, this is for the main one; the others `take_part`. Raises `UsageError`, before any work, for a device
    that torch does not have, and `NotAccepted`, after the folder is in place, if a demand of the recipe's `accept` is
    not met.
    """
    require_device(device)
    into, begun = Path(into), time.perf_counter()
    with kept_folder(into, force) as partial:
        empty(partial, keep=(STEPS,))
        steps = partial / STEPS
        steps.mkdir(exist_ok=True)
        model = load_named(recipe, observer)
        for target in recipe.export:
            target.check(model)
        done, warnings, artifacts = _compress(recipe, model, partial, steps, device, observer)
        verdicts = [
            judge(recipe, target, artifact, model, partial, observer)
            for target, artifact in zip(recipe.export, artifacts, strict=True)
        ]
        manifest = Manifest(
            folder=into,
            recipe=recipe.model_dump(mode="json"),
            model=model.source,
            steps=done,
            checkpoint=files_of(partial / "checkpoint"),
            verdicts=tuple(verdicts),
            metric=recipe.data.evaluation.metric if recipe.data.evaluation else None,
            failures=shortfalls(recipe, verdicts),
            seconds=time.perf_counter() - begun,
            shape=recipe.measure.shape,
            warnings=warnings,
        )
        manifest.write(partial)
        empty(partial, keep=("checkpoint", "manifest.json", *artifact_names(recipe.export)))
    return manifest


def take_part(recipe: Recipe, into: str | Path, device: str = "cpu") -> None:
    """Run the passes of `recipe` beside the main process, which builds `into`: for a share of the training.

    Writes nothing.
    """
    require_device(device)
    model = load_named(recipe)
    context = replace(recipe_context(recipe, model), device=device)
    run(model, recipe.passes, context, store=partial_of(Path(into)) / STEPS)


def _compress(
    recipe: Recipe, model: Model, partial: Path, store: Path, device: str, observer: Observer
) -> tuple[tuple[Step, ...], tuple[Caution, ...], list[Artifact]]:
    """Write the checkpoint and the exports. The compressed model is gone from memory when this returns: what
    follows times processes that load models of their own.
    """
    context = replace(recipe_context(recipe, model), device=device, observer=observer)
    outcome = _run(model, recipe.passes, context, store)
    (partial / "checkpoint").mkdir()
    write_checkpoint(outcome.model, partial / "checkpoint")
    artifacts = [
        write(target, outcome.model, partial / name, observer)
        for name, target in zip(artifact_names(recipe.export), recipe.export, strict=True)
    ]
    return outcome.steps, outcome.warnings, artifacts


def _run(model: Model, passes: Sequence[Pass], context: Context, store: Path | None = None) -> Outcome:
    """Run the passes, and see whether their data misleads while both models are in memory."""
    outcome = run(model, passes, context, store=store)
    with task(context.observer, "compare held-out data"):
        return replace(outcome, warnings=mismatches(model, outcome.model, passes, context))


def load_named(recipe: Recipe, observer: Observer = SILENT) -> Model:
    """The model that the recipe names."""
    if recipe.model.name is None:
        raise RecipeError(
            "The recipe names no model.", "Pass --model FOLDER_OR_NAME, or set `model: {name: ...}`."
        )
    with task(observer, "load the model"):
        return open_model(recipe.model.name, recipe.model.task, dtype=recipe.model.dtype)


def write(target: Target, model: Model, into: Path, observer: Observer = SILENT) -> Artifact:
    """Write `model` with `target` into the new folder `into`."""
    into.mkdir()
    with disk_errors(into), task(observer, f"export to {target.use}"):
        return target.write(model, into, observer)


def artifact_names(targets: Sequence[Target]) -> tuple[str, ...]:
    """One folder name a target: its `use`, numbered from the second of a kind on."""
    names: list[str] = []
    for target in targets:
        count = sum(earlier.use == target.use for earlier in targets[: len(names)])
        names.append(target.use if count == 0 else f"{target.use}-{count + 1}")
    return tuple(names)


def require_accepted(manifest: Manifest) -> None:
    """Raise `NotAccepted` if a demand of the recipe's `accept` was not met."""
    if manifest.failures:
        raise NotAccepted(
            f"Everything is built in {manifest.folder}, but not accepted: {'; '.join(manifest.failures)}.",
            "Loosen `accept`, or compress less: a narrower scope, other ranges, fewer passes.",
        )
