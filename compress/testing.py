"""The contract that every pass keeps, as one check for the tests of built-in and third-party passes."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from compress.checkpoint import load, save
from compress.compare import forward
from compress.errors import ModelpressError
from compress.model import Model
from compress.passes.base import Context, Pass
from compress.pipeline import Outcome, run

if TYPE_CHECKING:
    import torch


def check_pass(settings: Pass, model: Model, context: Context, unsuitable: Model | None = None) -> Outcome:
    """Assert the contract of a pass on `model`, where it finds something to do, and return its outcome.

    The settings are frozen, refuse unknown keys and survive JSON. The caller's model stays as it was. Two runs give
    the same outputs, bit for bit. Changes are reported exactly when the state differs. A checkpoint gives the outputs
    back, bit for bit, and so does `restore` on a fresh copy. On `unsuitable` the pass raises a `ModelpressError`
    with a message of its own. Raises `AssertionError` with what is wrong.
    """
    _check_settings(settings)
    before = _state(model)
    outcome = run(model, [settings], context)
    assert _same(before, _state(model)), f"{settings.use} changed its caller's model"
    step, outputs = outcome.steps[-1], forward(outcome.model.module, model.example)
    _check_repeatable(settings, model, context, outputs)
    assert bool(step.changes) == (not _same(before, _state(outcome.model))), (
        f"{settings.use} reports {len(step.changes)} changes, which does not agree with the state"
    )
    _check_restore(settings, model, outcome, outputs)
    _check_checkpoint(model, outcome, outputs)
    if unsuitable is not None:
        _check_declines(settings, unsuitable, context)
    return outcome


def _check_settings(settings: Pass) -> None:
    field = next(iter(type(settings).model_fields))
    try:
        setattr(settings, field, None)
    except ValidationError:
        pass
    else:
        raise AssertionError(f"{settings.use} is not frozen")
    assert type(settings).model_validate_json(settings.model_dump_json()) == settings
    try:
        type(settings).model_validate({**settings.model_dump(), "no_such_setting": 1})
    except ValidationError:
        pass
    else:
        raise AssertionError(f"{settings.use} takes unknown settings")
    assert settings.effect in ("exact", "lossy")
    assert settings.needs in ("nothing", "calibration", "training")


def _check_repeatable(
    settings: Pass, model: Model, context: Context, outputs: dict[str, torch.Tensor]
) -> None:
    again = run(model, [settings], context)
    assert _equal(outputs, forward(again.model.module, model.example)), f"{settings.use} is not deterministic"


def _check_restore(settings: Pass, model: Model, outcome: Outcome, outputs: dict[str, torch.Tensor]) -> None:
    module = settings.restore(copy.deepcopy(model.module), outcome.steps[-1].record)
    module.load_state_dict(outcome.model.module.state_dict(), assign=True)
    assert _equal(outputs, forward(module.eval(), model.example)), (
        f"{settings.use}: restore differs from apply"
    )


def _check_checkpoint(model: Model, outcome: Outcome, outputs: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        save(outcome.model, Path(scratch) / "model")
        back = load(Path(scratch) / "model", skeleton=copy.deepcopy(model.module))
    assert _equal(outputs, forward(back.module, model.example)), "the checkpoint gives other outputs"
    assert back.history == outcome.model.history, "the checkpoint has another history"


def _check_declines(settings: Pass, unsuitable: Model, context: Context) -> None:
    try:
        run(unsuitable, [settings], replace(context, calibration=None, training=None))
    except ModelpressError as error:
        assert error.fact, f"{settings.use} declines without saying why"
        assert error.remedy, f"{settings.use} declines without a remedy: {error.fact}"
    else:
        raise AssertionError(f"{settings.use} did not decline")


State = tuple[dict[str, "torch.Tensor"], dict[str, str]]
"""The tensors of a module, and the classes of the modules inside it, by name: a pass may change either."""


def _state(model: Model) -> State:
    tensors = {name: tensor.detach().clone() for name, tensor in model.module.state_dict().items()}
    return tensors, {path: type(part).__qualname__ for path, part in model.module.named_modules()}


def _same(one: State, other: State) -> bool:
    return one[1] == other[1] and one[0].keys() == other[0].keys() and _equal(one[0], other[0])


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the tensors agree bit for bit, types included."""
    import torch

    return all(
        other[name].dtype == tensor.dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
