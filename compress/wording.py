"""What pydantic found wrong, in plain words: the key, the value that stands there, and what may stand."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

Location = tuple[str | int, ...]
KnownKeys = Callable[[Location], Sequence[str]]
"""The keys that may stand in the mapping at a location."""

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "set": "a list without repetitions",
    "dict": "a mapping of keys",
    "mapping": "a mapping of keys",
    "model": "a mapping of keys",
    "path": "a path",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean `x`?" for the known word most like `word`, or nothing."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""


def complaints(error: ValidationError, value: Any, known_keys: KnownKeys) -> list[tuple[Location, str]]:
    """Each thing that is wrong with `value`, once: where, and one or two sentences."""
    said: dict[Location, str] = {}
    for found in error.errors(include_url=False):
        location = found["loc"] if found["type"] == "missing" else _within(value, found["loc"])
        said.setdefault(location, _sentence(found, location, known_keys))
    return list(said.items())


def dotted(location: Location) -> str:
    """`passes[0].scope.include`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    return text.removeprefix(".")


def _within(value: Any, location: Location) -> Location:
    """The part of `location` that exists in `value`; pydantic adds the names of union members to it."""
    for end, key in enumerate(location):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return location[:end]
    return location


def _sentence(found: Mapping[str, Any], location: Location, known_keys: KnownKeys) -> str:
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    name = f"`{dotted(location)}`" if location else "the recipe"
    if kind == "missing":
        return f"{name} is missing."
    if kind == "extra_forbidden":
        keys = known_keys(location[:-1])
        guess = did_you_mean(str(location[-1]), keys)
        return f"{name} is not a known key.{guess} Known here: {', '.join(keys)}."
    if kind == "literal_error":
        expected = context["expected"]
        return f"{name} must be {expected}, not {shown(value)}.{_near_literal(value, expected)}"
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{name} must be {word} {context[key]}, not {shown(value)}."
    if kind in ("too_short", "too_long"):
        bound = (
            f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        )
        return f"{name} must have {bound} entries, not {context['actual_length']}."
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return f'{name} must be text, not the number {value}: write it in quotes, "{value}".'
    what, _, trouble = kind.partition("_")
    expected = _EXPECTED.get(what)
    if expected and trouble in ("type", "parsing", "from_float", "number", "attributes_type"):
        return f"{name} must be {expected}, not {shown(value)}."
    return f"{name}: {_own_words(found['msg'])}"


def _near_literal(value: object, expected: str) -> str:
    return did_you_mean(str(value), expected.replace("'", "").replace(" or ", ", ").split(", "))


def _own_words(message: str) -> str:
    text = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return text if text.endswith((".", "?")) else f"{text}."


def shown(value: object) -> str:
    """A value as the reader wrote it, cut at 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
