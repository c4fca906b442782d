"""The bench of streamed runs: the model that it writes, one run, and the report."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import streamed
from benchmarks.machine import this_machine
from benchmarks.streamed import Run, Size

TINY = Size(blocks=2, width=32, inner=64, heads=4, kv_heads=2, vocabulary=50)
ASKED = argparse.Namespace(windows=2, length=8, threads=1, processes=1)


def test_the_model_is_as_large_as_it_says_and_is_streamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import compress

    parameters = streamed.write_model(tmp_path / "model", TINY)
    assert (
        len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    )  # a file a block, the embeddings, the norm
    model = compress.load_model(tmp_path / "model", dtype="bfloat16")
    assert sum(one.numel() for one in model.module.parameters()) == parameters
    streamed._stream(tmp_path / "model", tmp_path / "out", ASKED)
    assert "14 changes" in capsys.readouterr().out
    assert len(compress.load(tmp_path / "out").history[0].changes) == 14


def test_the_command_names_its_processes(tmp_path: Path) -> None:
    one = streamed._command(tmp_path, ASKED)
    two = streamed._command(tmp_path, argparse.Namespace(**vars(ASKED) | {"processes": 2}))
    assert one[2] == "benchmarks.streamed"
    assert two[2:5] == ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [Run(name, 10**9, 2 * 10**9, 100.0, 180.0, 3 * 10**9, 1) for name in ("1.1B", "1.2B", "3.2B")]
    streamed.report(runs, this_machine(("torch",)), argparse.Namespace(**vars(ASKED), out=tmp_path))
    assert (
        "| 3.2B | 28 of 3072 | 1000 | 2.00 | 100 | 180 | 0.18 | 3.00 |"
        in (tmp_path / "streamed.md").read_text()
    )
    assert [one["name"] for one in json.loads((tmp_path / "streamed.json").read_text())["runs"]] == [
        "1.1B",
        "1.2B",
        "3.2B",
    ]
    assert (tmp_path / "streamed.png").stat().st_size > 1000
