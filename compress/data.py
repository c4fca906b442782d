"""Calibration, training and evaluation data: where it comes from, and batches of it as a model takes them."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import DataError
from compress.reading import Example, Table, pictures, rows_of, text_lines, whole_text

if TYPE_CHECKING:
    import torch

    from compress.model import Inputs, Model

TABLES = ("csv", "tsv", "jsonl", "dataset")
"""The fields of an origin that have columns."""


class Origin(BaseModel, ABC):
    """Where examples come from: exactly one of `text`, `csv`, `tsv`, `jsonl`, `images`, `dataset`.

    Files may be packed with gzip (`.gz`). Relative paths in a recipe are relative to the recipe file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Path | None = Field(
        default=None, description="A file with one sample a line; for text generation, one long text."
    )
    csv: Path | None = Field(default=None, description="Comma-separated values with a header line.")
    tsv: Path | None = Field(
        default=None, description="Tab-separated values with a header line and no quoting at all."
    )
    jsonl: Path | None = Field(default=None, description="One JSON object a line.")
    images: Path | None = Field(
        default=None, description="A folder of pictures, searched with its subfolders."
    )
    dataset: str | None = Field(default=None, description="A name or folder for `datasets.load_dataset`.")
    subset: str | None = Field(default=None, description="The dataset's configuration.")
    split: str = Field(default="train", description="The dataset's split.")
    column: str | None = Field(default=None, description="The column to take, of text or of pictures.")
    columns: tuple[str, str] | None = Field(
        default=None, description="Two columns, taken as a pair of texts."
    )
    label: str | None = Field(
        default=None,
        description="The column of the class or score; pictures have their classes by subfolder instead.",
    )
    max_length: int = Field(
        default=128,
        ge=1,
        description="Tokens a sample: longer ones are cut, long texts cut into such windows.",
    )
    batch_size: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _one_origin(self) -> Origin:
        given = [name for name in ("text", "images", *TABLES) if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(f"`{name}`" for name in given) if given else "none of them"
            raise ValueError(
                f"give exactly one of `text`, `csv`, `tsv`, `jsonl`, `images`, `dataset`; here is {what}."
            )
        if given[0] in TABLES and (self.column is None) == (self.columns is None):
            raise ValueError(
                f"`{given[0]}` needs `column` (or `columns`, for a pair of texts): which one to take."
            )
        if given[0] not in TABLES and (self.column or self.columns or self.label):
            classes = " The class of a picture is the name of its subfolder." if given[0] == "images" else ""
            raise ValueError(f"`{given[0]}` has no columns.{classes if self.label else ''}")
        return self

    @property
    def kind(self) -> str:
        """The field that is given."""
        return next(name for name in ("text", "images", *TABLES) if getattr(self, name) is not None)

    @property
    def path(self) -> Path | None:
        """The file or folder, or None for a dataset."""
        return None if self.kind == "dataset" else getattr(self, self.kind)


class Source(Origin):
    """Examples to calibrate or to train on: `samples` of them, spread evenly over all there are."""

    samples: int = Field(default=128, ge=1)


def source_at(path: Path, like: Source | None = None, field: str = "calibration") -> Source:
    """A source that reads `path` (a folder of images, a table or a text), with the rest of `like`.

    Raises `DataError`, which names the recipe's `field`, for a table without a column.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower().removeprefix(".")
    kind = "images" if path.is_dir() else suffix if suffix in TABLES else "text"
    settings = like.model_dump(exclude_unset=True, exclude={"text", "images", *TABLES}) if like else {}
    if kind not in TABLES:
        settings = {
            name: value for name, value in settings.items() if name not in ("column", "columns", "label")
        }
    elif not settings.get("column") and not settings.get("columns"):
        raise DataError(
            f"{path} is a table, and nothing says which of its columns to take.",
            f"Write it in the recipe: `{field}: {{{kind}: {path.name}, column: NAME}}`.",
        )
    return Source(**{**settings, kind: path})


@dataclass(frozen=True)
class Batches:
    """Batches of forward keyword arguments. Each iteration gives the same ones again, encoded when asked for.

    `samples` is how many examples there are in all, `asked` how many were asked for.
    """

    groups: tuple[Sequence[Any], ...]
    encode: Callable[[Sequence[Any]], Inputs]
    samples: int
    asked: int

    def __iter__(self) -> Iterator[Inputs]:
        return map(self.encode, self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def batches(source: Source, model: Model) -> Batches:
    """The examples of `source` as `model` takes them: the arguments of `model.example`, on the CPU.

    Text is padded to the longest sample of its batch; for text generation it is one text, cut into windows of
    `max_length` tokens. Each batch takes examples from all over the source: neighbours are often of one class or
    topic, and steps of training on one topic at a time undo each other. Labels are left out: see
    `compress.labels.labelled_batches`. Raises `DataError` for data that is missing, empty or does not fit the model.
    """
    if source.kind == "text" and model.task == "text-generation":
        from compress.encoding import windows

        examples: Sequence[Any] = windows(whole_text(_path(source)), source.max_length, model)
    else:
        examples = read_examples(source)
    return grouped(dealt(examples, source), source, model, source.samples)


def dealt(examples: Sequence[Example], source: Source) -> list[Example]:
    """The `samples` of `source`, in the order in which its batches take them."""
    chosen = spread(examples, source.samples)
    count = -(-len(chosen) // source.batch_size)
    return [example for start in range(count) for example in chosen[start::count]]


def grouped(examples: Sequence[Example], origin: Origin, model: Model, asked: int | None = None) -> Batches:
    """`examples` in batches of `origin.batch_size`, the first of which has been checked against the model."""
    from compress.encoding import encoder

    groups, encode = cut(examples, origin.batch_size), encoder(examples[0], origin.max_length, model)
    require_fit(encode(groups[0]), model, f"The {origin.kind} data")
    return Batches(groups, encode, len(examples), asked or len(examples))


def cut(examples: Sequence[Example], size: int) -> tuple[Sequence[Example], ...]:
    """`examples` in groups of `size`, in order; the last one may be smaller."""
    return tuple(examples[at : at + size] for at in range(0, len(examples), size))


def read_examples(origin: Origin) -> list[Example]:
    """All examples of `origin`. Raises `DataError` if there are none."""
    if origin.kind == "images":
        return list(pictures(_path(origin)))
    if origin.kind == "text":
        return list(text_lines(_path(origin)))
    names = origin.columns or (origin.column or "",)
    columns = [read_table(origin).column(name) for name in names]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def read_table(origin: Origin) -> Table:
    """The table that `origin` names."""
    return rows_of(origin.kind, origin.path or Path(), (origin.dataset or "", origin.subset, origin.split))


def spread(examples: Sequence[Example], count: int | None) -> list[Example]:
    """`count` of the examples (None: all), evenly spread, since files are often sorted by class or topic."""
    if count is None or len(examples) <= count:
        return list(examples)
    return [examples[number * len(examples) // count] for number in range(count)]


LABELS = "labels"
"""The argument by which models of transformers take the right answers, and then give their loss."""


def without_labels(batch: Inputs) -> Inputs:
    """What `batch` has besides labels."""
    return {name: value for name, value in batch.items() if name != LABELS}


def as_batches(given: Iterable[Mapping[str, torch.Tensor]], model: Model, labels: bool = False) -> Batches:
    """`given` batches of forward keyword arguments, checked against `model.example` and kept in memory.

    With `labels` they may have these, too, as training data has. Raises `DataError` for no batch, for names or ranks
    that differ from the example's, and for values that are not finite.
    """
    groups = tuple(dict(batch) for batch in given)
    if not groups:
        raise DataError("There is no batch in the data.", "Give at least one batch of forward arguments.")
    for number, batch in enumerate(groups):
        require_fit(without_labels(batch) if labels else batch, model, f"Batch {number} of the data")
    samples = sum(len(next(iter(batch.values()))) for batch in groups)
    return Batches(tuple((batch,) for batch in groups), lambda group: group[0], samples, samples)


def require_fit(batch: Inputs, model: Model, what: str) -> None:
    """Raise `DataError` unless `batch` has the names and ranks of the model's example, and is finite."""
    wanted, given = set(model.example), set(batch)
    if wanted != given:
        raise DataError(
            f"{what} gives the arguments {_names(given)}, and the model takes {_names(wanted)}.",
            "Give batches with these arguments: `compress.data.as_batches` takes them from Python.",
        )
    for name, tensor in batch.items():
        example = model.example[name]
        if tensor.dim() != example.dim() or _picture_size(tensor) != _picture_size(example):
            raise DataError(
                f"{what} has `{name}` of shape {_shape(tensor)}, and the model takes {_shape(example)}.",
                "Only the batch and the length may differ. Use the model's own tokenizer or image processor.",
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(
                f"{what} has values in `{name}` that are not finite.", "Remove them from the data."
            )


def _picture_size(tensor: torch.Tensor) -> tuple[int, ...]:
    """Channels, height and width, the part of a shape that a model fixes; nothing for sequences."""
    return tuple(tensor.shape[1:]) if tensor.dim() >= 4 else ()


def _path(origin: Origin) -> Path:
    assert origin.path is not None, "a dataset has no path"
    return origin.path


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape)
