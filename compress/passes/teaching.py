"""What a student is asked: the losses of passes that are taught, as functions of a module and a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.data import LABELS, without_labels
from compress.errors import DataError, Unsuitable, UsageError
from compress.model import Inputs, Model
from compress.numerics.relations import divergence, matched, relative_error
from compress.outputs import float_outputs, forward
from compress.passes.base import Context
from compress.passes.calibration import tokens_of
from compress.passes.moments import CLASSES_LAST
from compress.passes.relating import relations_loss
from compress.training import Loss

if TYPE_CHECKING:
    from compress.passes.taught import Taught


def require_teacher(context: Context, use: str) -> Model:
    """The context's teacher, for the pass `use`. Raises `UsageError` if there is none."""
    if context.teacher is None:
        raise UsageError(
            f"`{use}` needs a teacher, and the context has none.",
            "Run it with `compress.apply` or `compress.run`, or give `Context(teacher=MODEL)`.",
        )
    return context.teacher


def objective(settings: Taught, model: Model, teacher: Model) -> tuple[str, Loss]:
    """What is compared, and the loss that compares it. Raises `Unsuitable` where the models cannot be compared so."""
    kind = settings.loss
    if kind == "auto":
        kind = "logits" if _has_logits(model) else "hidden"
    if kind == "minilm":
        if settings.task:
            raise Unsuitable(
                "`loss: minilm` trains nothing behind the last attention, so `task` would have no head to learn with.",
                "Leave out `task`, or use another `loss`.",
            )
        return kind, relations_loss(model, teacher, settings.relation_heads)
    parts: dict[str, Part] = {}
    if kind == "logits" or (kind == "both" and _has_logits(model)):
        parts["logits"] = _logits_part(model, teacher, settings.temperature)
    if kind != "logits":
        parts["hidden"] = _hidden_part(model, teacher)
    if settings.task:
        parts["labels"] = _task_part(model, settings.task)
    return " and ".join(parts), _answers_loss(teacher, list(parts.values()), states=kind != "logits")


def logits_loss(model: Model, teacher: Model, temperature: float) -> Loss:
    """The divergence of the student's distributions from the teacher's, mean over positions that are no padding."""
    return _answers_loss(teacher, [_logits_part(model, teacher, temperature)], states=False)


def hidden_loss(model: Model, teacher: Model) -> Loss:
    """The squared error of each hidden state relative to the teacher's, blocks matched evenly, mean over positions.

    Raises `Unsuitable` for models that give no hidden states, or of another width.
    """
    return _answers_loss(teacher, [_hidden_part(model, teacher)], states=True)


Part = Callable[[Any, Any, Inputs], Tensor]
"""A loss of what the teacher and the student return for a batch."""


def _answers_loss(teacher: Model, parts: Sequence[Part], states: bool) -> Loss:
    """The sum of `parts` for one run of each model; with `states`, these are asked for. The teacher sees no labels."""
    ask = _with_states if states else _plainly

    def loss(module: nn.Module, batch: Inputs) -> Tensor:
        wanted = _untaught(teacher.module, lambda one: ask(one, without_labels(batch)))
        given = ask(module, batch)
        return torch.stack([part(wanted, given, batch) for part in parts]).sum()

    return loss


def _logits_part(model: Model, teacher: Model, temperature: float) -> Part:
    if not _has_logits(model):
        raise Unsuitable(
            f"`loss: logits` compares distributions over classes or words, and a model for {model.task} gives none.",
            "Use `loss: hidden`.",
        )
    shapes = [tuple(forward(one.module, one.example)["logits"].shape) for one in (teacher, model)]
    if shapes[0][-1] != shapes[1][-1]:
        raise Unsuitable(
            f"The teacher's logits are {shapes[0]} and the student's {shapes[1]}.",
            "Use `loss: minilm`, or a teacher with the same classes.",
        )

    def part(teacher_gives: Any, student_gives: Any, batch: Inputs) -> Tensor:
        wanted, given = (float_outputs(one)["logits"] for one in (teacher_gives, student_gives))
        return divergence(wanted, given, tokens_of(batch, given.shape[:-1]), temperature)

    return part


