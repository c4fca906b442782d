"""A decoder's exported ONNX folder: timed calls, and its quality on text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.encoding import windows
from compress.model import Model
from compress.reading import whole_text

if TYPE_CHECKING:
    import torch

WINDOW = 512
TOKENS = 60_000
"""So many of a text's first tokens are scored, in whole windows."""


def timed(folder: str, batch: int, new: int, past: int, threads: int) -> Callable[[], Any]:
    """A call on `batch` x `new` random tokens that follow `past` ones in the cache, for `compress.timing`."""
    import torch

    from export.runners import OnnxRunner

    runner = OnnxRunner(folder, threads)
    torch.manual_seed(0)
    tokens = torch.randint(int(runner.exported.config.vocab_size), (batch, past + new))
    cache = runner(input_ids=tokens[:, :past]).past_key_values if past else None
    return lambda: runner(input_ids=tokens[:, past:], past_key_values=cache)


def scored(file: Path, model: Model) -> torch.Tensor:
    """The windows (windows, 512) of a text's first tokens."""
    import torch

    return torch.stack(windows(whole_text(file), WINDOW, model)[: TOKENS // WINDOW])


def log_perplexity(folder: Path, tokens: torch.Tensor, threads: int) -> float:
    """The mean negative log-likelihood of each token but the first of its window (windows, length)."""
    import torch

    from export.runners import OnnxRunner

    runner, total = OnnxRunner(folder, threads), 0.0
    for rows in tokens.split(4):
        logits = runner(input_ids=rows).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="sum"))
    return total / (len(tokens) * (tokens.shape[1] - 1))
