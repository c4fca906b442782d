"""`python -m benchmarks.linear_attention`: what `simplify_attention` costs on digits, and gains on a CPU.

Two tables, printed as Markdown:

- accuracy on scikit-learn's digits: the small ViT of `benchmarks.digits`, with more or fewer of its blocks changed;
- speed of the shape of DeiT-S with random weights, with square pictures of several sizes, batch 1: exported with
  `export.Onnx(runtime="cpu")` and timed in ONNX Runtime, in alternating rounds, one process each. Nothing is trained
  here: weights do not change the time.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import compress
from benchmarks.digits import read_digits
from benchmarks.exported import VERSIONS, Row, Run, add_timing, markdown, times
from benchmarks.machine import this_machine
from compress.console import hush, progress
from compress.example import example_inputs
from compress.passes.linear_sites import find_grid, find_sites
from compress.passes.simplify_attention import install
from compress.progress import track

DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
LAYERS: Sequence[tuple[int, ...] | None] = ((2, 3), (0, 1), None)
"""The blocks whose attention becomes linear, for the digits."""


def main() -> int:
    arguments = _parse()
    hush()
    with progress() as observer, tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), arguments.rounds, arguments.calls, arguments.threads, observer)
        tables = []
        if arguments.steps:
            tables.append(accuracy(run, arguments.steps))
        tables += [speed(run, size) for size in arguments.sizes]
    for rows in tables:
        print(f"\n{markdown(rows)}")
    print(f"\n{this_machine(VERSIONS)}")
    return 0


def accuracy(run: Run, steps: int) -> list[Row]:
    """How many held-out digits are read rightly with softmax, and with less of it."""
    digits = read_digits()
    rows: list[Row] = [
        {"linear in": "no block", "accuracy, %": 100 * digits.accuracy(digits.model), "loss": ""}
    ]
    context = compress.Context(training=digits.batches)
    for layers in track(run.observer, "digits", LAYERS):
        settings = compress.SimplifyAttention(layers=layers, steps=steps, learning_rate=1e-3)
        outcome = compress.run(digits.model, [settings], context)
        change = outcome.steps[-1].changes[-1]
        name = "all blocks" if layers is None else f"blocks {' and '.join(map(str, layers))}"
        loss = f"{change.before.split()[1]} to {change.after.split()[1]}"
        rows.append({"linear in": name, "accuracy, %": 100 * digits.accuracy(outcome.model), "loss": loss})
    return rows


def speed(run: Run, size: int) -> list[Row]:
    """A classifier of pictures of `size` pixels a side with softmax attention, and with linear attention."""
    model = _classifier(size)
    models = {"softmax": model, "linear": simplified(model)}
    pixels = {"pixel_values": model.example["pixel_values"][:1]}
    variants = [run.written(f"{name} {size}", one, pixels) for name, one in models.items()]
    timings = run.timed(variants)
    return [
        {
            "attention": name,
            "pixels": f"{size} x {size}",
            "MACs, G": one.graph.macs[""] / 1e9 / len(model.example["pixel_values"]),
            **times(timings, f"{name} {size}"),
        }
        for name, one in models.items()
    ]


def simplified(model: compress.Model) -> compress.Model:
    """`model` with linear attention in all blocks, untrained; the depthwise convolutions have random weights."""
    copied = replace(model, module=copy.deepcopy(model.module))
    (stack,) = (one for one in model.graph.stacks if len(one.blocks) == model.module.config.num_hidden_layers)
    sites, _ = find_sites(copied, stack, None)
    for layer in install(copied.module, sites, find_grid(copied, stack)):
        nn.init.normal_(layer.local.weight, std=0.1)
    return replace(copied, history=())  # another value, whose graph is traced anew


def _classifier(size: int) -> compress.Model:
    torch.manual_seed(0)
    module = ViTForImageClassification(ViTConfig(**DEIT_S, image_size=size)).eval()
    return compress.Model(module, example_inputs(module), "image-classification")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_attention", description=__doc__)
    add_timing(parser, calls=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[224, 384, 512], help="pixels a side")
    parser.add_argument(
        "--steps", type=int, default=300, help="of training on digits; 0: leave this table out"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
