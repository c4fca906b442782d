"""Two artifacts side by side: how far apart their outputs are, how fast and how large each is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifacts import read_artifact
from compress.catalog import find
from compress.compare import flatten_outputs, parity
from compress.errors import Unsuitable, UsageError
from compress.progress import SILENT, Observer, task
from compress.report import Parity
from compress.target import Artifact, Target, TensorSpec
from compress.timing import Timings, measure

if TYPE_CHECKING:
    import torch
    from rich.table import Table

DEFAULT_VOCABULARY = 100
"""Token numbers stay below this where an artifact has no config that says more."""


@dataclass(frozen=True)
class Contest:
    """An artifact against a baseline, on the same inputs. Sizes are bytes of all files."""

    artifact: str
    baseline: str
    parity: Parity
    timings: Timings
    artifact_bytes: int
    baseline_bytes: int


def contest(
    artifact: Path,
    baseline: Path,
    shape: Mapping[str, int],
    *,
    rounds: int = 3,
    calls: int = 8,
    threads: int = 2,
    observer: Observer = SILENT,
) -> Contest:
    """Run the artifacts in two folders on random inputs of `shape` and time them in alternating rounds.

    Raises `UsageError` where they take different inputs, and `Unsuitable` where one cannot run here.
    """
    from safetensors.torch import save_file

    sides = [_opened(folder) for folder in (artifact, baseline)]
    _require_same_inputs(*(opened for _, opened in sides))
    inputs = inputs_for(sides[0][1], shape)
    with task(observer, "compare outputs"):
        outputs = [flatten_outputs(target.load(opened)(**inputs)) for target, opened in sides]
        found = parity(outputs[1], outputs[0], str(artifact))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.safetensors"
        save_file(inputs, file)
        names = ("artifact", "baseline")
        variants = [
            target.variant(opened, name, file) for name, (target, opened) in zip(names, sides, strict=True)
        ]
        if None in variants:
            raise Unsuitable(
                "One of the two artifacts cannot run on this machine.", "Compare them where both can."
            )
        runnable = [variant for variant in variants if variant is not None]
        timings = measure(runnable, rounds, calls, "baseline", threads=threads, observer=observer)
    sizes = [sum(file.bytes for file in opened.files) for _, opened in sides]
    return Contest(str(artifact), str(baseline), found, timings, *sizes)


def as_table(found: Contest, shape: str) -> Table:
    """One row a property."""
    from rich import box
    from rich.table import Table

    speed = found.timings.speedup("artifact")
    seconds = [found.timings.seconds(name).median * 1e3 for name in ("baseline", "artifact")]
    table = Table(
        title=f"{found.artifact} against {found.baseline} ({shape})", box=box.SIMPLE_HEAD, show_header=False
    )
    table.add_row(
        "largest difference", f"{found.parity.max_abs:.2e} ({found.parity.relative:.1e} of the largest value)"
    )
    table.add_row("lowest cosine", f"{found.parity.cosine:.5f}")
    table.add_row("time of one call", f"{seconds[0]:.2f} -> {seconds[1]:.2f} ms")
    table.add_row("speed", f"{speed.median:.2f} x ({speed.low:.2f} to {speed.high:.2f})")
    table.add_row("size", f"{found.baseline_bytes / 1e6:.2f} -> {found.artifact_bytes / 1e6:.2f} MB")
    return table


def _opened(folder: Path) -> tuple[Target, Artifact]:
    artifact = read_artifact(folder)
    return find("compress.targets", artifact.target).model_validate(artifact.settings), artifact


def _require_same_inputs(first: Artifact, second: Artifact) -> None:
    names = [{spec.name for spec in artifact.inputs} for artifact in (first, second)]
    if names[0] != names[1]:
        taken = [
            f"{one.folder} takes {', '.join(sorted(two))}"
            for one, two in zip((first, second), names, strict=True)
        ]
        raise UsageError(
            f"The artifacts take different inputs: {'; '.join(taken)}.", "Compare exports of one model."
        )


def inputs_for(artifact: Artifact, shape: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Random inputs for `artifact`, its dynamic dimensions as `shape` says: any tokens, none of them masked.

    The state of a cache is left out: it starts empty.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = _vocabulary(artifact.folder)
    return {
        spec.name: _made(spec, [_size(spec, size, shape) for size in spec.shape], vocabulary, generator)
        for spec in artifact.inputs
        if not spec.name.startswith("input.")
    }


def _made(spec: TensorSpec, sizes: list[int], vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    dtype = getattr(torch, spec.dtype)
    if spec.name.endswith("mask"):
        return torch.ones(sizes, dtype=dtype)
    if spec.name == "position_ids":
        return torch.arange(sizes[-1]).expand(sizes).contiguous()
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(1 if spec.name == "token_type_ids" else vocabulary, sizes, generator=generator).to(
        dtype
    )


def _size(spec: TensorSpec, size: int | str, shape: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    if size not in shape:
        raise UsageError(
            f"The input `{spec.name}` has the dimension `{size}`, and the shape gives {', '.join(shape)}.",
            f"Name it: --shape {size}=8 (several are separated by commas).",
        )
    return shape[size]


def _vocabulary(folder: Path) -> int:
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return next(
        (one["vocab_size"] for one in (config, *_nested(config)) if "vocab_size" in one), DEFAULT_VOCABULARY
    )


def _nested(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [value for value in config.values() if isinstance(value, dict)]
