"""`python -m benchmarks.token_shapes`: what token reduction gains on a CPU at larger shapes, with random weights.

Everything is exported with `export.Onnx(runtime="cpu")` and timed in ONNX Runtime, in alternating rounds, one process
each. Three tables, printed as Markdown and written as JSON:

- a classifier of the shape of DeiT-S, whole;
- one reduction of its tokens, in per cent of the time of one of its blocks on as many tokens;
- dense prediction at the shape of ViT-B, 512 x 512 pixels, batch 1: speed, and the error of the last hidden states.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import compress
from benchmarks.exported import VERSIONS, Row, Run, add_timing, markdown, times
from benchmarks.machine import this_machine
from benchmarks.random_pictures import structured
from benchmarks.token_parts import Block, Reduction, cut_off, fewer, flow_of
from compress.console import hush, progress
from compress.example import example_inputs
from compress.progress import track
from compress.timing import Spread, Timings
from export.runners import OnnxRunner

DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 224}
BATCH = 8
KEEP = 0.6
METHODS = ("transform", "tome", "prune")

VIT_B = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 512}
DENSE_METHODS = ("cluster", "tome", "transform")
DENSE = ((0.7, 3), (0.5, 3))
"""The share of the multiply-accumulates that is left, and the block before which reduction begins."""
PICTURES = 4
"""The error is taken over so many pictures."""

UNCOMPRESSED, CUT = "uncompressed", "no work: as many tokens, cut off"


def main() -> int:
    arguments = _parse()
    hush()
    found: dict[str, list[Row]] = {}
    with progress() as observer, tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for title, table in TABLES.items():
            folder = Path(scratch) / table.__name__
            folder.mkdir()
            run = Run(folder, arguments.rounds, arguments.calls, arguments.threads, observer)
            found[title] = table(run)
            print(f"\n### {title}\n\n{markdown(found[title])}")
    facts = {"machine": this_machine(VERSIONS), "rounds": arguments.rounds, "calls": arguments.calls}
    written = {**facts, "threads": arguments.threads, "tables": found}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(written, default=asdict, indent=2) + "\n", encoding="utf-8")
    return 0


def classifier(run: Run) -> list[Row]:
    """Each method, and as many tokens without the work of reducing them, which no method can be faster than."""
    model = _classifier()
    models = {UNCOMPRESSED: model}
    models |= {method: _reduced(model, method=method, keep=KEEP) for method in METHODS}
    models[CUT] = cut_off(_reduced(model, method=METHODS[0], keep=KEEP))
    pixels = torch.randn(BATCH, *model.example["pixel_values"].shape[1:])
    exported = track(run.observer, "export classifiers", list(models.items()))
    timings = run.timed([run.written(name, one, {"pixel_values": pixels}) for name, one in exported])
    return [
        {"variant": name, "MACs left, %": _share(one, model)} | times(timings, name)
        for name, one in models.items()
    ]


def reducers(run: Run) -> list[Row]:
    """The time of one reduction against that of one block on as many tokens as it is given."""
    model = _classifier()
    config: Any = model.module.config
    flows = {method: flow_of(_reduced(model, method=method, keep=KEEP)) for method in METHODS}
    layout = flows[METHODS[0]].layout
    hidden = {"hidden": torch.randn(BATCH, layout.count, config.hidden_size)}
    both = {**hidden, "size": 1 + torch.rand(BATCH, layout.count)}
    variants = [run.written("block", _part(Block(model.module, layout.blocks[0]), hidden), hidden)]
    for method, flow in flows.items():
        part = Reduction(flow, config.num_attention_heads, config.hidden_size)
        variants.append(run.written(method, _part(part, both), both))
    timings = run.timed(variants)
    return [
        {
            "reducer": method,
            "tokens": f"{layout.count} to {fewer(flow)}",
            "ms": 1e3 * timings.seconds(method).median,
            "% of a block": _per_cent(timings, method),
        }
        for method, flow in flows.items()
    ]


def dense(run: Run) -> list[Row]:
    """Every position is read. The error is that of the exported file against torch's uncompressed model."""
    model = _encoder()
    pixels = structured(PICTURES, model.module.config.image_size, seed=2)
    with torch.no_grad():
        wanted = model.module(pixel_values=pixels).last_hidden_state
    variants, rows = [], []
    for name, settings in track(run.observer, "export dense models", list(_dense_settings().items())):
        reduced = _reduced(model, **settings) if settings else model
        variants.append(run.written(name, reduced, {"pixel_values": pixels[:1]}))
        given = OnnxRunner(run.scratch / name, run.threads)(pixel_values=pixels).last_hidden_state
        error = float((given - wanted).norm() / wanted.norm())
        rows.append({"variant": name, "MACs left, %": _share(reduced, model), "error": error})
    timings = run.timed(variants)
    return [row | times(timings, row["variant"]) for row in rows]


TABLES = {
    f"DeiT-S at 224 x 224, batch {BATCH}": classifier,
    f"One reduction against one block of DeiT-S, batch {BATCH}": reducers,
    "Dense prediction, ViT-B at 512 x 512, batch 1": dense,
}


def _per_cent(timings: Timings, name: str) -> Spread:
    """The time of `name` in per cent of the baseline's, over the rounds."""
    pairs = zip(timings.rounds[name], timings.rounds[timings.baseline], strict=True)
    return Spread.over(100 * own / base for own, base in pairs)


def _classifier() -> compress.Model:
    torch.manual_seed(0)
    module = ViTForImageClassification(ViTConfig(**DEIT_S)).eval()
    return compress.Model(module, example_inputs(module), "image-classification")


def _encoder() -> compress.Model:
    torch.manual_seed(0)
    module = ViTModel(ViTConfig(**VIT_B), add_pooling_layer=False).eval()
    example = {"pixel_values": structured(2, VIT_B["image_size"], seed=1)}
    return compress.Model(module, example, "feature-extraction")


def _part(part: nn.Module, inputs: Mapping[str, Tensor]) -> compress.Model:
    return compress.Model(part.eval(), dict(inputs), "feature-extraction")


def _dense_settings() -> dict[str, dict[str, Any]]:
    """By name; none for the uncompressed model. Pairs merge at most half of the tokens at once, so they do it twice."""
    found: dict[str, dict[str, Any]] = {UNCOMPRESSED: {}}
    for keep, place in DENSE:
        for method in DENSE_METHODS:
            at = (place,) if method == "cluster" else (place, place + 1)
            name = f"{method}, keep {keep}, before {' and '.join(map(str, at))}"
            found[name] = {"method": method, "keep": keep, "at": at}
    return found


def _reduced(model: compress.Model, **settings: Any) -> compress.Model:
    return compress.apply(model, [compress.MergeTokens(**settings)]).model


def _share(model: compress.Model, original: compress.Model) -> float:
    """The multiply-accumulates of `model` in per cent of the original's."""
    return 100 * model.graph.macs[""] / original.graph.macs[""]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_shapes", description=__doc__)
    add_timing(parser, calls=5)
    parser.add_argument("--scratch", type=Path, help="folder for the artifacts, some 5 GB, which are removed")
    parser.add_argument("--out", type=Path, default=Path("build/bench/token_shapes.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
