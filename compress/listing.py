"""What there is to use: shipped recipes, and the passes and targets of installed packages."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from compress.catalog import available, find
from compress.errors import UsageError
from compress.recipe import GROUPS, load_recipe, recipe_path, shipped_recipes
from compress.wording import did_you_mean


def summaries(what: str) -> dict[str, str]:
    """Names and one line each of `what`: "recipes", "passes" or "targets"."""
    if what == "recipes":
        return {name: load_recipe(name).summary for name in shipped_recipes()}
    group = GROUPS["passes" if what == "passes" else "export"]
    return {name: _first_line(find(group, name)) for name in available(group)}


def described(name: str) -> str:
    """The file of the shipped recipe `name`, or the description and settings of the pass or target `name`.

    Raises `UsageError` for an unknown name.
    """
    if name in shipped_recipes():
        return recipe_path(name).read_text(encoding="utf-8").rstrip()
    for group in GROUPS.values():
        if name in available(group):
            return _settings(name, find(group, name))
    known = [*shipped_recipes(), *(one for group in GROUPS.values() for one in available(group))]
    raise UsageError(
        f"There is no recipe, pass or target `{name}`.{did_you_mean(name, known)}",
        f"There are: {', '.join(known)}.",
    )


def _first_line(cls: type[BaseModel]) -> str:
    return inspect.cleandoc(cls.__doc__ or "").split("\n", 1)[0]


def _settings(name: str, cls: type[BaseModel]) -> str:
    lines = [f"{name}: {inspect.cleandoc(cls.__doc__ or '')}", "", "Settings:"]
    for key, field in cls.model_fields.items():
        if key != "use":
            lines += _setting(key, field)
    return "\n".join(lines)


def _setting(key: str, field: FieldInfo) -> list[str]:
    default = (
        "required"
        if field.is_required()
        else f"default {_written(field.get_default(call_default_factory=True))}"
    )
    head = f"  {key}: {_type(field.annotation)} ({default})"
    return [head, *(f"      {line}" for line in (field.description or "").splitlines())]


def _type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("NoneType", "None")


def _written(value: Any) -> str:
    """A default as it would stand in a recipe."""
    if isinstance(value, BaseModel):
        return "all" if value == type(value)() else str(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in (None, (), {}) else str(value)
