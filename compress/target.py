"""What a target is: it writes a model as files for one runtime, and runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from compress.progress import SILENT, Observer
from compress.report import Parity

if TYPE_CHECKING:
    import torch

    from compress.model import Model


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

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: str

    def check(self, model: Model) -> None:
        """Raise `MissingPackage` or `Unsuitable` before any work is done."""

    @abstractmethod
    def write(self, model: Model, into: Path, observer: Observer = SILENT) -> Artifact:
        """Write `model` into the new folder `into`, prove it against `model.module`, which is left as it was."""

    @abstractmethod
    def run(self, artifact: Artifact, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a written artifact on `inputs`."""
