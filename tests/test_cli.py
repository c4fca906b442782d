"""The command line: what verbs print, how they end, and that the light ones stay light."""

import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
import typer

import compress.cli
from compress import console, options
from compress.catalog import available
from compress.cli import run
from compress.errors import DiskFull, ModelpressError, NothingToDo, UsageError
from compress.exits import DEFECT, status_of
from compress.progress import task, track
from compress.recipe import shipped_recipes


def python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "bert-int8-cpu", "minilm-int8"], ["schema"]])
def test_light_verbs_import_nothing_heavy(arguments):
    heavy = "{'torch', 'transformers', 'numpy', 'onnx', 'onnxruntime', 'onnxscript', 'tensorrt_rtx', 'PIL'}"
    done = python(
        f"import sys; from compress.cli import run; status = run({arguments!r});"
        f" print(status, sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    assert done.stderr.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "bert-int8-cpu"]])
def test_light_verbs_take_less_than_0_7_seconds(arguments):
    """CPU time of the fastest of three, since the wall clock of a busy machine says little."""

    def seconds():
        before = os.times()
        subprocess.run([sys.executable, "-m", "compress", *arguments], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.7


def test_help_names_every_verb(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    verbs = "apply validate plan inspect export compare show-tokens list show schema"
    for verb in verbs.split():
        assert re.search(rf"^\W*{verb}\s", text, re.MULTILINE), verb


def test_validate_says_ok_for_each_shipped_recipe(capsys):
    assert run(["validate", *shipped_recipes()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(shipped_recipes())
    assert lines[0] == "bert-int8-cpu: ok (INT8 text encoder for x86 servers)"


def test_validate_reports_every_wrong_recipe(capsys, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"summary: {name}\nmodel: {{task: t}}\npases: []\n")
    files = [str(tmp_path / name) for name in ("one.yaml", "two.yaml")]
    assert run(["validate", files[0], "bert-int8-cpu", files[1]]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("bert-int8-cpu: ok")
    assert f"{files[0]}:3:1: `pases` is not a known key. Did you mean `passes`?" in shown.err
    assert f"{files[1]}:3:1: `pases`" in shown.err
    assert shown.err.splitlines()[-1] == "2 recipes are wrong."


def test_list_and_show(capsys):
    assert run(["list", "recipes"]) == 0
    assert "minilm-int8" in capsys.readouterr().out
    assert run(["list", "passes"]) == 0
    listed = tuple(line.split()[0] for line in capsys.readouterr().out.splitlines())
    assert listed == available("compress.passes")
    assert run(["list", "targets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["onnx", "tensorrt"]
    assert run(["show", "bert-int8-cpu"]) == 0
    assert "- {use: quantize}" in capsys.readouterr().out
    assert run(["show", "quantize"]) == 0
    text = capsys.readouterr().out
    assert "  ranges: Literal['minmax', 'percentile', 'mse'] (default minmax)" in text
    assert "  allow_empty: bool (default false)\n      Go on when the pass finds nothing to do" in text
    assert run(["show", "quantise"]) == 2
    assert (
        "There is no recipe, pass or target `quantise`. Did you mean `quantize`?" in capsys.readouterr().err
    )


def test_schema_is_json(capsys):
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["required"] == ["summary", "model"]
    assert {"Smooth", "Quantize", "Onnx", "TensorRT"} <= set(schema["$defs"])


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("modelpress 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vaildate", "x"], "Did you mean 'validate'?"),
        (["apply"], "Missing argument 'RECIPE'"),
        (["list", "things"], "'things' is not one of"),
        (["apply", "bert-int8-cpu", "--colour"], "No such option: --colour"),
        (["apply", "bert-int8-cpu"], "The recipe names no model."),
        (["apply", "vit-int8-cpu", "--model", "x"], "The pass `smooth` needs calibration data"),
        (["apply", "bert-int8-cpu", "--model", "x", "--calibration", "none.txt"], "none.txt does not exist."),
        (["export", "x", "--to", "onxx", "--out", "y"], "There is no target `onxx`. Did you mean `onnx`?"),
        (
            ["export", "x", "--to", "onnx", "--out", "y", "--edition", "rtx"],
            "The target onnx: `edition` is not a known key.",
        ),
        (
            ["export", "x", "--to", "onnx", "--out", "y", "--set", "opset=99"],
            "`opset` must be at most 23, not 99.",
        ),
        (["export", "x", "--to", "onnx", "--out", "y", "--set", "opset"], "--set opset is not KEY=VALUE."),
        (["export", "x", "--to", "onnx", "--out", "y", "--precision", "int7"], "There is no precision int7."),
        (
            ["export", "x", "--to", "tensorrt", "--out", "y", "--shapes", "batch=1:2"],
            "`batch=1:2` in --shapes is not",
        ),
        (["compare", "a", "b", "--shape", "16x"], "--shape 16x is no shape."),
    ],
)
def test_wrong_arguments_end_with_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown
    assert not list(tmp_path.iterdir())


def test_values_of_options():
    assert options.profiles("batch=1:8:32,sequence=128") == {"batch": (1, 8, 32), "sequence": (128, 128, 128)}
    assert options.profiles("") == {}
    assert options.sizes("16x128") == {"batch": 16, "sequence": 128}
    assert options.sizes("4") == {"batch": 4}
    assert options.sizes("batch=2,sequence=7") == {"batch": 2, "sequence": 7}
    assert options.settings(["opset=21", "names=[a, b]", "flag=true"]) == {
        "opset": 21,
        "names": ["a", "b"],
        "flag": True,
    }
    for wrong in ("x", "0x4", "1x2x3", "batch=a"):
        with pytest.raises(UsageError, match="is no shape"):
            options.sizes(wrong)
    with pytest.raises(UsageError, match="the value is not YAML"):
        options.settings(["a=[1"])


def ending(error: BaseException | None):
    def command():
        if error is not None:
            raise error

    return command


def test_deliberate_errors_end_with_their_status_and_remedy_last(capsys):
    error = NothingToDo("Nothing was found in `[encoder]`.", "Widen the scope.")
    error.add_note("In the pass `smooth`.")
    assert status_of(ending(error), debug=False) == 3
    assert capsys.readouterr().err == (
        "error: Nothing was found in `[encoder]`.\nIn the pass `smooth`.\nWiden the scope.\n"
    )
    assert status_of(ending(error), debug=True) == 3
    assert "Traceback" in capsys.readouterr().err
    assert status_of(ending(ModelpressError("Only this.")), debug=False) == 1
    assert capsys.readouterr().err == "error: Only this.\n"
    assert status_of(ending(None), debug=False) == 0
    assert status_of(ending(SystemExit(4)), debug=False) == 4


def test_a_full_disk_is_named(capsys):
    assert (
        status_of(ending(OSError(28, "No space left on device", "/some/file")), debug=False)
        == DiskFull.exit_status
    )
    assert capsys.readouterr().err.startswith("error: The disk is full at /some/file.\nFree some space")


def test_a_defect_shows_its_traceback_and_asks_for_a_report(capsys):
    assert status_of(ending(ZeroDivisionError("division by zero")), debug=False) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-2:] == ["ZeroDivisionError: division by zero", DEFECT]


def test_debug_is_taken_anywhere(capsys):
    for arguments in (["--debug", "show", "nothing"], ["show", "nothing", "--debug"]):
        assert run(arguments) == 2
        assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(capsys, monkeypatch):
    def interrupted(what):
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.listing.summaries", interrupted)
    assert run(["list", "recipes"]) == 130
    assert capsys.readouterr().err.startswith("error: Stopped.\nNothing half-made is in place.")


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m compress schema | head -c 5",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == '{\n "$'
    assert "Traceback" not in done.stderr


def test_the_program_exits_with_the_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["modelpress", "show", "nothing"])
    with pytest.raises(SystemExit) as caught:
        compress.cli.main()
    assert caught.value.code == 2
    assert isinstance(typer.main.get_command(compress.cli.app), compress.cli.Verbs)


def test_progress_in_a_log_is_only_of_long_tasks(monkeypatch, capsys):
    monkeypatch.setattr(console, "WORTH_SAYING", 0.05)
    with console.progress() as observer:
        for _ in track(observer, "short", [1, 2]):
            pass
        with task(observer, "long [one]"):
            time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "long [one] ..."
    assert re.fullmatch(r"long \[one\]: 0\.\d s", lines[1])
    assert len(lines) == 2


def test_progress_on_a_terminal_is_drawn_and_leaves_a_line(monkeypatch):
    monkeypatch.setattr(console, "WORTH_SAYING", 0.0)
    screen = console.Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "errors", lambda: screen)
    with console.progress() as observer:
        assert list(track(observer, "calibrate", [1, 2, 3])) == [1, 2, 3]
    assert "calibrate: 0.0 s" in screen.file.getvalue()
