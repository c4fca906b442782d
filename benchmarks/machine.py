"""What a run was made on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from compress.errors import MissingPackage
from compress.versions import processor


@dataclass(frozen=True)
class Machine:
    """The processor with the flags that decide which kernels run, the date (UTC), and the versions."""

    cpu: str
    flags: tuple[str, ...]
    cpus: int
    date: str
    versions: dict[str, str]


def this_machine(packages: Sequence[str]) -> Machine:
    """This machine, now, with the versions of `packages`."""
    cpu = processor()
    return Machine(
        cpu=str(cpu["name"]),
        flags=tuple(cpu["flags"]),
        cpus=os.cpu_count() or 1,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions={package: version(package) for package in packages},
    )


def require_packages(packages: Sequence[str]) -> None:
    """Raise `MissingPackage` before any work is done if one of `packages` is not installed."""
    missing = [package for package in packages if not _installed(package)]
    if missing:
        raise MissingPackage(
            f"The bench needs {', '.join(missing)}, which this Python does not have.",
            'Install them with: pip install -e ".[bench]" -c constraints.txt',
        )


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
