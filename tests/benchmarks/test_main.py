"""The bench's command line: what it writes, and how it fails."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks.machine import this_machine
from benchmarks.results import Row, Table, Upwards, markdown
from compress.errors import DataError
from compress.timing import Spread


def table(**asked: object) -> Table:
    spread = {"1 x 8": Spread(1.0, 0.5, 2.0)}
    return Table(
        title="A model",
        machine=this_machine(("numpy",)),
        rounds=int(str(asked["rounds"])),
        calls=int(str(asked["calls"])),
        threads=int(str(asked["threads"])),
        baseline="base",
        shapes=("1 x 8",),
        figures={"cosine": ".2f"},
        upwards=Upwards("cosine", 1.0, "1 - cosine", "cosine"),
        rows=(Row("base", 1, {"cosine": 1.0}, spread, spread),),
    )


def run(monkeypatch: pytest.MonkeyPatch, module: object, *arguments: str) -> int:
    monkeypatch.setattr(command, "import_module", lambda name: module)
    monkeypatch.setattr(command, "hush", lambda: None)
    monkeypatch.setattr(command, "draw", lambda table, file: file.write_bytes(b"picture"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "minilm", *arguments])
    return command.main()


def test_writes_json_markdown_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(PACKAGES=("numpy",), run=table)
    out = tmp_path / "build" / "bench"
    assert run(monkeypatch, module, "--data", str(tmp_path), "--out", str(out), "--rounds", "7") == 0
    written = json.loads((out / "minilm.json").read_text())
    assert (written["rounds"], written["calls"], written["threads"]) == (7, 10, 2)
    assert written["rows"][0]["seconds"]["1 x 8"] == {"median": 1.0, "low": 0.5, "high": 2.0}
    assert written["machine"]["cpu"]
    assert (out / "minilm.md").read_text() == markdown(table(rounds=7, calls=10, threads=2))
    assert (out / "minilm.png").read_bytes() == b"picture"


def test_a_table_may_draw_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(PACKAGES=(), run=table, draw=lambda table, file: file.write_text(table.title))
    assert run(monkeypatch, own, "--data", str(tmp_path), "--out", str(tmp_path)) == 0
    assert (tmp_path / "minilm.png").read_text() == "A model"


def test_missing_packages_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SimpleNamespace(PACKAGES=("numpy", "no-such-runtime", "nor-this-one"))
    assert run(monkeypatch, module, "--data", str(tmp_path), "--out", str(tmp_path / "out")) == 3
    assert capsys.readouterr().err == (
        "error: The bench needs no-such-runtime, nor-this-one, which this Python does not have.\n"
        'Install them with: pip install -e ".[bench]" -c constraints.txt\n'
    )
    assert not (tmp_path / "out").exists()


def test_an_error_of_ours_ends_with_its_status_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> Table:
        raise DataError("There is no data.", "Bring some.")

    module = SimpleNamespace(PACKAGES=(), run=fail)
    assert run(monkeypatch, module, "--data", "nowhere", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == "error: There is no data.\nBring some.\n"
