"""Spearman on sentence pairs, pooling under the mask, and the data that they need."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import Pairs, embed, load_pairs, spearman
from compress.errors import DataError


def write(folder: Path, text: str) -> None:
    with gzip.open(folder / "stsb_dev.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(text)


def test_reads_pairs_with_quotes_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, 'genre\tscore\tsentence1\tsentence2\nx\t4.5\tHe said "no.\tNo!\ny\t0\ta\tb\n')
    assert load_pairs(tmp_path) == Pairs(('He said "no.', "a"), ("No!", "b"), (4.5, 0.0))


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stsb_dev\.tsv\.gz"):
        load_pairs(tmp_path)
    write(tmp_path, "genre\tscore\tsentence1\nx\t1\ta\n")
    with pytest.raises(DataError, match="sentence2"):
        load_pairs(tmp_path)


def test_pools_under_the_mask_and_keeps_the_order() -> None:
    def tokenizer(texts: list[str], **_: object) -> dict[str, np.ndarray]:
        longest = max(map(len, texts))
        ids = np.array([[ord(letter) for letter in text.ljust(longest, "\0")] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}

    def encode(inputs: dict[str, np.ndarray]) -> np.ndarray:
        ids = inputs["input_ids"]
        return np.stack([ids, np.full_like(ids, 3)], axis=-1).astype(np.float32)

    texts = ["\2\6\7", "\1\3", *["\4"] * 40, "\11\7"]
    embeddings = embed(encode, tokenizer, texts)
    assert embeddings.tolist() == [[5, 3], [2, 3], *[[4, 3]] * 40, [8, 3]]


def test_spearman_reads_ranks_only() -> None:
    angles = torch.tensor([0.0, 0.3, 0.9, 1.2])
    left = torch.tensor([1.0, 0.0]).repeat(4, 1)
    right = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert spearman(left, right, [5, 4, 3, 0]) == pytest.approx(100)
    assert spearman(left, right, [4, 5, 3, 0]) == pytest.approx(80)
