"""Which modules a pass may touch: include and exclude globs on module paths."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict

from compress.errors import RecipeError


class Scope(BaseModel):
    """Globs on dotted module paths, as `named_modules` gives them. `*` also crosses dots.

    A path is in scope if any `include` glob matches it (no `include` means all paths) and no `exclude` glob does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __contains__(self, path: str) -> bool:
        included = not self.include or any(fnmatchcase(path, glob) for glob in self.include)
        return included and not any(fnmatchcase(path, glob) for glob in self.exclude)

    def require_matches(self, paths: Iterable[str]) -> None:
        """Raise `RecipeError` if a glob matches none of `paths` (all module paths of the model)."""
        known = list(paths)
        for glob in (*self.include, *self.exclude):
            if not any(fnmatchcase(path, glob) for path in known):
                examples = ", ".join(known[:: max(1, len(known) // 5)][:5])
                raise RecipeError(
                    f"The scope `{glob}` matches none of the {len(known)} modules of this model.",
                    f"Module paths look like: {examples}. `modelpress inspect MODEL` prints them all.",
                )
