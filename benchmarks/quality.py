"""Quality of sentence embeddings on STS-B's development set, for every variant by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runners import Encode
from compress.data import read_table
from compress.evaluate import Evaluation, mean_pooled, rank_correlation

if TYPE_CHECKING:
    import torch

FILE = "stsb_dev.tsv.gz"
BATCH = 32
MAX_LENGTH = 256


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with human scores of their similarity, 0 to 5."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    scores: tuple[float, ...]


def load_pairs(folder: Path) -> Pairs:
    """The pairs in `stsb_dev.tsv.gz`. Raises `DataError` if the file or one of its columns is missing."""
    columns = ("sentence1", "sentence2")
    table = read_table(Evaluation(metric="spearman", tsv=folder / FILE, columns=columns, label="score"))
    left, right = (tuple(table.column(name)) for name in columns)
    return Pairs(left, right, tuple(float(score) for score in table.column("score")))


def embed(encode: Encode, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Embeddings (texts, features): the mean over the tokens under the mask, as in training.

    Texts of similar length share a batch, so that little is padded.
    """
    import torch

    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    pooled = torch.cat([_pooled(encode, tokenizer, [texts[number] for number in batch]) for batch in batches])
    return pooled[torch.tensor(order).argsort()]


def _pooled(encode: Encode, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    import torch

    inputs = dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="np"))
    states = torch.from_numpy(encode(inputs).astype("float64"))
    return mean_pooled(states, torch.from_numpy(inputs["attention_mask"]))


def spearman(left: torch.Tensor, right: torch.Tensor, scores: Sequence[float]) -> float:
    """Spearman's rank correlation x 100 between the cosines of the embeddings and the scores."""
    import torch

    cosines = torch.cosine_similarity(left, right)
    return 100 * rank_correlation(cosines, torch.tensor(scores, dtype=torch.float64))