def _hidden_part(model: Model, teacher: Model) -> Part:
    shapes = [
        [tuple(state.shape[-1] for state in states) for states in _untaught(one.module, _asker(one.example))]
        for one in (teacher, model)
    ]
    widths = [[max(found) for found in groups] for groups in shapes]
    if widths[0] != widths[1]:
        raise Unsuitable(
            f"The teacher's hidden states have {_joined(widths[0])} features and the student's {_joined(widths[1])}.",
            "Use `loss: minilm`, which compares models of any width, or `logits`.",
        )

    def part(teacher_gives: Any, student_gives: Any, batch: Inputs) -> Tensor:
        errors = [
            relative_error(one[number - 1], state, tokens_of(batch, state.shape[:-1]))
            for one, other in zip(_states(teacher_gives), _states(student_gives), strict=True)
            for number, state in zip(matched(len(one), len(other)), other, strict=True)
        ]
        return torch.stack(errors).mean()

    return part


def _task_part(model: Model, weight: float) -> Part:
    """`weight` times the loss that the student itself gives for the labels of a batch."""
    takes = inspect.signature(model.module.forward).parameters
    if LABELS not in takes and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        raise _lossless(model.module)

    def part(teacher_gives: Any, student_gives: Any, batch: Inputs) -> Tensor:
        del teacher_gives
        if LABELS not in batch:
            raise DataError(
                "`task` counts the loss of labels, and the training data has none.",
                "Name its `label` in the recipe, give batches with `labels`, or leave out `task`.",
            )
        own = student_gives.get("loss") if isinstance(student_gives, Mapping) else None
        if own is None:
            raise _lossless(model.module)
        return weight * own.float()

    return part


def _lossless(module: nn.Module) -> Unsuitable:
    return Unsuitable(
        f"{type(module).__name__} gives no loss for labels, which `task` would count.",
        "Leave out `task`, or load the model for a task with labels.",
    )


def hidden_states(module: nn.Module, batch: Inputs) -> list[list[Tensor]]:
    """The states after each block, features last: one list a stack, as the model gives them when asked for.

    Raises `Unsuitable` for a module that gives none.
    """
    return _states(_with_states(module, batch))


def _plainly(module: nn.Module, batch: Inputs) -> Any:
    return module(**batch)


def _with_states(module: nn.Module, batch: Inputs) -> Any:
    """What `module` returns for `batch`, with hidden states. Raises `Unsuitable` if it has none."""
    try:
        outputs = module(**batch, output_hidden_states=True)
    except TypeError as error:
        raise _stateless(module) from error
    if not any(True for _ in _named_states(outputs)):
        raise _stateless(module)
    return outputs


def _states(outputs: Any) -> list[list[Tensor]]:
    # The first state is what the embeddings give: no block has made it.
    return [[_features_last(state) for state in states[1:]] for states in _named_states(outputs)]


def _named_states(outputs: Any) -> Iterator[Sequence[Tensor]]:
    for name, states in outputs.items() if isinstance(outputs, Mapping) else ():
        if name.endswith("hidden_states") and not name.startswith("reshaped") and states:
            yield states


def _untaught(module: nn.Module, ask: Callable[[nn.Module], Any]) -> Any:
    with torch.no_grad():
        return ask(module)


def _asker(batch: Inputs) -> Callable[[nn.Module], list[list[Tensor]]]:
    return lambda module: hidden_states(module, batch)


def _has_logits(model: Model) -> bool:
    return model.task in CLASSES_LAST and "logits" in forward(model.module, model.example)


def _features_last(state: Tensor) -> Tensor:
    """Maps (batch, channels, height, width) as (batch, height, width, channels); sequences as they are."""
    return state.movedim(1, -1) if state.dim() == 4 else state


def _stateless(module: nn.Module) -> Unsuitable:
    return Unsuitable(
        f"{type(module).__name__} gives no hidden states when asked with `output_hidden_states=True`.",
        "Use `loss: logits` or `minilm`.",
    )


def _joined(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
