"""How much hidden states change: the distances by which blocks are chosen."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity over the last dimension, in float32; 1 where both vectors are zero."""
    first, second = first.float(), second.float()
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    same = (first == second).all(-1).float()
    return torch.where(norms > 0, (first * second).sum(-1) / norms.clamp(min=1e-30), same)


def angular_distance(first: Tensor, second: Tensor) -> Tensor:
    """The angle between vectors over the last dimension as a share of pi, in [0, 1]."""
    return torch.arccos(cosines(first, second).clamp(-1, 1)) / math.pi
