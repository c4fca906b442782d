"""What a target is: it writes a model as files for one runtime, and runs them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from compress.progress import SILENT, Observer
from compress.report import Parity
from compress.timing import Variant

if TYPE_CHECKING:
    from compress.model import Model


Runner = Callable[..., Any]
"""Takes forward keyword arguments (tensors) and returns what the source model returns, as attributes and keys."""


@dataclass(frozen=True)
class File:
    """A written file: its path inside the artifact's folder, its size in bytes and its sha256 (hex)."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an artifact; a dynamic dimension is its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Artifact:
    """What a target wrote into `folder`, with its proof.

    `parity` is the artifact (or, for an engine that cannot run here, the graph it was built from) against the module
    it came from. `facts` are JSON values of the target's own: versions, node counts, profiles.
    """

    folder: Path
    target: str
    settings: dict[str, Any]
    files: tuple[File, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity
    facts: dict[str, Any] = field(default_factory=dict)
    source: Artifact | None = None


class Target(BaseModel, ABC):
    """A runtime to export to. The fields of a subclass are its settings; a subclass is final.

    A subclass declares `use: Literal["its-name"] = "its-name"`. Its module imports nothing heavy at the top.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    use: str

    def check(self, model: Model) -> None:
        """Raise `MissingPackage` or `Unsuitable` before any work is done. `model` is not compressed yet."""

    def baseline(self) -> Target:
        """The target that exports the uncompressed model in the same way and the same float precision."""
        return self

    @abstractmethod
    def write(self, model: Model, into: Path, observer: Observer = SILENT) -> Artifact:
        """Write `model` into the empty folder `into`, prove it against `model.module`, which is left as it was."""

    @abstractmethod
    def load(self, artifact: Artifact) -> Runner:
        """Open a written artifact. Raises `WrongDevice` where it is for another device than this machine has."""

    def variant(self, artifact: Artifact, name: str, inputs: Path) -> Variant | None:
        """How to time `artifact` on the tensors in the safetensors file `inputs`; None if it cannot run here."""
        del artifact, name, inputs
        return None


def files_of(folder: Path) -> tuple[File, ...]:
    """Every file below `folder` with its size and sha256, by name."""
    return tuple(
        File(str(path.relative_to(folder)), path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


def sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
