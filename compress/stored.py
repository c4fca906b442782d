"""Tensors in the safetensors files of a folder: one file, or several with an index, read and written part by part.

Only the headers of the files are read until a tensor is asked for, and a tensor is a copy: no page of a file stays in
memory behind it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, its type as safetensors names it, and its bytes."""

    file: Path
    kind: str
    bytes: int


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder by name."""

    folder: Path
    entries: Mapping[str, Entry]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors `names` as they are stored. Raises `ModelError` for one that no file holds, or cannot give."""
        from safetensors import SafetensorError, safe_open

        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.entries:
                raise ModelError(f"{self.folder} has no tensor `{name}`.", "Write or fetch the model again.")
            wanted.setdefault(self.entries[name].file, []).append(name)
        found = {}
        for file, inside in wanted.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    found |= {name: opened.get_tensor(name).clone() for name in inside}
            except (OSError, SafetensorError) as error:
                raise _broken(file, error) from error
        return found


def stored_in(folder: Path) -> Stored:
    """The tensors of `folder`. Raises `ModelError` if it has no weights, a file of them is missing, or one is cut."""
    entries = {}
    for file in weight_files(folder):
        for name, said in _header(file).items():
            begin, end = said["data_offsets"]
            entries[name] = Entry(file, said["dtype"], end - begin)
    return Stored(folder, entries)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the weights in `folder`. Raises `ModelError` if there is none, or one is missing."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        raise ModelError(
            f"The folder {folder} is not whole: it has neither {SINGLE} nor {INDEX}.",
            "Name a folder with safetensors weights, as save_pretrained and compress.save write it.",
        )
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise _broken(index, error) from error
    files = [folder / name for name in sorted(set(names))]
    for file in files:
        if not file.exists():
            raise ModelError(
                f"The file {file} is missing, which {index.name} names as one of {len(files)}.",
                "Fetch or write the model again, whole.",
            )
    return files


def _header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors: type, shape, and where their bytes begin and end."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        ends = [said["data_offsets"][1] for name, said in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
        if file.stat().st_size < whole:
            raise ValueError(f"it has {file.stat().st_size} bytes of {whole}")
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError, struct.error) as error:
        raise _broken(file, error) from error
    header.pop("__metadata__", None)
    return header


def _broken(file: Path, error: Exception) -> ModelError:
    return ModelError(f"The file {file} cannot be read: {error}.", "Fetch or write the model again.")


@dataclass
class Shards:
    """Writes tensors into `folder`, one file a call. Several processes may write there, each with its number."""

    folder: Path
    process: int = 0
    written: dict[str, str] = field(default_factory=dict)
    """The file of each tensor that this process wrote."""

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write `tensors`, contiguous, as one more file."""
        from safetensors.torch import save_file

        name = f"part-{self.process:03d}-{len(set(self.written.values())):05d}.safetensors"
        save_file(dict(tensors), self.folder / name, metadata={"format": "pt"})
        self.written |= dict.fromkeys(tensors, name)


def close_shards(folder: Path, written: Mapping[str, str]) -> None:
    """Give the files that hold the tensors `written` their final names, and write the index over them."""
    files = sorted(set(written.values()))
    final = {
        name: f"model-{place:05d}-of-{len(files):05d}.safetensors"
        for place, name in enumerate(files, start=1)
    }
    for name, to in final.items():
        (folder / name).rename(folder / to)
    places = {name: final[file] for name, file in written.items()}
    total = sum((folder / name).stat().st_size for name in final.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
