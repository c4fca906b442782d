"""A recipe: a model, data, passes, targets and what to accept, read from YAML and checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema
from pydantic_core import InitErrorDetails, PydanticCustomError

from compress.catalog import Group, available, find
from compress.data import Origin, Source, source_at
from compress.document import Document, position, read_document
from compress.errors import DataError, RecipeError, UsageError
from compress.evaluate import Evaluation
from compress.labels import require_labels
from compress.passes.base import Pass, unpaid
from compress.target import Target
from compress.wording import Location, complaints, did_you_mean

GROUPS: Mapping[str, Group] = {"passes": "compress.passes", "export": "compress.targets"}
"""The lists of a recipe whose items are found by name, and where."""


def _found(group: Group) -> BeforeValidator:
    """Turns a mapping with `use: name` into the settings class of that name."""

    def parse(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("use"), str):
            raise PydanticCustomError(
                "no_use", "`use` is missing: which one of {known}.", {"known": _listed(group)}
            )
        try:
            return find(group, value["use"]).model_validate(value)
        except RecipeError as error:
            raise PydanticCustomError(
                "unknown", "{text}", {"text": f"{error.fact} {error.remedy}"}
            ) from error

    return BeforeValidator(parse)


def _listed(group: Group) -> str:
    return ", ".join(f"`{name}`" for name in available(group))


CALIBRATED_ON = 64
"""So many examples of the training data calibrate a recipe that has no calibration data."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Part):
    """Which model, for which task, in which float type."""

    name: str | None = Field(
        default=None, description="A folder or a name on the model hub; `--model` replaces it."
    )
    task: str = Field(
        description="The task, as transformers names its pipelines: feature-extraction, fill-mask, ..."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class DataSpec(_Part):
    """The data of a recipe, each part needed only by those passes and thresholds that use it."""

    calibration: Source | None = Field(
        default=None,
        description="What passes measure the model on. Without it: examples of the training data.",
    )
    training: Source | None = Field(
        default=None, description="What passes train on; with `label` for those whose `task` is above 0."
    )
    heldout: Source | None = Field(
        default=None,
        description="Inputs kept out of calibration, on which results are compared with the original.",
    )
    evaluation: Evaluation | None = None

    @field_validator("calibration", "heldout")
    @classmethod
    def _unlabelled(cls, source: Source | None) -> Source | None:
        if source is not None and source.label:
            raise ValueError("`label` has no effect here: only training and evaluation read labels.")
        return source

    def source(self, use: Literal["calibration", "training"]) -> Source | None:
        """The source for this use; to calibrate without one of its own, up to `CALIBRATED_ON` training examples."""
        if use == "training" or self.calibration or not self.training:
            return getattr(self, use)
        fewer = min(self.training.samples, CALIBRATED_ON)
        return self.training.model_copy(update={"samples": fewer, "label": None})


class Accept(_Part):
    """What the result must reach; otherwise the exit status is 4."""

    max_drop: float | None = Field(
        default=None, ge=0, description="Most that the evaluation's score may lose (points)."
    )
    min_speedup: float | None = Field(
        default=None, gt=0, description="Times as fast as the same export uncompressed."
    )
    min_cosine: float | None = Field(
        default=None, le=1, description="Lowest cosine of any row to the original's."
    )


class Measure(_Part):
    """How speed is measured: inputs of this shape, so many calls in each of so many alternating rounds."""

    shape: dict[str, int] = Field(
        default={"batch": 16, "sequence": 128},
        description="Sizes by name: `batch`, and `sequence` for models of tokens.",
    )
    rounds: int = Field(default=3, ge=1)
    calls: int = Field(default=8, ge=1)
    threads: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _known_dimensions(self) -> Measure:
        for name, size in self.shape.items():
            if name not in ("batch", "sequence") or size < 1:
                raise ValueError(f"`shape` has `batch` and `sequence`, from 1 up, not `{name}: {size}`.")
        return self


class Recipe(_Part):
    """The whole of a recipe file."""

    summary: str
    model: ModelSpec
    data: DataSpec = DataSpec()
    passes: tuple[Annotated[SerializeAsAny[Pass], _found("compress.passes")], ...] = ()
    export: tuple[Annotated[SerializeAsAny[Target], _found("compress.targets")], ...] = ()
    measure: Measure = Measure()
    accept: Accept = Accept()

    @field_validator("passes")
    @classmethod
    def _are_paid(cls, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        if debt := unpaid(passes):
            said = PydanticCustomError("unpaid", "{text}", {"text": f"{debt.fact} {debt.remedy}"})
            # The error of an item, so that it is shown where the item stands.
            raise ValidationError.from_exception_data(
                cls.__name__, [InitErrorDetails(type=said, loc=(debt.place,), input=passes[debt.place])]
            )
        return passes

    @model_validator(mode="after")
    def _does_something(self) -> Recipe:
        if not self.passes and not self.export:
            raise ValueError("there is nothing to do: give `passes`, `export`, or both.")
        if self.accept.max_drop is not None and self.data.evaluation is None:
            raise ValueError("`accept.max_drop` needs `data.evaluation`, which says how to score the model.")
        if self.accept.min_speedup is not None and not self.export:
            raise ValueError("`accept.min_speedup` needs an `export` whose speed can be measured.")
        if self.data.training is not None and self.data.training.label and not self.learns_labels:
            raise ValueError(
                "`data.training.label` has no effect: no pass learns labels. Set `task` of one that trains."
            )
        return self

    @property
    def learns_labels(self) -> bool:
        """Whether a pass takes labels with its training batches."""
        return any(one.learns_labels() for one in self.passes)

    def with_model(self, name: str | None = None, task: str | None = None) -> Recipe:
        """The same recipe for another model, another task, or both."""
        given = {key: value for key, value in (("name", name), ("task", task)) if value is not None}
        return self.model_copy(update={"model": self.model.model_copy(update=given)})

    def with_calibration(self, path: Path) -> Recipe:
        """The same recipe, calibrated on the file or folder at `path`; see `source_at`."""
        source = source_at(path, like=self.data.calibration)
        return self.model_copy(update={"data": self.data.model_copy(update={"calibration": source})})

    def with_training(self, path: Path) -> Recipe:
        """The same recipe, trained on the file or folder at `path`; see `source_at`.

        Without training data in the recipe, 4096 samples of up to 512 tokens are taken, 8 a batch.
        """
        like = self.data.training or Source(text=path, samples=4096, max_length=512, batch_size=8)
        source = source_at(path, like=like, field="training")
        return self.model_copy(update={"data": self.data.model_copy(update={"training": source})})


def shipped_recipes() -> tuple[str, ...]:
    """The names of the recipes that come with this package, sorted."""
    names = (Path(file.name) for file in files("recipes").iterdir())
    return tuple(sorted(name.stem for name in names if name.suffix == ".yaml"))


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe, given by path or by a shipped recipe's name. Raises `RecipeError` without one."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if str(name_or_path) in shipped_recipes():
        with as_file(files("recipes") / f"{name_or_path}.yaml") as shipped:
            return shipped
    if path.is_dir():
        raise RecipeError(
            f"{path} is a folder, not a recipe.", "Give a recipe file or a shipped recipe's name."
        )
    known = shipped_recipes()
    raise RecipeError(
        f"There is no recipe file {path} and no shipped recipe of that name.{did_you_mean(path.stem, known)}",
        f"Shipped recipes: {', '.join(known)}.",
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read and check a recipe: a shipped one by its name, or a file.

    Relative paths of data, and a model name that begins with a dot, are relative to the recipe file. Raises
    `RecipeError` that shows each wrong key with its file, line and column.
    """
    document = read_document(recipe_path(name_or_path))
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        raise _located(error, document) from None
    return _anchored(recipe, document.path.parent)


def _located(error: ValidationError, document: Document) -> RecipeError:
    def known_keys(location: Location) -> tuple[str, ...]:
        return _keys_at(location, document.value)

    found = sorted(
        ((document.mark(location), text) for location, text in complaints(error, document.value, known_keys)),
        key=lambda pair: (pair[0].line, pair[0].column),
    )
    said = [f"{position(document.path, mark)}: {text}\n{document.quote(mark)}" for mark, text in found]
    return RecipeError("\n".join(said), "Correct the recipe; `modelpress validate RECIPE` checks it again.")


def _keys_at(location: Location, value: Any) -> tuple[str, ...]:
    """The keys that may stand in the mapping at `location` of a recipe with this `value`."""
    model: type[BaseModel] | None = Recipe
    for key in location:
        value = value[key]
        if isinstance(key, str):
            field = model.model_fields.get(key) if model else None
            model = _model_in(field.annotation) if field else None
        if model in (Pass, Target) and isinstance(value, dict):
            model = find(GROUPS["passes" if model is Pass else "export"], value["use"])
    return tuple(model.model_fields) if model else ()


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic class that an annotation such as `tuple[Source | None, ...]` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with its relative paths made relative to `folder`."""

    def anchor(origin: Origin | None) -> Origin | None:
        if origin is None or origin.path is None:
            return origin
        return origin.model_copy(update={origin.kind: folder / origin.path.expanduser()})

    data = {name: anchor(getattr(recipe.data, name)) for name in DataSpec.model_fields}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    name = recipe.model.name
    return recipe.with_model(str(folder / name)) if name and name.startswith(("./", "../")) else recipe


def require_complete(recipe: Recipe) -> None:
    """Raise `UsageError` if the recipe names no model, or `DataError` if data that it needs is not there."""
    if recipe.model.name is None:
        raise UsageError("The recipe names no model.", "Give one: `--model FOLDER_OR_NAME`.")
    for one in recipe.passes:
        if one.needs != "nothing" and recipe.data.source(one.needs) is None:
            raise DataError(
                f"The pass `{one.use}` needs {one.needs} data, and the recipe has no `data.{one.needs}`.",
                f"Give it in the recipe or `--{one.needs} PATH` (a text file, a table, or a folder of images).",
            )
    require_files(recipe)
    require_labelled(recipe)


def require_labelled(recipe: Recipe) -> None:
    """Raise `DataError` if a pass learns labels, and the training data that the recipe names cannot have any."""
    if recipe.learns_labels and recipe.data.training is not None:
        require_labels(recipe.data.training, recipe.model.task)


def require_files(recipe: Recipe) -> None:
    """Raise `DataError` if a file or folder of data that the recipe names does not exist."""
    for name in DataSpec.model_fields:
        origin: Origin | None = getattr(recipe.data, name)
        if origin is not None and origin.path is not None and not origin.path.exists():
            raise DataError(
                f"The {name} data is not there: {origin.path} does not exist.",
                "Correct the path; in a recipe it is relative to the recipe file.",
            )


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, with every installed pass and target: editors complete and check by it."""
    classes = {key: [find(group, name) for name in available(group)] for key, group in GROUPS.items()}
    modes: list[Any] = [(cls, "validation") for cls in (Recipe, *classes["passes"], *classes["export"])]
    references, tree = models_json_schema(modes, title="modelpress recipe")
    definitions = tree["$defs"]
    recipe = definitions.pop("Recipe")
    for key, found in classes.items():
        items = [references[cast(Any, (cls, "validation"))] for cls in found]
        recipe["properties"][key]["items"] = {"anyOf": items}
        for item in items:
            # In Python `use` has a default; in a file it is what tells one class from another.
            definition = definitions[item["$ref"].rsplit("/", 1)[1]]
            definition["required"] = sorted({"use", *definition.get("required", ())})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "$defs": definitions}
