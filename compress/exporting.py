"""Export one model to one target, quantizing it first if that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from compress.build import apply
from compress.catalog import find
from compress.checkpoint import open_model
from compress.data import Source, batches, source_at
from compress.errors import DataError, UsageError
from compress.folders import new_folder
from compress.progress import SILENT, Observer, task
from compress.target import Artifact, Target
from compress.wording import complaints

if TYPE_CHECKING:
    from rich.table import Table

    from compress.model import DType, Model


def target_with(name: str, settings: Mapping[str, Any]) -> Target:
    """The target `name` with `settings`, those that are None left out. Raises `UsageError` for wrong ones."""
    cls = find("compress.targets", name)
    given = {key: value for key, value in settings.items() if value not in (None, (), [], {})}
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        said = [text for _, text in complaints(error, given, lambda _: tuple(cls.model_fields))]
        raise UsageError(
            "\n".join(f"The target {name}: {text}" for text in said),
            f"`modelpress show {name}` lists its settings.",
        ) from None


def target_for(name: str, precision: str | None, settings: Mapping[str, Any]) -> tuple[Target, DType]:
    """The target `name` with `settings`, and the float type to load the model in.

    A target without a setting `precision` takes it from the model: float types are loaded, int8 is quantized.
    """
    if precision is not None and "precision" not in find("compress.targets", name).model_fields:
        if precision not in ("float32", "float16", "bfloat16", "int8"):
            raise UsageError(
                f"There is no precision {precision}.", "Give float32, float16, bfloat16 or int8."
            )
        return target_with(name, settings), "float32" if precision == "int8" else cast("DType", precision)
    return target_with(name, {**settings, "precision": precision}), "float32"


def export_model(
    name: str,
    to: str,
    settings: Mapping[str, Any],
    into: Path,
    *,
    task_name: str | None = None,
    precision: str | None = None,
    calibration: Path | None = None,
    force: bool = False,
    observer: Observer = SILENT,
) -> Artifact:
    """Write the model or checkpoint `name` with the target `to` into the new folder `into`, which appears whole.

    With `precision` int8, a float model goes through `smooth` and `quantize` first, on the data at `calibration`.
    """
    target, dtype = target_for(to, precision, settings)
    source = source_at(calibration) if calibration else None
    with new_folder(into, force) as partial:
        with task(observer, f"load {name}"):
            model = open_model(name, task_name, dtype=dtype)
        target.check(model)
        if precision == "int8":
            model = _quantized(model, source, observer)
        artifact = target.write(model, partial, observer)
    return replace(artifact, folder=into)


def _quantized(model: Model, calibration: Source | None, observer: Observer) -> Model:
    from compress.layers.quantized import is_quantized

    if is_quantized(model.module):
        return model
    if calibration is None:
        raise DataError(
            f"The model {model.source} is in float, and --precision int8 needs data to calibrate on.",
            "Give `--calibration PATH` (a text, a table, a folder of pictures), or a quantized checkpoint.",
        )
    smooth = find("compress.passes", "smooth").model_validate({"use": "smooth", "allow_empty": True})
    quantize = find("compress.passes", "quantize").model_validate({"use": "quantize"})
    return apply(model, [smooth, quantize], calibration=batches(calibration, model), observer=observer).model


def as_table(artifact: Artifact) -> Table:
    """What was written and how it was proved, one row a fact."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"Exported to {artifact.target}", box=box.SIMPLE_HEAD, show_header=False)
    for file in artifact.files:
        table.add_row(file.name, f"{file.bytes / 1e6:.2f} MB")
    table.add_row(
        "proof",
        f"{artifact.parity.relative:.1e} of the largest value, lowest cosine {artifact.parity.cosine:.5f}",
    )
    for name, value in artifact.facts.items():
        if isinstance(value, str | int | float):
            table.add_row(name.replace("_", " "), str(value))
    return table
