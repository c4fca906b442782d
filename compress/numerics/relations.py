"""What a student is compared with its teacher by: distributions, hidden states, and relations between tokens.

Relations after MiniLM (Wang et al. 2020, arXiv 2002.10957) and MiniLMv2 (Wang et al. 2021, arXiv 2012.15828): how
much each token of a head attends to each other one, and how alike their values are. They are distributions over
tokens, so that teacher and student need not be equally wide. All losses are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

FAR = -1e9
"""The score of a token that is not to be seen: finite, so that differences of two of them are no NaN."""

FLOOR = 1e-6
"""The least energy of a row, as a share of the mean: single tokens may have ten thousand times that of others."""


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one attention, each (batch, heads, tokens, features of a head)."""

    query: Tensor
    key: Tensor
    value: Tensor

    def split(self, count: int) -> Heads:
        """The same features cut into `count` heads. Raises `ValueError` if they cannot be cut evenly."""
        return Heads(*(_split(one, count) for one in (self.query, self.key, self.value)))


def heads_of(features: Tensor, heads: int, repeated: int = 1) -> Tensor:
    """Features (batch, tokens, heads * size), head after head, as (batch, heads * repeated, tokens, size).

    `repeated` is how many heads of queries share one of keys and values: neighbours do.
    """
    batch, tokens, _ = features.shape
    return features.reshape(batch, tokens, heads, -1).transpose(1, 2).repeat_interleave(repeated, 1)


def attention_relation_loss(teacher: Heads, student: Heads, tokens: Tensor | None, causal: bool) -> Tensor:
    """MiniLM: the divergence of attentions (query-key) plus that of value relations (value-value), a scalar.

    `tokens` (batch, tokens) says where there are tokens (None: everywhere); the rest is neither seen nor counted.
    Raises `ValueError` unless both have the same number of heads.
    """
    _require_equal_heads(teacher.query, student.query)
    return _relation_loss(
        ((teacher.query, teacher.key), (student.query, student.key)), tokens, causal
    ) + _relation_loss(((teacher.value, teacher.value), (student.value, student.value)), tokens, causal)


def self_relation_loss(
    teacher: Heads, student: Heads, count: int, tokens: Tensor | None, causal: bool
) -> Tensor:
    """MiniLMv2: the divergences of query-query, key-key and value-value relations of `count` heads, a scalar.

    Both may have any number of heads of their own: their features are cut into `count` relation heads. Raises
    `ValueError` if they cannot be cut evenly.
    """
    teacher, student = teacher.split(count), student.split(count)
    pairs = (
        (teacher.query, student.query),
        (teacher.key, student.key),
        (teacher.value, student.value),
    )
    losses = [_relation_loss(((one, one), (other, other)), tokens, causal) for one, other in pairs]
    return torch.stack(losses).sum()


def divergence(
    teacher: Tensor, student: Tensor, rows: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student), a scalar: of softmax(scores / temperature) over the last dimension, mean over rows.

    Scores are (..., n); `rows` are booleans over the leading dimensions, or the first of them (None: all). Times
    the temperature squared, so that its gradients do not shrink with it (Hinton et al. 2015, arXiv 1503.02531).
    """
    wanted = log_softmax(teacher.detach().float() / temperature, -1)
    given = log_softmax(student.float() / temperature, -1)
    found = kl_div(given, wanted, reduction="none", log_target=True).sum(-1)
    return (found if rows is None else found[rows]).mean() * temperature**2


def relative_error(teacher: Tensor, student: Tensor, rows: Tensor | None = None) -> Tensor:
    """The squared error of `student` (..., features) relative to the teacher's energy, a scalar, mean over rows.

    A row with next to no energy, less than `FLOOR` of the mean, counts as one of that much.
    """
    teacher, student = teacher.detach().float(), student.float()
    energy = teacher.square().sum(-1)
    energy = energy.clamp(min=FLOOR * float(energy.mean()) + 1e-30)
    found = (student - teacher).square().sum(-1) / energy
    return (found if rows is None else found[rows]).mean()


def matched(teacher: int, student: int) -> list[int]:
    """For each of the student's blocks, from 1, the number of the teacher's block that it answers to, spread evenly.

    The last answers to the last.
    """
    return [max(1, round(number * teacher / student)) for number in range(1, student + 1)]


Sides = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _relation_loss(sides: Sides, tokens: Tensor | None, causal: bool) -> Tensor:
    teacher, student = (_scores(*side, tokens, causal) for side in sides)
    if tokens is None:
        return divergence(teacher, student)
    return divergence(teacher, student, tokens[:, None].expand(teacher.shape[:-1]))


def _scores(first: Tensor, second: Tensor, tokens: Tensor | None, causal: bool) -> Tensor:
    """Scaled products (batch, heads, tokens, tokens), `FAR` where the second is padding or comes later."""
    scores = first.float() @ second.float().transpose(-1, -2) / first.shape[-1] ** 0.5
    count = scores.shape[-1]
    seen = torch.ones(count, count, dtype=torch.bool, device=scores.device)
    seen = seen.tril() if causal else seen
    seen = seen if tokens is None else seen & tokens[:, None, None]
    return scores.where(seen, FAR)


def _split(values: Tensor, count: int) -> Tensor:
    batch, heads, tokens, size = values.shape
    if heads * size % count:
        raise ValueError(f"{heads * size} features cannot be cut into {count} heads")
    return heads_of(values.transpose(1, 2).reshape(batch, tokens, heads * size), count)


def _require_equal_heads(teacher: Tensor, student: Tensor) -> None:
    if teacher.shape[1] != student.shape[1]:
        raise ValueError(f"the teacher has {teacher.shape[1]} heads and the student {student.shape[1]}")
