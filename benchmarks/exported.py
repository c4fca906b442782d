"""Models exported for a CPU and timed in ONNX Runtime, and what is known of each as the row of a table.

Everything is exported with `export.Onnx(runtime="cpu")` and timed in alternating rounds, one process each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

import compress
import export
from compress.pipeline import state_bytes
from compress.progress import Observer
from compress.timing import Spread, Timings, Variant, measure
from export.graph import export_graph
from export.to_onnx import save, timed

VERSIONS = ("modelpress", "torch", "transformers", "onnx", "onnxruntime")

Cell = str | float | Spread
Row = dict[str, Cell]


@dataclass(frozen=True)
class Run:
    """Where artifacts go, and how much is timed."""

    scratch: Path
    rounds: int
    calls: int
    threads: int
    observer: Observer

    def written(self, name: str, model: compress.Model, inputs: Mapping[str, Tensor]) -> Variant:
        """`model`, exported into the folder `name` and to be timed on `inputs`."""
        export.Onnx(runtime="cpu").write(model, self.scratch / name)
        return self._timed(name, inputs)

    def unlowered(self, name: str, model: compress.Model, inputs: Mapping[str, Tensor]) -> Variant:
        """`model` as the exporter of transformers writes it, without our rewrites, and to be timed on `inputs`."""
        save(export_graph(model, opset=export.Onnx().opset, scheme="asymmetric"), model, self.scratch / name)
        return self._timed(name, inputs)

    def _timed(self, name: str, inputs: Mapping[str, Tensor]) -> Variant:
        file = self.scratch / f"{name}.safetensors"
        save_file(dict(inputs), file)
        return timed(self.scratch / name, name, file)

    def timed(self, variants: Sequence[Variant]) -> Timings:
        """The times of `variants`, with the first as the baseline."""
        first = variants[0].name
        return measure(variants, self.rounds, self.calls, first, threads=self.threads, observer=self.observer)

    def with_times(self, rows: Sequence[Row], variants: Sequence[Variant]) -> list[Row]:
        """`rows` with the times of their `variants`, one each; without variants as they are."""
        if not variants:
            return list(rows)
        timings = self.timed(variants)
        return [row | times(timings, one.name) for row, one in zip(rows, variants, strict=True)]


def add_timing(parser: argparse.ArgumentParser, calls: int) -> None:
    """Give `parser` what a `Run` is told of timing; `calls` is the default."""
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds over all variants")
    parser.add_argument("--calls", type=int, default=calls, help="timed calls a process")
    parser.add_argument("--threads", type=int, default=2)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; all have the columns of the first."""
    lines = [
        list(rows[0]),
        ["---", *["---:"] * (len(rows[0]) - 1)],
        *(map(_cell, row.values()) for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Cell) -> str:
    if isinstance(value, Spread):
        return f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"
    return value if isinstance(value, str) else f"{value:.4g}"


def sizes(model: compress.Model) -> Row:
    """The cells of what `model` stores, in megabytes, and of the multiply-accumulates of its example, in billions."""
    return {"MB": state_bytes(model.module) / 1e6, "GMACs": model.graph.macs[""] / 1e9}


def times(timings: Timings, name: str) -> Row:
    """The cells of the variant `name`: milliseconds a call, and how many times as fast as the baseline."""
    return {"ms": 1e3 * timings.seconds(name).median, "speed": timings.speedup(name)}
