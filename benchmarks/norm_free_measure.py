"""The measuring half of `benchmarks.norm_free`: both models as ONNX on a CPU, as they are and in 8 bits."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
from torch import Tensor

import compress
from benchmarks import classifying, pictures
from benchmarks.exported import VERSIONS, Row, Run, markdown, times
from benchmarks.machine import this_machine
from benchmarks.norm_free import TEST, TRAINING
from compress.console import hush, progress
from compress.model import Model
from compress.progress import track
from compress.timing import Timings
from export.runners import GRAPH

BATCH = 16
CALIBRATED = 128
"""So many training pictures calibrate `quantize`."""
NORMED, FREE, INT8 = "layer norms", "norm-free", ", int8"
PLAIN = "layer norms, not rewritten"


def measure(arguments: argparse.Namespace) -> str:
    """The table, and the machine."""
    hush()
    with progress() as observer, tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), arguments.rounds, arguments.calls, arguments.threads, observer)
        rows = norm_free(run, arguments.data, arguments.model, arguments.made)
    return f"\n{markdown(rows)}\n\n{this_machine(VERSIONS)}"


def norm_free(run: Run, data: Path, model: Path, made: Path) -> list[Row]:
    """A row for each variant; one of the two without norms is timed against the one with them in the same type too.

    The first is the model with norms as it would be without us: as the exporter of transformers writes it.
    """
    loaded = compress.load_model(model, task="image-classification")
    free = compress.load(made)
    free = replace(free, module=free.module.float())
    calibration = [
        {"pixel_values": values} for values in pictures.batches(data / TRAINING, model, 64, CALIBRATED)
    ]
    models: dict[str, Model] = {NORMED: loaded, FREE: free}
    for name, one in track(run.observer, "quantize", list(models.items())):
        models[name + INT8] = compress.apply(one, [compress.Quantize()], calibration=calibration).model
    inputs = {"pixel_values": next(pictures.batches(data / TEST, model, BATCH, BATCH))}
    variants = [run.unlowered(PLAIN, loaded, inputs)]
    for name, one in track(run.observer, "export", list(models.items())):
        variants.append(run.written(name, one, inputs))
    names = [one.name for one in variants]
    logits = {
        name: classifying.answers(run.scratch / name, data / TEST, model, run.threads)
        for name in track(run.observer, "answers to the test pictures", names)
    }
    timings = run.timed(variants)
    wanted = pictures.classes(data / TEST)
    return [_row(name, run.scratch / name, logits, wanted, timings) for name in names]


def _row(name: str, folder: Path, logits: Mapping[str, Tensor], wanted: Tensor, timings: Timings) -> Row:
    kinds = [node.op_type for node in onnx.load(folder / GRAPH, load_external_data=False).graph.node]
    right = {one: classifying.top1(logits[one], wanted) for one in (name, NORMED, name.removesuffix(INT8))}
    twin = replace(timings, baseline=name.replace(FREE, NORMED))
    return {
        "variant": name,
        "operators": str(len(kinds)),
        "layer norms": str(sum("LayerNormalization" in kind for kind in kinds)),
        "MB": sum(file.stat().st_size for file in folder.glob("*.onnx*")) / 1e6,
        "top-1, %": f"{right[name]:.2f}",
        "points lost": f"{right[NORMED] - right[name]:.2f}",
        "points lost by int8": f"{right[name.removesuffix(INT8)] - right[name]:.2f}",
        **times(timings, name),
        "speed against its layer norms": twin.speedup(name),
    }
