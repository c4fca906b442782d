"""What one build made: its steps, its artifacts with the proof, and the versions and the machine they came from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.report import Caution, Parity, Step
from compress.target import Artifact, File
from compress.timing import Spread
from compress.versions import package_versions, processor


@dataclass(frozen=True)
class Verdict:
    """An artifact beside the uncompressed model, exported in the same way and the same float precision.

    `parity` is artifact against uncompressed module on the example. `speedup` and `seconds` are None where the
    artifact cannot run on this machine; scores are None without evaluation data.
    """

    artifact: Artifact
    baseline_bytes: int
    parity: Parity | None
    speedup: Spread | None
    seconds: Spread | None
    baseline_seconds: Spread | None
    score: float | None
    baseline_score: float | None

    @property
    def bytes(self) -> int:
        """Bytes of all files of the artifact that its runtime reads."""
        return sum(file.bytes for file in self.artifact.files)


@dataclass(frozen=True)
class Manifest:
    """One finished build in `folder`. `failures` says which demands of `accept` are not met; empty means accepted.

    `warnings` say where the data that shaped the model misleads.
    """

    folder: Path
    recipe: dict[str, Any]
    model: str
    steps: tuple[Step, ...]
    checkpoint: tuple[File, ...]
    verdicts: tuple[Verdict, ...]
    metric: str | None
    failures: tuple[str, ...]
    seconds: float
    shape: dict[str, int]
    warnings: tuple[Caution, ...] = ()

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`: all of this, with versions, processor and date."""
        record = {
            "schema": 1,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(),
            "processor": processor(),
            **asdict(self.relative()),
        }
        text = json.dumps(record, indent=1, default=str)
        (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")

    def relative(self) -> Manifest:
        """The same with every artifact's folder relative to the build's own, so that the build can be moved."""
        verdicts = tuple(
            replace(verdict, artifact=replace(verdict.artifact, folder=Path(verdict.artifact.folder.name)))
            for verdict in self.verdicts
        )
        return replace(self, verdicts=verdicts, folder=Path())
