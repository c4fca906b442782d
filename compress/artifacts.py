"""artifact.json: an artifact as a file in its own folder, so that the folder can be moved and opened anywhere."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.report import Parity
from compress.target import Artifact, File, TensorSpec

RECORD = "artifact.json"


def save_artifact(artifact: Artifact) -> None:
    """Write artifact.json into the artifact's folder. Folders are written relative to it."""
    text = json.dumps(_relative(artifact, artifact.folder), indent=1)
    (artifact.folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_artifact(folder: str | Path) -> Artifact:
    """The artifact in `folder`. Raises `ModelError` where artifact.json is missing or cannot be read."""
    folder = Path(folder)
    try:
        return _artifact(json.loads((folder / RECORD).read_text(encoding="utf-8")), folder)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} holds no {RECORD}, so it is no exported model.",
            "Name a folder that `modelpress export`, `modelpress apply` or a target's `write` has made.",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / RECORD} cannot be read: {error!r}.", "Export the model again."
        ) from error


def _relative(artifact: Artifact, root: Path) -> dict[str, Any]:
    source = artifact.source
    plain = asdict(replace(artifact, folder=Path(), source=None))
    return {
        **plain,
        "folder": artifact.folder.relative_to(root).as_posix(),
        "source": None if source is None else _relative(source, root),
    }


def _artifact(record: dict[str, Any], root: Path) -> Artifact:
    specs = {
        key: tuple(TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in record[key])
        for key in ("inputs", "outputs")
    }
    return Artifact(
        folder=root / record["folder"],
        target=record["target"],
        settings=record["settings"],
        files=tuple(File(**file) for file in record["files"]),
        parity=Parity(**record["parity"]),
        facts=record["facts"],
        source=None if record["source"] is None else _artifact(record["source"], root),
        **specs,
    )
