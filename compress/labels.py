"""The right answers beside examples: the classes that a table or folders give, and the words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data import (
    LABELS,
    TABLES,
    Batches,
    Origin,
    Source,
    batches,
    cut,
    dealt,
    grouped,
    read_examples,
    read_table,
)
from compress.errors import DataError

if TYPE_CHECKING:
    import torch

    from compress.model import Inputs, Model

CLASSIFYING = ("text-classification", "image-classification")
"""Tasks with one class an example."""
WRITING = "text-generation"
"""The task whose labels are the words of the text."""
UNCOUNTED = -100
"""The label of a place that no loss of transformers counts."""


def require_labels(source: Origin, task: str) -> None:
    """Raise `DataError` unless `source` can have labels for a model of this task. Reads no data."""
    if task == WRITING:
        if source.label:
            raise DataError(
                f"`label: {source.label}` has no effect: a model for {WRITING} learns the words of the text.",
                "Leave out `label`.",
            )
    elif task not in CLASSIFYING:
        raise DataError(
            f"`task` counts the loss of labels, and files have them for {_listed((*CLASSIFYING, WRITING))}, "
            f"not for {task}.",
            "Leave out `task`, or give batches with `labels` from Python: `compress.apply(..., training=BATCHES)`.",
        )
    elif source.kind == "text":
        raise DataError(
            "`task` counts the loss of labels, and a `text` file has none.",
            "Give a table with `column` and `label`, or leave out `task`.",
        )
    elif source.kind in TABLES and not source.label:
        raise DataError(
            f"`task` counts the loss of labels, and the `{source.kind}` training data names no `label`.",
            "Add `label: COLUMN`, the column of the class, or leave out `task`.",
        )


def labelled_batches(source: Source, model: Model) -> Batches:
    """What `compress.data.batches` gives, with `labels` (int64), by which models of transformers give their loss.

    To classify: the class of each example, `(batch,)`; see `class_numbers`. For text generation: the words themselves,
    `(batch, length)`, which such models compare with their guess at the place before; padding is -100. Raises
    `DataError` for data without labels, for classes that are not the model's, and as `batches` does.
    """
    require_labels(source, model.task)
    if model.task == WRITING:
        plain = batches(source, model)
        return replace(plain, encode=lambda group: _with_words(plain.encode(group)))
    _require_one_class(model)
    examples = read_examples(source)
    classes = class_numbers(labels_of(source, examples), source, model)
    pairs = dealt(list(zip(examples, classes, strict=True)), source)
    made = grouped([example for example, _ in pairs], source, model, source.samples)

    def encode(group: Sequence[tuple[Any, int]]) -> Inputs:
        import torch

        wanted = torch.tensor([number for _, number in group])
        return {**made.encode([example for example, _ in group]), LABELS: wanted}

    return replace(made, groups=cut(pairs, source.batch_size), encode=encode)


def labels_of(origin: Origin, examples: Sequence[Any]) -> list[Any]:
    """The labels of all `examples` of `origin` as they are written: a column, or the folder of each picture."""
    if origin.kind == "images":
        return [Path(picture).parent.name for picture in examples]
    return read_table(origin).column(origin.label or "")


def class_numbers(labels: Sequence[Any], origin: Origin, model: Model) -> list[int]:
    """The numbers of the classes `labels`: by the model's `label2id`, or as given, or folders in the order of their
    names. Raises `DataError` for classes that the model does not have.
    """
    config = getattr(model.module, "config", None)
    count = getattr(config, "num_labels", None)
    numbers = _numbers(sorted({str(label) for label in labels}), count, config, origin)
    outside = sorted({number for number in numbers.values() if count is not None and number >= count})
    if outside:
        raise DataError(
            f"The data has the classes {_listed(outside[:5])}, and the model has {count}, numbered from 0.",
            "Number the classes from 0, write them as the model's config names them, or load a model with more.",
        )
    return [numbers[str(label)] for label in labels]


def _numbers(names: Sequence[str], count: int | None, config: Any, origin: Origin) -> dict[str, int]:
    """The number of each of the classes `names`, of a model with `count` classes."""
    known = dict(getattr(config, "label2id", None) or {})
    if set(names) <= set(known):
        return {name: known[name] for name in names}
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}
    if origin.kind != "images":
        raise DataError(
            f"The classes {_listed(names[:5])} are not the model's: {_listed(known)}.",
            "Write the classes as numbers, or as the model's config names them.",
        )
    if count is not None and len(names) != count:
        raise DataError(
            f"The pictures lie in {len(names)} folders ({_listed(names[:5])}), and the model has {count} classes.",
            "Give one folder a class, or name the folders by number or as the model's config names its classes.",
        )
    return {name: number for number, name in enumerate(names)}


def _require_one_class(model: Model) -> None:
    config = getattr(model.module, "config", None)
    kind = getattr(config, "problem_type", None)
    if kind is None and getattr(config, "num_labels", None) == 1:
        kind = "regression"
    if kind in ("regression", "multi_label_classification"):
        raise DataError(
            f"The labels of files are one class an example, and the model is for {kind}.",
            "Give batches with its `labels` from Python: `compress.apply(..., training=BATCHES)`.",
        )


def _with_words(batch: Inputs) -> dict[str, torch.Tensor]:
    words = batch["input_ids"]
    padding = batch["attention_mask"] == 0 if "attention_mask" in batch else words != words
    return {**batch, LABELS: words.masked_fill(padding, UNCOUNTED)}


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))
