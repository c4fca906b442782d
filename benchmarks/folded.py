"""`python -m benchmarks.folded`: what `fold_batch_norm` gains on a CPU, with and without `quantize` behind it.

A ResNet-50 with random weights, at 224 x 224, batch 1, is exported with `export.Onnx(runtime="cpu")` and timed in ONNX
Runtime, in alternating rounds, one process each. The exporter and ONNX Runtime themselves merge a batch norm into a
float convolution; neither does behind a quantized one. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import ResNetConfig, ResNetForImageClassification

import compress
from benchmarks.exported import VERSIONS, Row, Run, add_timing, markdown, times
from benchmarks.machine import this_machine
from benchmarks.random_pictures import structured
from compress.console import hush, progress
from compress.passes.base import Pass
from compress.progress import track
from export.runners import GRAPH, OnnxRunner

SIDE = 224
PICTURES = 8
"""So many random pictures make the statistics of the batch norms, and calibrate `quantize`."""

VARIANTS: Mapping[str, Sequence[Pass]] = {
    "uncompressed": (),
    "fold_batch_norm": (compress.FoldBatchNorm(),),
    "quantize": (compress.Quantize(),),
    "fold_batch_norm, quantize": (compress.FoldBatchNorm(), compress.Quantize()),
}


def main() -> int:
    arguments = _parse()
    hush()
    with progress() as observer, tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), arguments.rounds, arguments.calls, arguments.threads, observer)
        rows = folded(run, classifier(ResNetConfig()))
    print(f"\n{markdown(rows)}\n\n{this_machine(VERSIONS)}")
    return 0


def folded(run: Run, model: compress.Model) -> list[Row]:
    """Each variant: what its graph holds, its error against torch's uncompressed model in float64, and its speed.

    Random weights enlarge every rounding, so that float32 itself has an error to compare with.
    """
    pixels = {"pixel_values": structured(1, SIDE, seed=1)}
    with torch.no_grad():
        wanted = copy.deepcopy(model.module).double()(pixels["pixel_values"].double()).logits
    variants, rows = [], []
    for name, passes in track(run.observer, "export variants", list(VARIANTS.items())):
        made = compress.apply(model, passes, calibration=[model.example]).model if passes else model
        variants.append(run.written(name, made, pixels))
        given = OnnxRunner(run.scratch / name, run.threads)(**pixels).logits
        error = float((given - wanted).abs().max() / wanted.abs().max())
        rows.append({"variant": name, **_nodes(run.scratch / name / GRAPH), "error": error})
    timings = run.timed(variants)
    return [row | times(timings, row["variant"]) for row in rows]


def classifier(config: ResNetConfig) -> compress.Model:
    """A ResNet with random weights, whose batch norms have the statistics of random pictures."""
    torch.manual_seed(0)
    module = ResNetForImageClassification(config)
    example = {"pixel_values": structured(PICTURES, SIDE, seed=0)}
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.momentum = None  # the mean over all batches, of which there is one
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
    with torch.no_grad():
        module.train()(**example)
    return compress.Model(module.eval(), example, "image-classification")


def _nodes(file: Path) -> dict[str, str]:
    """How many operators the graph in `file` has, and how many of them are batch norms."""
    kinds = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    return {"operators": str(len(kinds)), "batch norms": str(kinds.count("BatchNormalization"))}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folded", description=__doc__)
    add_timing(parser, calls=20)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
