"""Devices: named right or refused, everything together on one, and back home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.devices import Moved, device_of, kept, moved, on_device, require_device
from compress.errors import UsageError
from compress.graph import trace
from compress.passes.base import Context
from compress.pipeline import run
from tests.test_contract import CASES
from tests.zoo import build

CASES_ELSEWHERE = [f"{name}:{models[:2][-1]}" for name, models in CASES.items()] + [
    "quantize:vit",
    "distill:vit",
]


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, dict]:
    """What each case came to on the device `second`, in a process that has it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_second_device", *CASES_ELSEWHERE],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {one["case"]: one for one in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES_ELSEWHERE)
def test_every_installed_pass_runs_on_another_device(elsewhere, case):
    found = elsewhere[case]
    assert "error" not in found, found["error"]
    assert found["operations"] > 100
    assert found["devices"] == [["cpu"], ["second"]]  # the result is where the model was
    assert found["relative"] < 0.05  # factors of few samples move with the rounding


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("gpu", "`gpu` is no device of torch."),
        ("meta", "torch cannot compute on the device `meta`: Cannot copy out of meta tensor; no data."),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(name, fact):
    with pytest.raises(UsageError) as caught:
        require_device(name)
    assert caught.value.fact == fact
    assert caught.value.remedy.startswith(f"Give another: torch {torch.__version__} has cpu")
    with pytest.raises(UsageError, match="device"):
        run(build("bert"), [], Context(device=name))
    require_device("cpu:0")


def test_a_module_comes_back_where_it_was():
    module, home = nn.Linear(2, 3), torch.device("cpu")
    assert device_of(module) == home
    with pytest.raises(ArithmeticError), on_device(module, "cpu") as placed:
        assert placed is module
        raise ArithmeticError
    assert device_of(module) == home
    assert device_of(nn.Identity()) is None
    with on_device(nn.Identity(), "meta") as empty:
        assert device_of(empty) is None


def test_batches_come_when_they_are_asked_for_and_stay_where_they_were():
    batches = [{"x": torch.full((2,), float(number))} for number in range(4)]
    there = Moved(batches, "meta")
    assert len(there) == 4
    assert {batch["x"].device.type for batch in (*there, there[1], *there[1:3])} == {"meta"}
    assert len(there[1:3]) == 2
    again = kept(there)
    assert isinstance(again, Moved)
    assert again.batches == batches
    assert len(list(Moved((batch for batch in batches), "meta"))) == 4  # what has no length
    assert kept(iter(batches)) == batches
    assert kept(batches) is batches  # a sequence may make each when it is asked for
    labelled = [{**batch, "labels": torch.ones(2)} for batch in batches]
    for there in (Moved(labelled, "meta", ("labels",)), kept(Moved(iter(labelled), "meta", ("labels",)))):
        assert all(set(batch) == {"x"} for batch in (*there, there[1], *there[1:3]))
    assert moved({"x": batches[1]["x"], "use_cache": False}, None) == {
        "x": batches[1]["x"],
        "use_cache": False,
    }


def test_a_model_elsewhere_shares_what_is_known_of_its_structure(monkeypatch):
    traced = []
    monkeypatch.setattr("compress.graph.trace", lambda *of: traced.append(1) or trace(*of))
    model = replace(build("bert"))  # a new value, of which nothing is known yet
    with model.on("cpu") as there:
        assert there.graph is there.graph
    with model.on("cpu") as there:
        assert there.graph is model.graph
    assert len(traced) == 1
