"""Values that are written on the command line in a form of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compress.errors import UsageError


def profiles(text: str) -> dict[str, tuple[int, int, int]]:
    """`batch=1:8:32,sequence=128`: smallest, usual and largest size of each dimension, or one for all."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, sizes = part.partition("=")
        numbers = sizes.split(":")
        if not name or len(numbers) not in (1, 3) or not all(number.isdigit() for number in numbers):
            raise UsageError(
                f"`{part}` in --shapes is not NAME=SMALLEST:USUAL:LARGEST.",
                "Write, for example, --shapes batch=1:8:32,sequence=16:128:512",
            )
        low, usual, high = map(int, numbers * 3 if len(numbers) == 1 else numbers)
        found[name.strip()] = (low, usual, high)
    return found


def sizes(text: str) -> dict[str, int]:
    """`16x128` (batch and sequence), `8` (batch), or `batch=16,sequence=128`."""
    if "=" in text:
        pairs = [part.partition("=")[::2] for part in text.split(",")]
    else:
        pairs = list(zip(("batch", "sequence"), text.lower().split("x"), strict=False))
    if text.lower().count("x") > 1 or not all(name and size.isdigit() and int(size) for name, size in pairs):
        raise UsageError(
            f"--shape {text} is no shape.", "Write 16x128 (batch and sequence), or batch=16,sequence=128."
        )
    return {name.strip(): int(size) for name, size in pairs}


def settings(texts: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, each value as it would stand in a recipe."""
    import yaml

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--set {text} is not KEY=VALUE.", "Write, for example, --set opset=21")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {text}: the value is not YAML: {error}.", "Put it in quotes.") from error
    return found


def require_with(option: str, given: bool, others: Mapping[str, bool]) -> None:
    """Raise `UsageError` if one of `others` was given (its value says so) without `option`, which it belongs to."""
    strangers = [name for name, present in others.items() if present and not given]
    if strangers:
        raise UsageError(f"{strangers[0]} goes with {option}.", f"Add {option}, or leave {strangers[0]} out.")
