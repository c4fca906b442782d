"""A picture classifier's exported ONNX folder: timed calls, and its answers to a whole set of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.pictures import batches

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 100
"""So many pictures are answered at a time."""


def timed(folder: str, batch: int, threads: int) -> Callable[[], Any]:
    """A call on `batch` random pictures, for `compress.timing`."""
    import torch

    from export.runners import OnnxRunner

    runner = OnnxRunner(folder, threads)
    torch.manual_seed(0)
    pixels = torch.randn(batch, *runner.inputs["pixel_values"].shape[1:])
    return lambda: runner(pixel_values=pixels)


def answers(folder: Path, pictures: Path, model: Path, threads: int) -> Tensor:
    """The logits (pictures, classes) of the file in `folder`, computed once and kept beside it.

    `model` is the folder of the original, which says how `pictures` are prepared.
    """
    import torch

    from export.runners import OnnxRunner

    kept = folder / f"logits-{hashlib.sha256(pictures.read_bytes()).hexdigest()[:12]}.npy"
    if not kept.exists():
        runner = OnnxRunner(folder, threads)
        found = [runner(pixel_values=pixels).logits for pixels in batches(pictures, model, BATCH)]
        partial = kept.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, torch.cat(found).numpy())
        partial.rename(kept)
    return torch.from_numpy(np.load(kept))


def top1(logits: Tensor, classes: Tensor) -> float:
    """The share of pictures whose class has the largest logit, in per cent."""
    return 100 * float((logits.argmax(-1) == classes).double().mean())


def divergence(wanted: Tensor, given: Tensor) -> float:
    """The mean over pictures of Kullback and Leibler's divergence of the answers `given` from those `wanted`."""
    from torch.nn.functional import kl_div

    own, other = (logits.double().log_softmax(-1) for logits in (wanted, given))
    return float(kl_div(other, own, log_target=True, reduction="batchmean"))
