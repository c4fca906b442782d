"""Judge an artifact against the uncompressed model, exported in the same way and the same float precision."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.compare import flatten_outputs, forward, parity, worst
from compress.data import batches
from compress.errors import WrongDevice
from compress.evaluate import drop, evaluate
from compress.manifest import Verdict
from compress.model import Inputs, Model
from compress.progress import Observer, task
from compress.recipe import Recipe
from compress.report import Parity
from compress.target import Artifact, Runner, Target
from compress.timing import Timings, measure

if TYPE_CHECKING:
    import torch


def judge(
    recipe: Recipe, target: Target, artifact: Artifact, model: Model, scratch: Path, observer: Observer
) -> Verdict:
    """Export `model`, the uncompressed one, as `target.baseline()` says, and set `artifact` beside it.

    `scratch` is a folder for the baseline, removed again. Speed and quality are None for an artifact that cannot run
    on this machine.
    """
    folder = scratch / "baseline"
    folder.mkdir()
    with task(observer, f"export the uncompressed model to {target.use}"):
        baseline = target.baseline().write(model, folder, observer)
    timings = _time(recipe, target, artifact, baseline, model, scratch, observer)
    runner = _runner(target, artifact)
    score, baseline_score = _scores(recipe, runner, model, observer)
    verdict = Verdict(
        artifact=artifact,
        baseline_bytes=sum(file.bytes for file in baseline.files),
        parity=_parity(runner, model, recipe, target) if runner else None,
        speedup=timings.speedup(target.use) if timings else None,
        seconds=timings.seconds(target.use) if timings else None,
        baseline_seconds=timings.seconds("uncompressed") if timings else None,
        score=score,
        baseline_score=baseline_score,
    )
    shutil.rmtree(folder)
    return verdict


def _runner(target: Target, artifact: Artifact) -> Runner | None:
    try:
        return target.load(artifact)
    except WrongDevice:
        # An engine for another device: there is nothing to run, and the report says so.
        return None


def _parity(runner: Runner, model: Model, recipe: Recipe, target: Target) -> Parity:
    """The worst parity of the artifact to the uncompressed module over the held-out inputs, or the example."""
    source = recipe.data.heldout
    inputs = batches(source, model) if source else [model.example]
    return worst(
        parity(
            rows(forward(model.module, batch), batch, model.task),
            rows(flatten_outputs(runner(**batch)), batch, model.task),
            f"{target.use} artifact",
        )
        for batch in inputs
    )


def rows(outputs: Mapping[str, torch.Tensor], inputs: Inputs, task: str) -> dict[str, torch.Tensor]:
    """What users of a model look at: no padding, and for embeddings the mean over each row's tokens.

    Outputs of shape (batch, sequence, features) become (batch, features) for "feature-extraction" and
    (tokens, features) for other tasks; any other output stays as it is.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return dict(outputs)
    return {name: _without_padding(value, mask, task) for name, value in outputs.items()}


def _without_padding(value: torch.Tensor, mask: torch.Tensor, task: str) -> torch.Tensor:
    if value.dim() != 3 or value.shape[:2] != mask.shape:
        return value
    if task != "feature-extraction":
        return value[mask.bool()]
    weights = mask.to(value.dtype)[..., None]
    return (value * weights).sum(1) / weights.sum(1)


def _scores(
    recipe: Recipe, runner: Runner | None, model: Model, observer: Observer
) -> tuple[float | None, float | None]:
    evaluation = recipe.data.evaluation
    if evaluation is None or runner is None:
        return None, None
    with task(observer, f"evaluate {evaluation.metric}"):
        return evaluate(runner, evaluation, model).value, evaluate(model.module, evaluation, model).value


def _time(
    recipe: Recipe,
    target: Target,
    artifact: Artifact,
    baseline: Artifact,
    model: Model,
    scratch: Path,
    observer: Observer,
) -> Timings | None:
    from safetensors.torch import save_file

    inputs = scratch / "inputs.safetensors"
    save_file(dict(resized(model.example, recipe.measure.shape)), inputs)
    variants = [
        target.baseline().variant(baseline, "uncompressed", inputs),
        target.variant(artifact, target.use, inputs),
    ]
    found = [variant for variant in variants if variant is not None]
    if len(found) < len(variants):
        return None
    settings = recipe.measure
    return measure(
        found, settings.rounds, settings.calls, "uncompressed", threads=settings.threads, observer=observer
    )


def resized(example: Inputs, shape: dict[str, int]) -> dict[str, torch.Tensor]:
    """`example` repeated to `shape["batch"]` rows and, for two-dimensional inputs, `shape["sequence"]` columns."""
    return {name: _repeated(tensor, shape) for name, tensor in example.items()}


def _repeated(tensor: torch.Tensor, shape: dict[str, int]) -> torch.Tensor:
    sizes: list[int] = [shape.get("batch", len(tensor))]
    if tensor.dim() == 2:
        sizes.append(shape.get("sequence", int(tensor.shape[1])))
    for dimension, size in enumerate(sizes):
        times = -(-size // tensor.shape[dimension])
        tensor = tensor.repeat([times if dimension == other else 1 for other in range(tensor.dim())])
        tensor = tensor.narrow(dimension, 0, size)
    return tensor.contiguous()


def shortfalls(recipe: Recipe, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """What the recipe's `accept` demands and these artifacts do not give, one sentence part each."""
    return tuple(
        f"{verdict.artifact.target}: {problem}"
        for verdict in verdicts
        for problem in _problems(recipe, verdict)
    )


def _problems(recipe: Recipe, verdict: Verdict) -> list[str]:
    accept, problems = recipe.accept, []
    if accept.min_speedup is not None and verdict.speedup and verdict.speedup.median < accept.min_speedup:
        problems.append(f"{verdict.speedup.median:.2f} times as fast, {accept.min_speedup} demanded")
    if accept.min_cosine is not None and verdict.parity and verdict.parity.cosine < accept.min_cosine:
        problems.append(f"lowest cosine {verdict.parity.cosine:.4f}, {accept.min_cosine} demanded")
    lost = _drop(recipe, verdict)
    if accept.max_drop is not None and lost > accept.max_drop:
        scores = f"{verdict.baseline_score:.3f} -> {verdict.score:.3f}"
        metric = recipe.data.evaluation.metric if recipe.data.evaluation else ""
        problems.append(f"{metric} {scores}, a drop of {lost:.3f}; at most {accept.max_drop} allowed")
    return problems


def _drop(recipe: Recipe, verdict: Verdict) -> float:
    """How much worse the artifact's score is than the original's; 0 where there is none."""
    if recipe.data.evaluation is None or verdict.score is None or verdict.baseline_score is None:
        return 0.0
    return drop(recipe.data.evaluation.metric, verdict.baseline_score, verdict.score)
