"""The bench of fewer key and value heads, on a tiny model: what it heals, and the table that it gives."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import compress
from benchmarks import decoding, grouped
from compress.errors import UsageError
from compress.progress import SILENT
from tests import tiny

ASKED = grouped.Healing(
    kv_heads=2, minutes=10, learning_rate=1e-3, device="cpu", batch=4, windows=16, steps=12
)
TIMING = Namespace(rounds=1, calls=1, threads=1, windows_exported=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, name in enumerate((grouped.TRAINING, grouped.HELDOUT)):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(tiny.sentences(300 + number)))
    return tmp_path


def saved(folder: Path) -> Path:
    return tiny.saved(tiny.llama(initializer_range=0.3), folder)


@pytest.mark.slow
def test_it_heals_and_then_measures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((grouped, "WINDOW"), (decoding, "WINDOW")):
        monkeypatch.setattr(module, name, 32)
    monkeypatch.setattr(grouped, "TRIED", (1, 6))
    monkeypatch.setattr(grouped, "PAST", 7)
    model, out = saved(tmp_path / "model"), tmp_path / "out"
    facts = grouped.heal(data, model, out, ASKED, SILENT)
    assert facts == json.loads((out / grouped.FACTS).read_text())
    assert facts["steps"] == 12
    assert set(facts["losses"]) == {"original", "grouped", "healed"}
    assert compress.load(out / "healed").module.config.num_key_value_heads == 2
    table = grouped.measure(data, model, out, TIMING, SILENT)
    first, second = (line.split("|") for line in table.splitlines() if line.startswith(("| orig", "| heal")))
    # Two layers of keys and values, heads of 8 features, 4 bytes each.
    assert [int(line[5]) for line in (first, second)] == [2 * 2 * 4 * 8 * 4, 2 * 2 * 2 * 8 * 4]
    assert "12 steps of 128 tokens" in table


def test_nothing_to_measure(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was healed there"):
        grouped.measure(data, tmp_path, tmp_path / "out", TIMING, SILENT)


def test_healing_imports_no_runtime() -> None:
    script = (
        "import sys\n"
        "for name in ('onnxruntime', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        "import benchmarks.grouped\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(grouped.__file__).parents[1])
