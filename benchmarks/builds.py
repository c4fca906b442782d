"""Build every artifact of a table once, and build it again only when what it was made from has changed."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.errors import DataError
from compress.folders import new_folder

Data = Sequence[str] | Path
"""What passes are calibrated or trained on: texts, or a file."""
Builder = Callable[..., None]
"""Called with the folder it builds on, the data, the new, empty folder to write into, and settings."""


@dataclass(frozen=True)
class Build:
    """How one artifact is made. `on` names the build that it starts from; None is the original model.

    `packages` are the distributions, and `sources` the import packages and modules of ours, whose change makes it
    anew.
    `settings` are JSON values that the builder takes as keywords.
    """

    make: Builder
    packages: tuple[str, ...]
    on: str | None = None
    sources: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A built artifact: its folder, and the key of everything it was made from."""

    folder: Path
    key: str


def build_all(builds: Mapping[str, Build], model: Path, data: Data, cache: Path) -> dict[str, Made]:
    """Make, or find in `cache`, the artifact of each build; a build stands after the one that it is `on`."""
    original = Made(model, _digest(file.read_bytes() for file in _files(model)))
    made: dict[str, Made] = {}
    for name, build in builds.items():
        base = original if build.on is None else made[build.on]
        made[name] = _build(name, build, base, data, cache)
    return made


def model_bytes(folder: Path) -> int:
    """Bytes of the files that hold the graph and the weights."""
    suffixes = {".onnx", ".data", ".xml", ".bin", ".safetensors"}
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in suffixes)


def _build(name: str, build: Build, base: Made, data: Data, cache: Path) -> Made:
    key = _key(build, base, data)
    folder = cache / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{key[:12]}"
    if folder.exists():
        print(f"{name}: as built before, {folder}")
        return Made(folder, key)
    print(f"{name}: building {folder}")
    with new_folder(folder) as partial:
        build.make(base.folder, data, partial, **build.settings)
    return Made(folder, key)


def _key(build: Build, base: Made, data: Data) -> str:
    facts = {
        "base": base.key,
        "data": _digest(_parts(data)),
        "packages": {package: version(package) for package in build.packages},
        "sources": {package: _digest(_sources(package)) for package in build.sources},
        "settings": dict(build.settings),
        "make": [build.make.__name__, inspect.getsource(sys.modules[build.make.__module__])],
    }
    return _digest([json.dumps(facts, sort_keys=True).encode()])


def _parts(data: Data) -> Iterable[bytes]:
    if not isinstance(data, Path):
        return (text.encode() for text in data)
    if not data.is_file():
        raise DataError(f"The data of the bench is not there: {data} does not exist.", "Correct `--data`.")
    return [data.read_bytes()]


def _sources(package: str) -> list[bytes]:
    module = import_module(package)
    file = Path(inspect.getfile(module))
    files = _files(file.parent) if hasattr(module, "__path__") else [file]
    return [file.read_bytes() for file in files if file.suffix in {".py", ".yaml", ".txt"}]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
