"""`python -m benchmarks.sparse`: what zeros by `sparsify` cost a language model, and what they gain in ONNX Runtime.

    python -m benchmarks.sparse quality --model FOLDER --data FOLDER
    python -m benchmarks.sparse speed   --model FOLDER --data FOLDER

`quality` prunes half of the weights, anywhere and as 2:4, by each score, and gives the log-perplexity on two texts; and
that after `distill`, with the zeros kept. It runs on any device of torch and needs no runtime. `speed` exports the
model and its pruned forms for a CPU, and times them in alternating rounds, one process each. Both print Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import compress
from benchmarks.outliers import CALIBRATION, TEXTS, WINDOW, log_perplexity
from compress.console import hush, progress
from compress.data import Source, batches
from compress.encoding import windows
from compress.passes.base import Pass
from compress.passes.sparsify import Sparsify
from compress.progress import Observer, track
from compress.reading import whole_text

SCORES = ("magnitude", "wanda", "sparsegpt")
FORMS: Mapping[str, Mapping[str, str]] = {"50 % anywhere": {}, "2:4": {"pattern": "2:4"}}
TOKENS = 512
"""So many tokens are timed, in one row."""

Row = Sequence[str]


def main() -> int:
    arguments = _parse()
    hush()
    with progress() as observer:
        model = compress.load_model(arguments.model, task="text-generation")
        table = (quality if arguments.what == "quality" else speed)(model, arguments, observer)
    print(f"\n{table}")
    return 0


def quality(model: compress.Model, arguments: argparse.Namespace, observer: Observer) -> str:
    """One row for the model and for each way to prune it."""
    texts = {
        name: torch.stack(windows(whole_text(arguments.data / file), WINDOW, model)[: arguments.windows])
        for name, file in TEXTS.items()
    }
    calibration = batches(_source(arguments, arguments.calibration), model)
    training = batches(_source(arguments, arguments.samples), model)
    whole = _losses(model, texts, arguments.device)
    rows = [["uncompressed", *(f"{loss:.3f}" for loss in whole), ""]]
    for name, passes in track(observer, "variants", list(_variants(arguments.steps).items())):
        begun = time.perf_counter()
        made = compress.apply(
            model,
            passes,
            calibration=calibration,
            training=training,
            device=arguments.device,
            observer=observer,
        ).model
        seconds = time.perf_counter() - begun
        added = [
            loss - before for loss, before in zip(_losses(made, texts, arguments.device), whole, strict=True)
        ]
        rows.append([name, *(f"+{one:.3f}" for one in added), f"{seconds:.0f}"])
        print(f"{rows[-1]}, {100 * zeros(made):.1f} % of the pruned weights are zeros", flush=True)
    return markdown(["variant", *TEXTS, "seconds"], rows)


def speed(model: compress.Model, arguments: argparse.Namespace, observer: Observer) -> str:
    """One row for the model and for each form of zeros, by `sparsegpt`: bytes of the artifact, and time."""
    from benchmarks.builds import model_bytes
    from benchmarks.exported import Run
    from benchmarks.exported import markdown as exported_markdown

    calibration = batches(_source(arguments, arguments.calibration), model)
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(5, int(model.module.config.vocab_size), (1, TOKENS))}
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), arguments.rounds, arguments.calls, arguments.threads, observer)
        variants, rows = [], []
        for name, settings in {"uncompressed": None, **FORMS}.items():
            passes = [] if settings is None else [Sparsify(**settings)]
            made = compress.apply(model, passes, calibration=calibration).model if passes else model
            variants.append(run.written(name, made, inputs))
            rows.append({"variant": name, "MB": model_bytes(run.scratch / name) / 1e6})
        return exported_markdown(run.with_times(rows, variants))


def markdown(head: Row, rows: Sequence[Row]) -> str:
    """The rows as a table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def zeros(model: compress.Model) -> float:
    """The share of zeros in the pruned weights of `model`."""
    from compress.layers.sparse import is_sparse

    weights = [part.get_parameter("weight") for part in model.module.modules() if is_sparse(part)]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def _variants(steps: int) -> dict[str, list[Pass]]:
    pruned = {
        f"{form}, {score}": Sparsify(score=score, **settings)  # type: ignore[arg-type]
        for form, settings in FORMS.items()
        for score in SCORES
    }
    variants: dict[str, list[Pass]] = {name: [one] for name, one in pruned.items()}
    if steps:
        healed = {f"{name}, distilled": one for name, one in pruned.items() if one.score == "sparsegpt"}
        variants |= {name: [one, compress.Distill(steps=steps)] for name, one in healed.items()}
    return variants


def _losses(model: compress.Model, texts: Mapping[str, Tensor], device: str) -> list[float]:
    return [log_perplexity(model.module, tokens, device) for tokens in texts.values()]


def _source(arguments: argparse.Namespace, samples: int) -> Source:
    return Source(text=arguments.data / CALIBRATION, samples=samples, max_length=WINDOW, batch_size=8)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {CALIBRATION} and the texts")
    parser.add_argument(
        "--calibration", type=int, default=64, help=f"windows of {WINDOW} tokens to calibrate on"
    )
    parser.add_argument("--windows", type=int, default=32, help="windows of each text to score")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200, help="of `distill`; 0: without it")
    parser.add_argument("--samples", type=int, default=256, help="windows to train on")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds over all variants")
    parser.add_argument("--calls", type=int, default=10, help="timed calls a process")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
