"""What users get wrong, and what they then read: the message, the exit status, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.cli import run
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT on disk, with its tokenizer."""
    return tiny.saved(tiny.bert(), tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the model's folder to damage."""
    into = tmp_path / "copy"
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    return into


@pytest.fixture
def recipe(folder, tmp_path):
    """Writes a recipe for the small BERT: its passes, and what else is given."""
    (tmp_path / "texts.txt").write_text("\n".join(tiny.sentences(16)))

    def write(passes, data="{calibration: {text: texts.txt, max_length: 16}}", model=folder, rest=""):
        path = tmp_path / "recipe.yaml"
        head = f"summary: a test\nmodel: {{name: {model}, task: feature-extraction}}\n"
        path.write_text(f"{head}data: {data}\npasses:\n{passes}\nexport: [{{use: onnx}}]\n{rest}")
        return str(path)

    return write


@pytest.fixture
def apply(tmp_path, capsys):
    """Runs `apply` into a new folder; gives the exit status and standard error. The folder may not appear."""

    def act(recipe, *arguments, out=tmp_path / "out"):
        status = run(["apply", recipe, "--out", str(out), *arguments])
        assert not out.exists()
        return status, capsys.readouterr().err

    return act


QUANTIZE = "  - {use: quantize}"


def test_a_typo_in_a_key(apply, recipe):
    path = recipe("  - {use: quantize, wieghts: int8}")
    status, shown = apply(path)
    assert status == 2
    assert f"{path}:5:21: `passes[0].wieghts` is not a known key. Did you mean `weights`?" in shown
    assert "  5 |   - {use: quantize, wieghts: int8}\n                          ^\n" in shown
    assert "Traceback" not in shown


def test_a_wrong_type(apply, recipe):
    status, shown = apply(recipe("  - {use: quantize, percentile: most}"))
    assert status == 2
    assert "`passes[0].percentile` must be a number, not 'most'." in shown


def test_an_unknown_pass(apply, recipe):
    status, shown = apply(recipe("  - {use: quantise}"))
    assert status == 2
    assert "There is no pass `quantise`. Did you mean `quantize`? Installed: " in shown


def test_a_scope_that_matches_nothing(apply, recipe):
    status, shown = apply(recipe('  - {use: quantize, scope: {include: ["decoder.*"]}}'))
    assert status == 2
    assert "error: The scope `decoder.*` matches none of the" in shown
    assert "In the pass `quantize`." in shown
    assert "`modelpress inspect MODEL` prints them all." in shown.splitlines()[-1]


def test_a_device_that_is_not_there(apply, recipe, tmp_path):
    status, shown = apply(recipe(QUANTIZE, model="/no/such/model"), "--device", "gpu")
    assert status == 2
    assert "error: `gpu` is no device of torch.\n" in shown
    assert shown.splitlines()[-1].startswith("Give another: torch ")
    assert not (tmp_path / "out.partial").exists()


def test_a_pass_with_nothing_to_do(apply, recipe):
    status, shown = apply(recipe('  - {use: quantize, scope: {include: ["*.LayerNorm"]}}'))
    assert status == 3
    assert "error: The pass `quantize` found nothing to do in this model." in shown
    assert shown.splitlines()[-1] == (
        "Widen its scope, leave the pass out, or set `allow_empty: true` to go on without it."
    )


def test_a_model_folder_that_is_not_there(apply, recipe):
    status, shown = apply(recipe(QUANTIZE, model="/no/such/model"))
    assert status == 3
    assert "error: The model folder /no/such/model does not exist.\n" in shown


def test_a_model_folder_without_a_config(apply, recipe, copy):
    (copy / "config.json").unlink()
    status, shown = apply(recipe(QUANTIZE, model=copy))
    assert status == 3
    assert f"The model folder {copy} has no config.json." in shown


def test_a_config_that_is_cut_off(apply, recipe, copy):
    config = copy / "config.json"
    config.write_text(config.read_text()[:100])
    status, shown = apply(recipe(QUANTIZE, model=copy))
    assert status == 3
    assert f"The file {config} is not valid JSON" in shown


def test_weights_that_are_cut_off(apply, recipe, copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    status, shown = apply(recipe(QUANTIZE, model=copy))
    assert status == 3
    assert f"The model {copy} cannot be loaded from the folder" in shown
    assert "safetensors" in shown.splitlines()[-1]


def test_weights_with_nan(apply, recipe, copy):
    weights = load_file(copy / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][3, :2] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    status, shown = apply(recipe(QUANTIZE, model=copy))
    assert status == 3
    assert "has 2 values that are not finite in `encoder.layer.0.output.dense.weight`, of 2048." in shown


def test_calibration_data_that_is_missing(apply, recipe, tmp_path):
    status, shown = apply(recipe(QUANTIZE, data="{}"))
    assert status == 2
    assert (
        "error: The pass `quantize` needs calibration data, and the recipe has no `data.calibration`."
        in shown
    )
    assert "`--calibration PATH`" in shown.splitlines()[-1]
    status, shown = apply(recipe(QUANTIZE, data="{calibration: {text: absent.txt}}"))
    assert status == 2
    assert f"The calibration data is not there: {tmp_path / 'absent.txt'} does not exist." in shown


def test_calibration_data_that_is_empty(apply, recipe, tmp_path):
    path = recipe(QUANTIZE)
    (tmp_path / "texts.txt").write_text("\n\n")
    status, shown = apply(path)
    assert status == 2
    assert f"error: {tmp_path / 'texts.txt'} is empty." in shown


def test_calibration_data_of_the_wrong_kind_and_length(apply, recipe, tmp_path):
    pictures = tiny.pictures(tmp_path / "pictures")
    status, shown = apply(recipe(QUANTIZE), "--calibration", str(pictures))
    assert status == 2
    assert "takes input_ids, attention_mask, token_type_ids." in shown
    status, shown = apply(recipe(QUANTIZE, data="{calibration: {text: texts.txt, max_length: 512}}"))
    assert status == 2
    assert "The data asks for 512 tokens a sample" in shown
    assert shown.splitlines()[-1] == "Set `max_length: 130` or less."


def test_calibration_pictures_of_the_wrong_size(apply, tmp_path, monkeypatch):
    model = tiny.saved(tiny.vit(processor_size=48), tmp_path / "vit")
    pictures = tiny.pictures(tmp_path / "pictures")
    status, shown = apply("vit-int8-cpu", "--model", str(model), "--calibration", str(pictures))
    assert status == 2
    assert "`pixel_values` of shape 4x3x48x48, and the model takes 2x3x32x32." in shown


def test_an_output_folder_that_exists_is_left_alone(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert run(["apply", recipe(QUANTIZE), "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert f"error: The output folder {out} exists and is not empty." in shown
    assert "--force" in shown.splitlines()[-1]
    assert (out / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "out.partial").exists()


def test_a_failing_run_with_force_loses_nothing(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    failing = recipe('  - {use: quantize, scope: {include: ["*.LayerNorm"]}}')
    assert run(["apply", failing, "--out", str(out), "--force"]) == 3
    capsys.readouterr()
    assert (out / "precious.txt").read_text() == "mine"


def test_an_output_folder_that_cannot_be_written(recipe, tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("")
    for out in (blocker / "out", Path("/proc/no/out")):
        assert run(["apply", recipe(QUANTIZE), "--out", str(out)]) == 2
        assert f"error: The output folder {out} cannot be written" in capsys.readouterr().err


def test_a_target_whose_package_is_missing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    out = tmp_path / "out"
    arguments = [
        "--to",
        "tensorrt",
        "--compute-capability",
        "8.9",
        "--precision",
        "float16",
        "--out",
        str(out),
    ]
    assert run(["export", str(folder), "--task", "feature-extraction", *arguments]) == 3
    shown = capsys.readouterr().err
    assert "tensorrt_rtx" in shown
    assert "pip install" in shown.splitlines()[-1]
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_int8_of_a_float_model_asks_for_data(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["export", str(folder), "--to", "onnx", "--precision", "int8", "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert f"The model {folder} is in float, and --precision int8 needs data to calibrate on." in shown
    assert "`--calibration PATH`" in shown.splitlines()[-1]
    assert not out.exists()


def started(recipe, out, first="pass"):
    """`apply` in a process of its own, which runs `first` and answers to signals whatever this process does."""
    source = f"""
import resource, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{first}
from compress.cli import main
main()
"""
    return subprocess.Popen(
        [sys.executable, "-c", source, "apply", recipe, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_half_made_folder(recipe, tmp_path, number):
    out = tmp_path / "out"
    process = started(recipe("  - {use: smooth}\n" + QUANTIZE), out)
    steps = tmp_path / "out.partial" / "steps"
    deadline = time.monotonic() + 120
    while not steps.is_dir():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 130
    assert shown.splitlines()[-2:] == [
        "error: Stopped.",
        "Nothing half-made is in place. Run it again: `apply` goes on from its last finished pass.",
    ]
    assert not out.exists()


def test_a_full_disk(recipe, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same way."""
    out = tmp_path / "out"
    process = started(recipe(QUANTIZE), out, "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))")
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 1, shown
    assert "error: The disk is full: no room for" in shown
    assert shown.splitlines()[-1].startswith("Free some space or name another output folder")
    assert not out.exists()


def test_a_corrupt_checkpoint(copy, tmp_path, capsys):
    (copy / "compress.json").write_text(json.dumps({"schema": 99}))
    assert run(["export", str(copy), "--to", "onnx", "--out", str(tmp_path / "out")]) == 3
    assert "has schema 99; this version reads up to 1." in capsys.readouterr().err
