"""Run passes on the device `second`: one JSON object on standard output for each PASS:MODEL of the command line."""

from __future__ import annotations

import copy
import json
import sys
import traceback
from dataclasses import replace
from typing import Any

import torch

from compress.compare import forward, parity
from compress.model import Model
from compress.passes.base import Context, Pass
from compress.pipeline import Outcome, run
from compress.recipe import find
from tests import second_device
from tests.test_contract import SETTINGS, served, shaken


def told(name: str, kind: str) -> dict[str, Any]:
    """What the pass `name` makes there of a model of `kind`, and of a model that is there here."""
    settings: Pass = find("compress.passes", name)(**SETTINGS.get(name, {}))
    source = served(name, kind)
    away = replace(source, module=copy.deepcopy(source.module).to(second_device.NAME))
    wanted = applied(settings, source, "cpu")
    second_device.ran.clear()
    found = applied(settings, source, second_device.NAME)
    operations = second_device.ran.total()
    return {
        "operations": operations,
        "devices": [devices(one.model) for one in (found, applied(settings, away, "cpu"))],
        "relative": parity(*(forward(one.model.module, source.example) for one in (wanted, found))).relative,
    }


def applied(settings: Pass, source: Model, device: str) -> Outcome:
    context = Context(calibration=[source.example], training=[source.example], teacher=shaken(source))
    return run(source, [settings], replace(context, device=device))


def devices(model: Model) -> list[str]:
    """Where the tensors of `model` are."""
    return sorted({one.device.type for one in (*model.module.parameters(), *model.module.buffers())})


def main() -> None:
    for case in sys.argv[1:]:
        try:
            found = told(*case.split(":"))
        except Exception:  # noqa: BLE001 - the test tells it
            found = {"error": traceback.format_exc()}
        sys.stdout.write(json.dumps({"case": case, **found}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
