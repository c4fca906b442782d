"""Examples from files: lines of text, columns of tables, pictures in folders, rows of a dataset."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import DataError, MissingPackage

Example = Any
"""A text, a pair of texts, a tensor of token numbers, the path of a picture, or a `PIL.Image.Image`."""

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Table:
    """Rows with named columns; `where` names the file or dataset in messages."""

    where: str
    rows: list[dict[str, Any]]

    def column(self, name: str) -> list[Any]:
        """The values of one column. Raises `DataError` if a row does not have it."""
        for number, row in enumerate(self.rows, start=1):
            if row.get(name) is None:
                columns = ", ".join(f"`{column}`" for column in self.rows[0])
                where = (
                    f"{self.where} has" if name not in self.rows[0] else f"Row {number} of {self.where} has"
                )
                raise DataError(f"{where} no column `{name}`.", f"The columns are {columns}.")
        return [row[name] for row in self.rows]


def whole_text(path: Path) -> str:
    """The text of a file. Raises `DataError` if it is missing, blank or not UTF-8."""
    text = _read(path)
    if not text.strip():
        raise DataError(f"{path} is empty.", "Give a file with some text.")
    return text


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file that are not blank, stripped."""
    return (line.strip() for line in whole_text(path).splitlines() if line.strip())


def pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, sorted."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.", "Give a folder of pictures.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise DataError(
            f"There are no pictures in {folder}.", f"Pictures are files named {', '.join(PICTURES)}."
        )
    return found


def rows_of(kind: str, path: Path, dataset: tuple[str, str | None, str]) -> Table:
    """The table at `path`, or of `dataset` (name, subset, split). Raises `DataError` if it is empty."""
    if kind == "dataset":
        return _dataset(*dataset)
    rows = _jsonl(path, _read(path)) if kind == "jsonl" else _separated(path, _read(path), kind)
    if not rows:
        raise DataError(f"{path} is empty.", "Give a file with a header line and at least one row.")
    return Table(str(path), rows)


def _read(path: Path) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"{path} {what}.", "Give the path of a file; in a recipe it is relative to the recipe file."
        )
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}.", "Check the file; `.gz` files are packed with gzip."
        ) from error
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise DataError(f"{path} is not UTF-8 text: {where}.", "Save it as UTF-8.") from error


def _separated(path: Path, text: str, kind: str) -> list[dict[str, Any]]:
    if kind == "tsv":
        # No quoting: a quotation mark in a tab-separated file is a character like any other.
        lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    else:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    header, rows = (lines[0], [line for line in lines[1:] if any(line)]) if lines else ([], [])
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(
                f"Row {number} of {path} has {len(row)} columns, and its header has {len(header)}.",
                f"The header is: {', '.join(header)}. Correct the row, or check that this is a {kind} file.",
            )
    return [dict(zip(header, row, strict=True)) for row in rows]


def _jsonl(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"Line {number} of {path} is not JSON: {error}.", "Write one object a line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"Line {number} of {path} is no JSON object.", 'Write lines such as {"text": "..."}.'
            )
        rows.append(row)
    return rows


def _dataset(name: str, subset: str | None, split: str) -> Table:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackage(
            f"The data names the dataset {name}, and the package `datasets` is not installed.",
            "pip install datasets",
        ) from error
    rows = list(load_dataset(name, subset, split=split))
    if not rows:
        raise DataError(f"The split `{split}` of the dataset {name} is empty.", "Name another split.")
    return Table(f"The dataset {name}", rows)
