"""The factors of attention scores: where they are held, and which map could take them on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.graph import Projection, ScoreScale, trace
from tests.zoo import build


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        (
            "opt",
            3,
            ScoreScale(
                "model.decoder.layers.0.self_attn",
                "scaling",
                8**-0.5,
                Projection("model.decoder.layers.0.self_attn.q_proj", ((0, 48),)),
            ),
        ),
        (
            "cvt",
            6,
            ScoreScale(
                "cvt.encoder.stages.0.layers.0.attention.attention",
                "scale",
                16**-0.5,
                Projection("cvt.encoder.stages.0.layers.0.attention.attention.projection_query", ((0, 16),)),
            ),
        ),
        (
            "mobilevit",
            9,
            ScoreScale(
                "mobilevit.encoder.layer.2.transformer.layer.0.attention.attention",
                "",
                1 / 6**0.5,
                None,
                "none of its attributes is 2.449, the factor of its scores",
            ),
        ),
    ],
    ids=["times queries", "times scores", "computed"],
)
def test_factors_of_models(name, count, first):
    found = build(name).graph.score_scales
    assert (len(found), found[0]) == (count, first)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5", "resnet"])
def test_what_the_fused_attention_takes_is_no_op_of_its_own(name):
    assert build(name).graph.score_scales == ()


class Attend(nn.Module):
    """Two heads of three features, with one map for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.scale = 0.7

    def turned(self, query: Tensor) -> Tensor:
        return query

    def scored(self, scores: Tensor) -> Tensor:
        return scores * self.scale

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = self.qkv(input).view(*input.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind()
        scores = self.scored(self.turned(query) @ key.transpose(-2, -1))
        mixed = scores.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(input.shape))


def scale_of(module: nn.Module) -> ScoreScale:
    (found,) = trace(module.eval(), {"input": torch.randn(2, 5, 6)}).score_scales
    return found


def test_a_part_of_a_fused_map():
    assert scale_of(Attend()) == ScoreScale("", "scale", 0.7, Projection("qkv", ((0, 6),)))


def test_rotated_queries_commute_with_a_factor():
    class Rotated(Attend):
        def turned(self, query: Tensor) -> Tensor:
            angle = torch.arange(5.0)[:, None]
            return query * angle.cos() + query.roll(1, -1) * angle.sin()

    assert scale_of(Rotated()).why == ""


class Divided(Attend):
    def scored(self, scores: Tensor) -> Tensor:
        return scores / self.scale


class Normed(Attend):
    def turned(self, query: Tensor) -> Tensor:
        return nn.functional.layer_norm(query, (3,))


class Shifted(Attend):
    def turned(self, query: Tensor) -> Tensor:
        return query + 0.5


class Peeked(Attend):
    def scored(self, scores: Tensor) -> Tensor:
        return super().scored(scores) + 0.1 * self.seen.sum()

    def turned(self, query: Tensor) -> Tensor:
        self.seen = query
        return query


class Twice(Attend):
    def scored(self, scores: Tensor) -> Tensor:
        return scores * self.scale + self.scale


class Doubled(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.other = 0.7


def test_a_division():
    assert scale_of(Divided()).factor == 1 / 0.7


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Normed, "layer_norm stands between the map of its queries and its scores"),
        (Shifted, "add stands between the map of its queries and its scores"),
        (Peeked, "sum reads its queries too"),
        (Twice, "it uses `scale` 2 times"),
        (Doubled, "scale and other are both 0.7, the factor of its scores"),
    ],
)
def test_factors_that_stay(kind, why):
    found = scale_of(kind())
    assert (found.query, found.why) == (None, why)
