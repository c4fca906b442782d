"""Attention without softmax, linear in the number of tokens.

Source: simplified linear attention of SLAB (Guo et al. 2024, arXiv 2405.11582): the kernel is ReLU, and each query's
weights are divided by their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the sum of a query's weights, which may all be zero."""

Order = Literal["state", "pairs"]
"""Which product is computed first: keys by values, (size, value size); or queries by keys, (queries, keys)."""


def linear_attention(query: Tensor, key: Tensor, value: Tensor, order: Order | None = None) -> Tensor:
    """relu(q) relu(k)^T v, each row divided by its sum of weights; the cheaper `order` if none is given.

    `query` (..., queries, size), `key` (..., keys, size), `value` (..., keys, value size). Gives (..., queries, value
    size) in the type of `value`. It is computed in float32 or better: keys by values is a sum over all tokens, which
    float16 may not hold.
    """
    kind = torch.promote_types(value.dtype, torch.float32)
    query, key = query.to(kind).relu(), key.to(kind).relu()
    order = (
        cheaper(query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]) if order is None else order
    )
    total = query @ key.sum(-2, keepdim=True).transpose(-1, -2) + EPS
    turned, wide = key.transpose(-1, -2), value.to(kind)
    mixed = query @ (turned @ wide) if order == "state" else (query @ turned) @ wide
    return (mixed / total).to(value.dtype)


def cheaper(queries: int, keys: int, size: int, value_size: int) -> Order:
    """The order with fewer multiplications: keys * size * value size and queries * size * value size, or
    queries * keys * size and queries * keys * value size."""
    state = (queries + keys) * size * value_size
    return "state" if state < queries * keys * (size + value_size) else "pairs"
