"""A run of `benchmarks.exported` whose times are made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import exported
from benchmarks.exported import Run
from compress.progress import SILENT
from compress.timing import Timings, Variant
from export.runners import timed_call


def measured(
    variants: Sequence[Variant], rounds: int, calls: int, baseline: str, *, threads: int, **_: Any
) -> Timings:
    """Runs each variant once. As if the second were twice as fast as the first, the third three times, and so on."""
    for variant in variants:
        assert variant.maker == "export.runners:timed_call"
        timed_call(**variant.arguments, threads=threads)()
    seconds = {one.name: (1 / number, 2 / number) for number, one in enumerate(variants, start=1)}
    return Timings(baseline, calls, threads, seconds)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(exported, "measure", measured)
    return Run(tmp_path, rounds=2, calls=1, threads=1, observer=SILENT)
