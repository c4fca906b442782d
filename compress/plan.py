"""A dry run: what each pass would touch and skip, and what the build would cost. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.build import load_named, recipe_context
from compress.compare import forward
from compress.model import Model
from compress.passes.base import Context, Pass
from compress.pipeline import run, state_bytes
from compress.progress import SILENT, Observer
from compress.recipe import Recipe
from compress.report import Step

EXPORT_SECONDS_PER_MEGABYTE = 0.25
"""Tracing, writing and proving one artifact and its baseline, per megabyte of float32 weights: a rough guess."""
EXPORT_SECONDS = 15.0
FIXED_BYTES = 700 * 10**6
"""Resident size of Python with torch, transformers and ONNX Runtime, before any weights: a rough guess."""


@dataclass(frozen=True)
class Plan:
    """What a build would do. `steps` were really run, on one batch of calibration data and in memory only.

    `peak_bytes` is resident memory, `disk_bytes` everything that is on disk at once, `seconds` the whole build; all
    three are estimates.
    """

    steps: tuple[Step, ...]
    peak_bytes: int
    disk_bytes: int
    seconds: float


def plan(recipe: Recipe, observer: Observer = SILENT) -> Plan:
    """Run the passes of `recipe` on its model with one batch of calibration data, and estimate the whole build.

    Passes that train are stated, not run. Raises what `build` would raise for the model, the data and the passes.
    """
    begun = time.perf_counter()
    model = load_named(recipe, observer)
    loading = time.perf_counter() - begun
    for target in recipe.export:
        target.check(model)
    context = replace(recipe_context(recipe, model), observer=observer)
    outcome = run(model, _untrained(recipe.passes), _first_batch(context))
    before, after = state_bytes(model.module), state_bytes(outcome.model.module)
    exports = len(recipe.export)
    return Plan(
        steps=outcome.steps,
        peak_bytes=FIXED_BYTES + 4 * before,
        disk_bytes=2 * after + exports * (before + after),
        seconds=loading
        + sum(step.seconds for step in outcome.steps)
        + _calibration_seconds(model, context, recipe.passes)
        + exports * _export_seconds(before),
    )


def _untrained(passes: Sequence[Pass]) -> list[Pass]:
    return [one for one in passes if one.needs != "training"]


def _first_batch(context: Context) -> Context:
    if context.calibration is None:
        return context
    return replace(context, calibration=[next(iter(context.calibration))])


def _calibration_seconds(model: Model, context: Context, passes: Sequence[Pass]) -> float:
    """Time of the batches that the dry run left out, for every pass that reads them, from one timed batch."""
    count = sum(one.needs == "calibration" for one in passes)
    if context.calibration is None or not count:
        return 0.0
    batches = list(context.calibration)
    begun = time.perf_counter()
    forward(model.module, batches[0])
    return count * (len(batches) - 1) * (time.perf_counter() - begun)


def _export_seconds(weights: int) -> float:
    return EXPORT_SECONDS + EXPORT_SECONDS_PER_MEGABYTE * weights / 1e6
