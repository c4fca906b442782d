"""`python -m benchmarks.grouped`: a language model with fewer key and value heads, healed for some minutes.

`heal` groups the heads of the model, trains what comes of it by `distill` on the logits for at most `--minutes`, and
notes the log-perplexity of the three on held-out text; it runs on any device of torch, and needs no runtime. `measure`
exports the original and the healed model with their caches, and times decoding steps in ONNX Runtime on a CPU, in
alternating rounds, one variant a process. `all` does both. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import compress
from benchmarks import decoding
from compress.console import hush, progress, show_error
from compress.data import Source, batches
from compress.devices import moved, on_device
from compress.errors import ModelpressError, UsageError
from compress.versions import package_versions, processor

if TYPE_CHECKING:
    from compress.progress import Observer
    from compress.target import Artifact

TRAINING = "lm_calibration.txt.gz"
HELDOUT = "lm_dev.txt.gz"
WINDOW = 512
CALIBRATED = 128
"""So many windows of the training text calibrate."""
TRIED = (8, 48)
"""Two short trainings: by how much longer the second takes, a step takes."""
SPARED = 0.9
"""The share of the minutes that is planned for, as times vary."""
PAST = 511
BATCHES = (1, 8)
FACTS = "heal.json"


@dataclass(frozen=True)
class Healing:
    """How the grouped model is trained: on `windows` of the text, `batch` a step, for `minutes` or `steps` at most."""

    kv_heads: int
    minutes: float
    learning_rate: float
    device: str
    batch: int
    windows: int
    steps: int


def main() -> int:
    arguments = _parse()
    hush()
    try:
        with progress() as observer:
            if arguments.stage in ("all", "heal"):
                heal(arguments.data, arguments.model, arguments.out, _healing(arguments), observer)
            if arguments.stage in ("all", "measure"):
                print(measure(arguments.data, arguments.model, arguments.out, arguments, observer))
            else:
                print((arguments.out / FACTS).read_text(encoding="utf-8"))
    except ModelpressError as error:
        show_error(error)
        return error.exit_status
    return 0


def heal(data: Path, model: Path, out: Path, asked: Healing, observer: Observer) -> dict[str, Any]:
    """Group and train; writes the checkpoints `grouped` and `healed` and the facts into `out`, and gives the facts."""
    out.mkdir(parents=True, exist_ok=True)
    original = compress.load_model(model, task="text-generation")
    heldout = decoding.scored(data / HELDOUT, original)
    text = Source(text=data / TRAINING, samples=asked.windows, max_length=WINDOW, batch_size=asked.batch)
    training = list(batches(text, original))
    calibrating = list(batches(text.model_copy(update={"samples": CALIBRATED}), original))
    context = compress.Context(
        device=asked.device, calibration=calibrating, training=training, observer=observer, teacher=original
    )
    grouping = compress.GroupQueries(kv_heads=asked.kv_heads, unhealed=True)
    begun = time.perf_counter()
    grouped = compress.run(original, [grouping], context).model
    grouped_in = time.perf_counter() - begun
    begun = time.perf_counter()
    steps = _affordable_steps(grouped, context, asked)
    healed = compress.run(grouped, [_distill(asked, steps)], context).model
    healed_in = time.perf_counter() - begun
    models = {"original": original, "grouped": grouped, "healed": healed}
    facts = {
        "losses": {name: log_perplexity(one, heldout, asked.device) for name, one in models.items()},
        "tokens": heldout.numel(),
        "seconds to group": grouped_in,
        "seconds to heal": healed_in,
        "steps": steps,
        "learning rate": asked.learning_rate,
        "tokens a step": asked.batch * WINDOW,
        "windows of the text": sum(len(one["input_ids"]) for one in training),
        "device": _device_name(asked.device),
        "versions": package_versions(),
    }
    compress.save(grouped, out / "grouped", force=True)
    compress.save(healed, out / "healed", force=True)
    (out / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def log_perplexity(model: compress.Model, tokens: Tensor, device: str) -> float:
    """The mean negative log-likelihood of each token but the first of its window (windows, length), in torch."""
    total = 0.0
    with torch.no_grad(), on_device(model.module, device):
        for rows in tokens.split(4):
            given = moved({"input_ids": rows}, device)
            logits = model.module(**given, use_cache=False).logits[:, :-1].float()
            wanted = given["input_ids"][:, 1:]
            total += float(torch.nn.functional.cross_entropy(logits.mT, wanted, reduction="sum"))
    return total / (len(tokens) * (tokens.shape[1] - 1))


def measure(data: Path, model: Path, out: Path, timing: argparse.Namespace, observer: Observer) -> str:
    """Export the original and the healed model, and give the table of losses, caches and decoding steps."""
    import export
    from benchmarks.exported import VERSIONS, markdown
    from benchmarks.machine import this_machine

    facts = _facts(out)
    models = {
        "original": compress.load_model(model, task="text-generation"),
        "healed": compress.load(out / "healed"),
    }
    heldout = decoding.scored(data / HELDOUT, models["original"])[: timing.windows_exported]
    artifacts = {}
    for name, one in models.items():
        _clear(out / "onnx" / name)
        artifacts[name] = export.Onnx(runtime="cpu").write(one, out / "onnx" / name)
    timings = {batch: _timed(artifacts, batch, timing, observer) for batch in BATCHES}
    rows = []
    for name, artifact in artifacts.items():
        exported = decoding.log_perplexity(artifact.folder, heldout, timing.threads)
        row: dict[str, Any] = {
            "model": name,
            "log-perplexity": f"{facts['losses'][name]:.4f}",
            f"exported, {len(heldout)} windows": f"{exported:.4f}",
            "weights, MB": f"{_weight_bytes(artifact) / 1e6:.1f}",
            "cache, bytes a token": f"{cache_bytes(artifact)}",
        }
        for batch, timed in timings.items():
            row[f"step of {batch}, ms"] = 1e3 * timed.seconds(name).median
            row[f"step of {batch}, speed"] = timed.speedup(name)
        rows.append(row)
    return f"\n{markdown(rows)}\n\n{said(facts)}\n\n{this_machine(VERSIONS)}"


def said(facts: Mapping[str, Any]) -> str:
    """The healing, in words."""
    losses = facts["losses"]
    before, after = (losses[name] - losses["original"] for name in ("grouped", "healed"))
    return (
        f"Log-perplexity over the original's {losses['original']:.4f}: {before:.4f} grouped, {after:.4f} healed, "
        f"{after / before:.2f} of that, in {facts['seconds to heal'] / 60:.1f} minutes ({facts['steps']} steps of "
        f"{facts['tokens a step']} tokens, learning rate {facts['learning rate']}) on {facts['device']}."
    )


def cache_bytes(artifact: Artifact) -> int:
    """Bytes that one more token takes in the key-value cache of an exported decoder."""
    import numpy as np

    total = 0
    for spec in artifact.inputs:
        if spec.name.startswith("input."):
            sizes = [size for size in spec.shape if isinstance(size, int)]
            total += int(np.prod(sizes)) * np.dtype(spec.dtype).itemsize
    return total


def _affordable_steps(model: compress.Model, context: compress.Context, asked: Healing) -> int:
    """How many steps of training the minutes allow, by the time that a few take. What these train is thrown away."""
    seconds = []
    for steps in TRIED:
        begun = time.perf_counter()
        # So small a rate lowers the loss in a few steps too, which the pass proves.
        compress.run(model, [_distill(asked, steps).model_copy(update={"learning_rate": 1e-5})], context)
        seconds.append(time.perf_counter() - begun)
    step = max((seconds[1] - seconds[0]) / (TRIED[1] - TRIED[0]), 1e-3)
    beside = max(seconds[1] - TRIED[1] * step, 0)  # the losses before and after, and the proof
    left = 60 * asked.minutes * SPARED - sum(seconds) - beside
    return max(1, min(asked.steps, int(left / step)))


def _distill(asked: Healing, steps: int) -> compress.Distill:
    return compress.Distill(steps=steps, learning_rate=asked.learning_rate, loss="logits", precision="auto")


def _timed(
    artifacts: Mapping[str, Artifact], batch: int, timing: argparse.Namespace, observer: Observer
) -> Any:
    from compress.timing import Variant
    from compress.timing import measure as measured

    asked = {"batch": batch, "new": 1, "past": PAST}
    variants = [
        Variant(name, "benchmarks.decoding:timed", {"folder": str(one.folder), **asked})
        for name, one in artifacts.items()
    ]
    return measured(
        variants, timing.rounds, timing.calls, "original", threads=timing.threads, observer=observer
    )


def _facts(out: Path) -> dict[str, Any]:
    file = out / FACTS
    if not file.exists():
        raise UsageError(f"There is no {file}: nothing was healed there.", "Run the stage `heal` first.")
    return json.loads(file.read_text(encoding="utf-8"))


def _clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _weight_bytes(artifact: Artifact) -> int:
    return sum(
        file.stat().st_size for file in artifact.folder.iterdir() if file.name.startswith("model.onnx")
    )


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(processor()["name"])


def _healing(arguments: argparse.Namespace) -> Healing:
    names = ("kv_heads", "minutes", "learning_rate", "device", "batch", "windows", "steps")
    return Healing(**{name: getattr(arguments, name) for name in names})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouped", description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("all", "heal", "measure"), default="all")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {TRAINING} and {HELDOUT}")
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--out", type=Path, default=Path("grouped"), help="folder of what is made")
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10, help="the most that healing takes")
    parser.add_argument("--steps", type=int, default=4000, help="the most steps of training")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--windows", type=int, default=4096, help="the most windows of the text to train on")
    parser.add_argument("--device", default="cpu", help="the device of torch that heals")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds over both models")
    parser.add_argument("--calls", type=int, default=50, help="timed decoding steps a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--windows-exported", type=int, default=24, help="windows scored by the exported files"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
