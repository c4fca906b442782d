"""Several processes: one result, written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress import processes, timing
from tests import tiny

RECIPE = """
summary: a test
model: {task: text-generation}
data:
  calibration: {text: text.txt, max_length: 16}
  training: {text: text.txt, max_length: 16, batch_size: 4}
passes:
  - {use: factorize, keep: 0.7, multiple: 1, method: svd}
  - {use: distill, steps: 20, learning_rate: 1.0e-3, accumulate: 2}
"""
NORMLESS = """
summary: a test
model: {task: text-generation}
data:
  training: {text: text.txt, max_length: 16, batch_size: 4}
passes:
  - {use: progressive_batch_norm, steps: 20, learning_rate: 1.0e-3, accumulate: 2}
"""


TWO = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_port", "0"),
)
"""What starts two processes."""


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (processes.rank(), processes.count(), processes.is_main()) == (0, 1, True)
    assert processes.shared("value") == "value"


def test_without_a_launcher_all_values_are_this_process_s(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.gathered("value") == ["value"]


def test_a_launcher_says_who_is_who(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (processes.rank(), processes.count(), processes.is_main()) == (1, 2, False)


def test_each_process_has_an_accelerator_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.own_device("cuda:3") == "cuda:3"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [processes.own_device(name) for name in ("cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:1", "cpu"]


def test_children_that_are_timed_are_no_part_of_the_group(monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "LOCAL_RANK": "0"}
    launched |= {"ACCELERATE_USE_CPU": "true", "TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    environment = timing._environment(1)
    assert not launched.keys() & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    tiny.saved(model, folder / "model")
    (folder / "text.txt").write_text("\n".join(tiny.sentences(100)))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "normless.yaml").write_text(NORMLESS)
    return folder


def launched(folder: Path, recipe: str, out: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    environment = processes.alone(os.environ) | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "compress", "apply", recipe, "--model", "model", "--out", out]
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder):
    runs = {
        "one": launched(folder, "recipe.yaml", "one"),
        "two": launched(folder, "recipe.yaml", "two", *TWO),
    }
    for done in runs.values():
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written to") == 1
    one, two = (load_file(folder / name / "checkpoint" / "model.safetensors") for name in runs)
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-4 * value.abs().max()
    changes = [
        json.loads((folder / name / "manifest.json").read_text())["steps"][1]["changes"] for name in runs
    ]
    assert changes[0] == changes[1]
    expected = ["model", "normless.yaml", "one", "recipe.yaml", "text.txt", "two"]
    assert sorted(path.name for path in folder.iterdir()) == expected


@pytest.mark.slow
def test_statistics_of_batch_norms_are_the_same_in_two_processes(folder, tmp_path):
    for name, launcher in (("one", ()), ("two", TWO)):
        done = launched(folder, "normless.yaml", str(tmp_path / name), *launcher)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("one", "two"))
    assert "model.layers.0.self_attn.q_proj.bias" in one
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-4 * value.abs().max()
