"""Run passes over a model. Timing, proof, history and resume live here, and nowhere else."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress import processes
from compress.catalog import available, find
from compress.checkpoint import load, save
from compress.compare import EXACT_TOLERANCE, forward, parity, require_finite
from compress.data import LABELS
from compress.devices import Moved, device_of, require_device
from compress.errors import ModelpressError, NothingToDo, Unproved, Unsuitable
from compress.folders import empty
from compress.model import Model
from compress.passes.base import Batches, Context, Pass, Result, unpaid
from compress.progress import task
from compress.report import Caution, Parity, Step
from compress.versions import package_versions

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Outcome:
    """The compressed model, and the steps of this run in order (the model's history may be longer).

    `warnings` are what `compress.apply` and `compress.build` found out about the data; `run` looks for none.
    """

    model: Model
    steps: tuple[Step, ...]
    warnings: tuple[Caution, ...] = ()


def run(
    model: Model, passes: Sequence[Pass], context: Context | None = None, store: Path | None = None
) -> Outcome:
    """Apply `passes` in order to a copy of `model`, proving every step on the model's example.

    With `store`, an existing folder, the model after each pass is kept there until the next one is done, and a run
    with the same weights, data, settings and package versions goes on from it. The teacher of passes that train is
    `model`, unless the context has one. Passes run on the context's device, everything else where `model` is.

    Raises before any work `UsageError` for a device that torch does not have, and `Unsuitable` for a pass whose result
    must be trained and is not; then `NothingToDo` for a pass that changed nothing, `Unproved` for outputs that are not
    finite, have another shape, or (after a pass that claims to keep the function) differ, and what the passes raise.
    """
    context = context or Context()
    context = replace(context, device=processes.own_device(context.device))
    require_device(context.device)
    _require_paid(model, passes)
    context = context if context.teacher is not None else replace(context, teacher=model)
    keys = _keys(model, passes, context) if store is not None else [""] * len(passes)
    done, current = _resume(model, store, keys) if store is not None else (0, None)
    if current is None:
        current = replace(model, module=copy.deepcopy(model.module))
    # The source's processor and example stay: a checkpoint gives back equal ones.
    current = replace(current, source=model.source, processor=model.processor)
    for index in range(done, len(passes)):
        scratch = context.scratch if store is None else store / f"scratch-{keys[index][:16]}"
        current = _run_one(current, passes[index], replace(context, scratch=scratch), passes[:index])
        if store is not None:
            _keep(current, store, keys[index])
    return Outcome(current, current.history[len(model.history) :])


def state_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of `module`, a shared tensor counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in _tensors(module).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _require_paid(model: Model, passes: Sequence[Pass]) -> None:
    known = available("compress.passes")
    before = [
        find("compress.passes", step.name).model_validate(step.settings)
        for step in model.history
        if step.name in known
    ]
    if debt := unpaid(passes, before):
        raise Unsuitable(debt.fact, debt.remedy)


def _run_one(model: Model, settings: Pass, context: Context, before: Sequence[Pass]) -> Model:
    try:
        step, module = _prove(model, settings, context)
    except ModelpressError as error:
        error.add_note(_place(settings, before))
        raise
    return replace(model, module=module, history=(*model.history, step))


def _place(settings: Pass, before: Sequence[Pass]) -> str:
    earlier = f" after {', '.join(f'`{one.use}`' for one in before)}" if before else ""
    return f"In the pass `{settings.use}`{earlier}."


def _prove(model: Model, settings: Pass, context: Context) -> tuple[Step, nn.Module]:
    settings.scope.require_matches(path for path, _ in model.module.named_modules() if path)
    settings.check(model)
    reference, bytes_before = forward(model.module, model.example), state_bytes(model.module)
    begun = time.perf_counter()
    with task(context.observer, settings.use):
        result = applied(settings, model, context)
    seconds = time.perf_counter() - begun
    if not result.changes and not settings.allow_empty:
        raise nothing_to_do(settings, result)
    result.module.eval()
    outputs = forward(result.module, model.example)
    found = parity(reference, outputs, f"model after `{settings.use}`")
    require_finite(outputs, f"model after `{settings.use}`")
    _require_exact(settings, found, result.module)
    step = Step(
        name=settings.use,
        settings=settings.model_dump(mode="json"),
        effect=settings.effect,
        changes=result.changes,
        skips=result.skips,
        record=result.record,
        parity=found,
        bytes_before=bytes_before,
        bytes_after=state_bytes(result.module),
        seconds=seconds,
    )
    return step, result.module


def applied(settings: Pass, model: Model, context: Context) -> Result:
    """What the pass makes of `model`, with all that it is given on the context's device, and then back."""
    home = device_of(model.module)
    data = {"calibration": context.calibration, "training": context.training}
    unread = () if settings.learns_labels() else (LABELS,)
    data = {name: None if one is None else Moved(one, context.device, unread) for name, one in data.items()}
    with model.on(context.device) as there:
        result = settings.apply(there, replace(context, **data))
    return result if home is None else replace(result, module=result.module.to(home))


def nothing_to_do(settings: Pass, result: Result) -> NothingToDo:
    """The error for a pass that changed nothing."""
    reasons = "; ".join(f"{skip.target}: {skip.why}" for skip in result.skips[:5])
    more = f" (and {len(result.skips) - 5} more)" if len(result.skips) > 5 else ""
    return NothingToDo(
        f"The pass `{settings.use}` found nothing to do in this model."
        + (f" It skipped {reasons}{more}." if reasons else ""),
        "Widen its scope, leave the pass out, or set `allow_empty: true` to go on without it.",
    )


def _require_exact(settings: Pass, found: Parity, module: nn.Module) -> None:
    import torch

    kinds = [tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()]
    coarsest = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    allowed = max(EXACT_TOLERANCE, 8 * coarsest)
    if settings.effect == "exact" and found.relative > allowed:
        raise Unproved(
            f"The pass `{settings.use}` must keep the outputs, but they moved by {found.relative:.2e} of their largest "
            f"value; {allowed:.0e} is allowed.",
            "This is a defect of the pass: leave it out or narrow its scope, and report it with the model's config.",
        )


# Resume: what a step depends on, and the last model that was kept.


def _keys(model: Model, passes: Sequence[Pass], context: Context) -> list[str]:
    """One key a pass, over the weights, the data, the versions, and the settings of all passes up to it."""
    digest = hashlib.sha256(json.dumps([package_versions(), model.task, context.seed]).encode())
    teacher = context.teacher.module if context.teacher is not None else model.module
    for module in dict.fromkeys((model.module, teacher)):
        for name, tensor in _tensors(module).items():
            _update(digest, name, tensor)
    for batches in (context.calibration, context.training):
        _update_with_batches(digest, batches)
    keys = []
    for settings in passes:
        digest.update(settings.model_dump_json().encode())
        keys.append(digest.hexdigest())
    return keys


def _update(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    import torch

    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _update_with_batches(digest: hashlib._Hash, batches: Batches | None) -> None:
    for batch in batches or ():
        for name, tensor in batch.items():
            _update(digest, name, tensor)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _keep(model: Model, store: Path, key: str) -> None:
    """Keep `model` as the folder named by `key`, then drop the one before it: the disk holds two at most.

    The scratch folder of the pass goes with it. Of several processes only the main one keeps anything.
    """
    if processes.is_main():
        save(model, store / key, force=True)
        empty(store, keep=(key,))


def _resume(source: Model, store: Path, keys: Sequence[str]) -> tuple[int, Model | None]:
    kept = [number for number, key in enumerate(keys, start=1) if (store / key).is_dir()]
    done = processes.shared(max(kept, default=0))
    if not done:
        return 0, None
    model = load(store / keys[done - 1], skeleton=copy.deepcopy(source.module))
    # Nobody goes on, and drops the folder, before all have read it.
    processes.shared(None)
    steps = tuple(replace(step, resumed=True) for step in model.history)
    return done, replace(model, history=steps)
