"""The passes and targets that installed packages declare as entry points: the only look-up by name."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, overload

from compress.errors import ModelpressError, RecipeError
from compress.wording import did_you_mean

if TYPE_CHECKING:
    from compress.passes.base import Pass
    from compress.target import Target

Group = Literal["compress.passes", "compress.targets"]


def available(group: Group) -> tuple[str, ...]:
    """The names that installed packages declare in `group`, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


@overload
def find(group: Literal["compress.passes"], name: str) -> type[Pass]: ...
@overload
def find(group: Literal["compress.targets"], name: str) -> type[Target]: ...
def find(group: Group, name: str) -> type[Pass] | type[Target]:
    """The class that an installed package declares as `name` in `group`. Raises `RecipeError` without one."""
    for entry in entry_points(group=group, name=name):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist else "?"
            raise ModelpressError(
                f"The package {package} declares `{name}` as {entry.value}, which cannot be loaded: {error}.",
                f"Install that package again, or remove it: pip uninstall {package}",
            ) from error
    known = available(group)
    what, listing = ("pass", "list passes") if group == "compress.passes" else ("target", "list targets")
    raise RecipeError(
        f"There is no {what} `{name}`.{did_you_mean(name, known)}",
        f"Installed: {', '.join(known)}. `modelpress {listing}` describes them.",
    )
