"""A YAML file that remembers where each of its keys stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError

Location = Sequence[str | int]
"""Keys and list positions from the top of a document to one of its values."""


@dataclass(frozen=True)
class Document:
    """A parsed YAML mapping: the file, its text, its plain `value`, and the node tree with the positions."""

    path: Path
    text: str
    value: dict[str, Any]
    root: yaml.MappingNode

    def mark(self, location: Location) -> yaml.Mark:
        """Where the key (or list item) at `location` begins, or the last of its ancestors that exists."""
        node: yaml.Node | None = self.root
        mark = self.root.start_mark
        for key in location:
            found = _child(node, key)
            if found is None:
                return mark
            mark, node = found
        return mark

    def quote(self, mark: yaml.Mark) -> str:
        """The line of `mark` with a caret under its column."""
        return _quote(self.text, mark)


def read_document(path: Path) -> Document:
    """Parse `path`. Raises `RecipeError` for an unreadable file, bad syntax, a repeated key, no mapping."""
    text = _text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _refuse_repeated_keys(path, text, root)
        value = loader.construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, text, error) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: this is not YAML: {error}", "Correct the file.") from None
    if not isinstance(root, yaml.MappingNode) or not isinstance(value, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys, and this file holds {_kind(value)}.",
            "Begin with `summary:`, `model:`, `passes:`; `modelpress show bert-int8-cpu` prints a recipe.",
        )
    return Document(path, text, value, root)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}.", "Give the path of a recipe file."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.", "Save it as UTF-8."
        ) from error


def _child(node: yaml.Node | None, key: str | int) -> tuple[yaml.Mark, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        item = node.value[key]
        return item.start_mark, item
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value == str(key):
                return name.start_mark, value
    return None


def _refuse_repeated_keys(path: Path, text: str, root: yaml.Node | None) -> None:
    for mapping in _mappings(root, set()):
        first: dict[str, yaml.Mark] = {}
        for name, _ in mapping.value:
            if not isinstance(name, yaml.ScalarNode):
                continue
            if name.value in first:
                mark = name.start_mark
                raise RecipeError(
                    f"{position(path, mark)}: the key `{name.value}` stands here for the second time;"
                    f" the first is in line {first[name.value].line + 1}.\n{_quote(text, mark)}",
                    "Keep one of the two.",
                )
            first[name.value] = name.start_mark


def _mappings(node: yaml.Node | None, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """All mappings below `node`, each once: an alias is the same node again."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _mappings(item, seen)


def _syntax_error(path: Path, text: str, error: yaml.MarkedYAMLError) -> RecipeError:
    what = ", ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return RecipeError(f"{path}: this is not YAML: {what}.", "Correct the file.")
    return RecipeError(
        f"{position(path, mark)}: this is not YAML: {what}.\n{_quote(text, mark)}",
        "Look for a missing colon, quote or bracket, or odd indentation, in this line or the one above.",
    )


def position(path: Path, mark: yaml.Mark) -> str:
    """`file:line:column`, counted from 1."""
    return f"{path}:{mark.line + 1}:{mark.column + 1}"


def _quote(text: str, mark: yaml.Mark) -> str:
    lines = text.splitlines()
    if mark.line >= len(lines):
        return "  (end of the file)"
    number = f"  {mark.line + 1} | "
    return f"{number}{lines[mark.line]}\n{' ' * (len(number) + mark.column)}^"


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    return "a list" if isinstance(value, list) else f"only {value!r}"
