"""`python -m benchmarks.streamed`: time and peak memory of a streamed `factorize` on random Llamas of several sizes.

The models are written shard by shard in bfloat16, and removed afterwards, as is what is made of them. Each run is a
process of its own; its peak is the kernel's own (of several processes of a run the largest).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import Machine, require_packages, this_machine

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Size:
    """A Llama: its blocks, their width, that of their MLPs, heads and key-value heads, and the vocabulary."""

    blocks: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "0.1B": Size(6, 1024, 2816, 16, 16, 32000),
    "0.2B": Size(12, 1024, 2816, 16, 16, 32000),
    "0.3B": Size(24, 1024, 2816, 16, 16, 32000),
    "1.1B": Size(22, 2048, 5632, 32, 4, 32000),
    "1.2B": Size(8, 3072, 8192, 24, 8, 128256),
    "3.2B": Size(28, 3072, 8192, 24, 8, 128256),
}
"""The first three differ only in the number of blocks, and so do the last two."""


@dataclass(frozen=True)
class Run:
    """What one streamed run took: parameters, bytes of the files, seconds, those of the CPU (all its threads and
    processes together), and peak bytes of its largest process.
    """

    name: str
    parameters: int
    bytes: int
    seconds: float
    cpu_seconds: float
    peak: int
    processes: int


def main() -> int:
    arguments = _parse()
    if arguments.only:
        _stream(arguments.only, arguments.made, arguments)
        return 0
    require_packages((*PACKAGES, "matplotlib"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            runs.append(measure(name, Path(scratch), arguments))
        print(_row(runs[-1]), flush=True)
        report(runs, this_machine(PACKAGES), arguments)
    print(f"\n{(arguments.out / 'streamed.md').read_text(encoding='utf-8')}")
    return 0


def measure(name: str, scratch: Path, arguments: argparse.Namespace) -> Run:
    """Make the model `name` in `scratch`, and factorize it in a process, or several."""
    parameters = write_model(scratch / "model", SIZES[name])
    begun = time.perf_counter()
    cpu_seconds, peak = _used(_command(scratch, arguments), arguments.threads)
    seconds = time.perf_counter() - begun
    files = (scratch / "model").glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    return Run(name, parameters, size, seconds, cpu_seconds, peak, arguments.processes)


def write_model(folder: Path, size: Size) -> int:
    """A random Llama in bfloat16, one file a block. Returns its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compress.stored import Shards, close_shards

    folder.mkdir()
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        module = LlamaForCausalLM(config)
    shards, generator, total = Shards(folder), torch.Generator().manual_seed(0), 0
    for part in ("model.embed_tokens", "model.norm", *(f"model.layers.{one}" for one in range(size.blocks))):
        named = module.get_submodule(part).named_parameters(prefix=part)
        tensors = {name: _random(tuple(one.shape), generator) for name, one in named}
        total += sum(one.numel() for one in tensors.values())
        shards.write(tensors)
    close_shards(folder, shards.written)
    return total


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A weight that keeps the size of what it maps, or the ones of a norm."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16) / shape[1] ** 0.5


def _stream(model: Path, out: Path, arguments: argparse.Namespace) -> None:
    """One run, in this process: its share, if a launcher started several."""
    import torch

    import compress
    from compress.console import hush

    hush()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(1)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    shape = (1, arguments.length)
    ids = [torch.randint(vocabulary, shape, generator=generator) for _ in range(arguments.windows)]
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    settings = compress.Factorize(method="svd_llm", ranks="uniform", keep=0.8)
    step = compress.stream(model, settings, out, calibration=batches, observer=_Log())
    print(f"{step.bytes_before} -> {step.bytes_after} bytes, {len(step.changes)} changes", flush=True)


class _Log:
    """An observer that prints every step with its time."""

    def begin(self, what: str, total: int | None) -> _Log:
        self.begun, self.done, self.total = time.perf_counter(), 0, total
        print(f"{what}: {total} steps", flush=True)
        return self

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        print(f"  {self.done} of {self.total}: {time.perf_counter() - self.begun:.1f} s", flush=True)

    def end(self, task: object) -> None:
        del task


def _command(scratch: Path, arguments: argparse.Namespace) -> list[str]:
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}", "-m"]
    launcher = several if arguments.processes > 1 else []
    given = {name: getattr(arguments, name) for name in ("windows", "length", "threads")}
    settings = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    paths = ["--only", str(scratch / "model"), "--made", str(scratch / "out")]
    return [sys.executable, "-m", *launcher, "benchmarks.streamed", *paths, *settings]


def _used(command: Sequence[str], threads: int) -> tuple[float, int]:
    """Run `command`, and give its CPU seconds and the peak resident bytes of its largest process.

    Raises `CalledProcessError` if it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), list(command))
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def report(runs: Sequence[Run], machine: Machine, arguments: argparse.Namespace) -> None:
    """Write the runs so far as JSON, Markdown and a picture."""
    facts = {"machine": asdict(machine), "runs": [asdict(one) for one in runs]}
    facts |= {name: getattr(arguments, name) for name in ("windows", "length", "threads", "processes")}
    into = arguments.out / "streamed"
    into.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    head = "| model | blocks of width | M parameters | files, GB | seconds | CPU s | CPU s / M parameters | peak, GB |"
    lines = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", *map(_row, runs)]
    how = (
        f"{machine.cpu}, {machine.date}, {arguments.threads} threads, {arguments.processes} process(es), "
        f"{arguments.windows} windows of {arguments.length} tokens."
    )
    into.with_suffix(".md").write_text("\n".join([how, "", *lines, ""]), encoding="utf-8")
    draw(runs, into.with_suffix(".png"))


def _row(run: Run) -> str:
    size, millions = SIZES[run.name], run.parameters / 1e6
    return (
        f"| {run.name} | {size.blocks} of {size.width} | {millions:.0f} | {run.bytes / 1e9:.2f} | {run.seconds:.0f} "
        f"| {run.cpu_seconds:.0f} | {run.cpu_seconds / millions:.2f} | {run.peak / 1e9:.2f} |"
    )


def draw(runs: Sequence[Run], file: Path) -> None:
    """Write the picture: CPU time, and peak memory beside the bytes of the files, against parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    widths = sorted({SIZES[run.name].width for run in runs})
    for width in widths:
        alike = sorted(
            (run for run in runs if SIZES[run.name].width == width), key=lambda run: run.parameters
        )
        across = [run.parameters / 1e9 for run in alike]
        left.plot(across, [run.cpu_seconds / 60 for run in alike], "o-", label=f"blocks of width {width}")
        right.plot(across, [run.peak / 1e9 for run in alike], "o-", label=f"peak, width {width}")
    ordered = sorted(runs, key=lambda run: run.parameters)
    across = [run.parameters / 1e9 for run in ordered]
    right.plot(across, [4e-9 * run.parameters for run in ordered], "k--", label="float32 weights")
    for panel, label in ((left, "minutes of CPU"), (right, "GB")):
        panel.set(xlabel="parameters, billions", ylabel=label, xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(file, dpi=120)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streamed", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the results")
    parser.add_argument("--scratch", type=Path, help="folder for models and checkpoints, which are removed")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of random tokens")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--made", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
