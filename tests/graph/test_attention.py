"""Attentions: their four maps with the rows of each, heads, causality, crossing and positions."""

from __future__ import annotations

import copy

import pytest

from compress.graph import Attention, trace
from tests.zoo import build


def plain(path: str, features: int) -> tuple[str, tuple[tuple[int, int], ...]]:
    return path, ((0, features),)


def interleaved(path: str, heads: int, size: int, part: int) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Part 0, 1 or 2 of a fused map in which each head has its three parts together."""
    starts = [(3 * head + part) * size for head in range(heads)]
    return path, tuple((start, start + size) for start in starts)


def maps(attention: Attention) -> list[tuple[str, tuple[tuple[int, int], ...]] | None]:
    found = (attention.query, attention.key, attention.value, attention.output)
    return [None if made is None else (made.path, made.rows) for made in found]


def facts(attention: Attention) -> tuple[int, int, int, bool, bool, str]:
    return (
        attention.heads,
        attention.kv_heads,
        attention.head_size,
        attention.causal,
        attention.cross,
        attention.positions,
    )


BERT, DPT = "encoder.layer.1.attention", "dpt.encoder.layer.1.attention"
CVT, MOBILE = (
    "cvt.encoder.stages.2.layers.0.attention",
    "mobilevit.encoder.layer.3.transformer.layer.2.attention",
)
SEPARATE = {
    "bert": (BERT, ["self.query", "self.key", "self.value", "output.dense"]),
    "roberta": (BERT, ["self.query", "self.key", "self.value", "output.dense"]),
    "deberta": (BERT, ["self.query_proj", "self.key_proj", "self.value_proj", "output.dense"]),
    "distilbert": ("distilbert.transformer.layer.1.attention", ["q_lin", "k_lin", "v_lin", "out_lin"]),
    "opt": ("model.decoder.layers.1.self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "llama": ("model.layers.1.self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "mistral": ("model.layers.1.self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "qwen3": ("model.layers.1.self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "gemma3": ("model.layers.1.self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "vit": ("vit.layers.1.attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "deit": ("deit.layers.1.attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "dinov2": ("encoder.layer.1.attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "swin": ("swin.encoder.layers.1.blocks.1.attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "segformer": ("segformer.stages.1.blocks.0.attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "dpt": (DPT, ["attention.query", "attention.key", "attention.value", "output.dense"]),
    "cvt": (
        CVT,
        [*(f"attention.projection_{role}" for role in ("query", "key", "value")), "output.dense"],
    ),
    "mobilevit": (MOBILE, ["attention.query", "attention.key", "attention.value", "output.dense"]),
}
WIDTHS = {
    "llama": (60, 20, 20, 48),
    "mistral": (60, 20, 20, 48),
    "qwen3": (60, 20, 20, 48),
    "gemma3": (60, 20, 20, 48),
    "opt": (48,) * 4,
    "swin": (32,) * 4,
    "segformer": (24,) * 4,
    "cvt": (32,) * 4,
    "mobilevit": (32,) * 4,
}
FACTS = {
    "bert": (4, 4, 10, False, False, "none"),
    "roberta": (4, 4, 10, False, False, "none"),
    "deberta": (4, 4, 10, False, False, "relative"),
    "distilbert": (4, 4, 10, False, False, "none"),
    "modernbert": (4, 4, 10, False, False, "rotary"),
    "gpt2": (6, 6, 8, True, False, "none"),
    "opt": (6, 6, 8, True, False, "none"),
    "llama": (6, 2, 10, True, False, "rotary"),
    "mistral": (6, 2, 10, True, False, "rotary"),
    "qwen3": (6, 2, 10, True, False, "rotary"),
    "gemma3": (6, 2, 10, True, False, "rotary"),
    "phi3": (6, 2, 8, True, False, "rotary"),
    "bloom": (6, 6, 8, True, False, "relative"),
    "gpt-neox": (6, 6, 8, True, False, "rotary"),
    "vit": (5, 5, 8, False, False, "none"),
    "deit": (5, 5, 8, False, False, "none"),
    "dinov2": (5, 5, 8, False, False, "none"),
    "swin": (4, 4, 8, False, False, "relative"),
    "segformer": (2, 2, 12, False, False, "none"),
    "dpt": (5, 5, 8, False, False, "none"),
    "cvt": (4, 4, 8, False, False, "none"),
    "mobilevit": (4, 4, 8, False, False, "none"),
}
COUNTS = {"swin": 7, "segformer": 9, "cvt": 6, "mobilevit": 9, "dpt": 4}


@pytest.mark.parametrize("name", SEPARATE)
def test_four_maps_with_weights_of_their_own(name):
    path, parts = SEPARATE[name]
    widths = WIDTHS.get(name, (40,) * 4)
    found = {attention.path: attention for attention in build(name).graph.attentions}
    assert maps(found[path]) == [
        plain(f"{path}.{part}", width) for part, width in zip(parts, widths, strict=True)
    ]


@pytest.mark.parametrize("name", FACTS)
def test_heads_causality_and_positions(name):
    attentions = build(name).graph.attentions
    assert len(attentions) == COUNTS.get(name, 3)
    path = SEPARATE[name][0] if name in SEPARATE else attentions[1].path
    assert facts(next(attention for attention in attentions if attention.path == path)) == FACTS[name]


@pytest.mark.parametrize("name", sorted(set(FACTS) - {"swin", "segformer", "cvt", "mobilevit"}))
def test_all_layers_of_a_model_are_alike(name):
    found = build(name).graph.attentions
    assert {facts(attention) for attention in found} == {FACTS[name]}


def test_a_fused_map_in_thirds():
    attention = build("gpt2").graph.attentions[2]
    fused = "transformer.h.2.attn.c_attn"
    assert maps(attention) == [
        (fused, ((0, 48),)),
        (fused, ((48, 96),)),
        (fused, ((96, 144),)),
        plain("transformer.h.2.attn.c_proj", 48),
    ]


def test_a_fused_map_split_by_an_axis_of_three():
    attention = build("modernbert").graph.attentions[0]
    fused = "layers.0.attn.Wqkv"
    assert maps(attention) == [
        (fused, ((0, 40),)),
        (fused, ((40, 80),)),
        (fused, ((80, 120),)),
        plain("layers.0.attn.Wo", 40),
    ]


def test_a_fused_map_in_unequal_parts():
    attention = build("phi3").graph.attentions[1]
    fused = "model.layers.1.self_attn.qkv_proj"
    assert maps(attention) == [
        (fused, ((0, 48),)),
        (fused, ((48, 64),)),
        (fused, ((64, 80),)),
        plain("model.layers.1.self_attn.o_proj", 48),
    ]


@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt-neox", "gpt_neox.layers.1.attention"), ("bloom", "transformer.h.1.self_attention")],
)
def test_a_fused_map_interleaved_by_head(name, path):
    attention = build(name).graph.attentions[1]
    fused = f"{path}.query_key_value"
    assert maps(attention) == [
        *(interleaved(fused, 6, 8, part) for part in range(3)),
        plain(f"{path}.dense", 48),
    ]


def test_encoder_decoder_with_relative_positions():
    found = {attention.path: facts(attention) for attention in build("t5").graph.attentions}
    expected = {
        f"encoder.block.{i}.layer.0.SelfAttention": (4, 4, 9, False, False, "relative") for i in range(3)
    }
    for i in range(3):
        expected[f"decoder.block.{i}.layer.0.SelfAttention"] = (4, 4, 9, True, False, "relative")
        expected[f"decoder.block.{i}.layer.1.EncDecAttention"] = (4, 4, 9, False, True, "none")
    assert found == expected


def test_cross_attention_reads_the_encoder():
    found = {attention.path: attention for attention in build("whisper").graph.attentions}
    path = "model.decoder.layers.1.encoder_attn"
    assert facts(found[path]) == (5, 5, 8, False, True, "none")
    assert maps(found[path]) == [
        plain(f"{path}.{part}", 40) for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    assert facts(found["model.decoder.layers.1.self_attn"]) == (5, 5, 8, True, False, "none")
    assert facts(found["model.encoder.layers.1.self_attn"]) == (4, 4, 10, False, False, "none")
    assert len(found) == 9


def test_both_towers_of_clip():
    found = {attention.path: facts(attention) for attention in build("clip").graph.attentions}
    assert found == {
        **{f"vision_model.encoder.layers.{i}.self_attn": (5, 5, 8, False, False, "none") for i in range(3)},
        **{f"text_model.encoder.layers.{i}.self_attn": (6, 6, 8, True, False, "none") for i in range(3)},
    }


def test_a_pooling_attention_that_slices_one_parameter():
    found = {attention.path: attention for attention in build("siglip").graph.attentions}
    assert len(found) == 7
    path = "vision_model.head.attention"
    assert facts(found[path]) == (5, 5, 8, False, True, "none")
    assert maps(found[path]) == [
        (path, ((0, 40),)),
        (path, ((40, 80),)),
        (path, ((80, 120),)),
        plain(f"{path}.out_proj", 40),
    ]
    assert facts(found["text_model.encoder.layers.0.self_attn"]) == (6, 6, 8, False, False, "none")


@pytest.mark.parametrize("name", ["convnext", "poolformer", "resnet"])
def test_a_model_without_attention_has_none(name):
    assert build(name).graph.attentions == ()


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "swin", "whisper"])
def test_written_out_attention_gives_the_same_answers(name):
    model = build(name)
    module = copy.deepcopy(model.module)
    module.set_attn_implementation("eager")
    assert trace(module, model.example).attentions == model.graph.attentions


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("llama", tuple((place, place + 5) for place in range(5))),
        ("gpt-neox", ((0, 1),)),
        ("bert", ()),
    ],
)
def test_features_that_positions_rotate_together(name, pairs):
    assert {one.pairs for one in build(name).graph.attentions} == {pairs}


def test_what_bends_the_scores():
    assert {one.bend for one in build("llama").graph.attentions} == {""}
    norm = "model.layers.1.self_attn.q_norm"
    why = f"pow of `{norm}` stands between the map of its queries and its scores"
    assert build("qwen3").graph.attentions[1].bend == why
