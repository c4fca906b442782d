"""Norms: kinds, readers, whether a residual reads them; batch norms beside convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.graph import Norm, trace
from tests.zoo import build


def under(path: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


QKV = ("q_proj", "k_proj", "v_proj")
BERT = under("encoder.layer.1.attention.self", "query", "key", "value")
CVT = "cvt.encoder.stages.1.layers.1.attention.attention.convolution_projection"
CASES = {
    # Post-norm: the residual reads the norm too.
    "bert": [
        Norm("encoder.layer.0.output.LayerNorm", "layer", BERT, True),
        Norm("encoder.layer.2.attention.output.LayerNorm", "layer", ("encoder.layer.2.intermediate.dense",), True),
        Norm("encoder.layer.2.output.LayerNorm", "layer", ("pooler.dense",), True),
    ],
    "roberta": [Norm("encoder.layer.0.output.LayerNorm", "layer", BERT, True)],
    "distilbert": [
        Norm("distilbert.transformer.layer.1.output_layer_norm", "layer",
             under("distilbert.transformer.layer.2.attention", "q_lin", "k_lin", "v_lin"), True),
    ],
    # The maps of queries and keys read the embeddings of relative positions as well.
    "deberta": [
        Norm("encoder.LayerNorm", "layer", (), True),
        Norm("encoder.layer.0.output.LayerNorm", "layer", ("encoder.layer.1.attention.self.value_proj",), True),
    ],
    "modernbert": [
        Norm("embeddings.norm", "layer", ("layers.0.attn.Wqkv",), True),
        Norm("layers.1.attn_norm", "layer", ("layers.1.attn.Wqkv",), False),
        Norm("final_norm", "layer", (), True),
    ],
    "gpt2": [
        Norm("transformer.h.1.ln_1", "layer", ("transformer.h.1.attn.c_attn",), False),
        Norm("transformer.ln_f", "layer", ("lm_head",), False),
    ],
    "opt": [
        Norm("model.decoder.layers.1.self_attn_layer_norm", "layer",
             under("model.decoder.layers.1.self_attn", *QKV), False),
    ],
    "llama": [
        Norm("model.layers.1.input_layernorm", "rms", under("model.layers.1.self_attn", *QKV), False),
        Norm("model.layers.1.post_attention_layernorm", "rms",
             under("model.layers.1.mlp", "gate_proj", "up_proj"), False),
    ],
    "mistral": [Norm("model.norm", "rms", ("lm_head",), False)],
    "qwen3": [
        Norm("model.layers.2.input_layernorm", "rms", under("model.layers.2.self_attn", *QKV), False),
        Norm("model.layers.2.self_attn.k_norm", "rms", (), True),
    ],
    "gemma3": [
        Norm("model.layers.2.input_layernorm", "rms", under("model.layers.2.self_attn", *QKV), False),
        Norm("model.layers.2.post_attention_layernorm", "rms", (), True),
        Norm("model.layers.2.self_attn.q_norm", "rms", (), True),
    ],
    "phi3": [Norm("model.layers.0.input_layernorm", "rms", ("model.layers.0.self_attn.qkv_proj",), False)],
    "bloom": [
        Norm("transformer.word_embeddings_layernorm", "layer", (), True),
        Norm("transformer.h.0.input_layernorm", "layer", ("transformer.h.0.self_attention.query_key_value",), False),
    ],
    "gpt-neox": [
        Norm("gpt_neox.layers.1.post_attention_layernorm", "layer", ("gpt_neox.layers.1.mlp.dense_h_to_4h",), False),
    ],
    "t5": [
        Norm("encoder.block.1.layer.1.layer_norm", "rms",
             under("encoder.block.1.layer.1.DenseReluDense", "wi_0", "wi_1"), False),
        Norm("encoder.final_layer_norm", "rms",
             tuple(f"decoder.block.{i}.layer.1.EncDecAttention.{part}" for i in range(3) for part in "kv"), True),
    ],
    "whisper": [Norm("model.decoder.layer_norm", "layer", ("proj_out",), False)],
    "vit": [Norm("vit.layers.1.layernorm_before", "layer", under("vit.layers.1.attention", *QKV), False)],
    "deit": [Norm("deit.layernorm", "layer", ("cls_classifier", "distillation_classifier"), False)],
    "dinov2": [Norm("encoder.layer.1.norm2", "layer", ("encoder.layer.1.mlp.fc1",), False)],
    "clip": [
        Norm("vision_model.pre_layrnorm", "layer", (), True),
        Norm("vision_model.post_layernorm", "layer", ("visual_projection",), False),
        Norm("text_model.final_layer_norm", "layer", (), True),
    ],
    "siglip": [Norm("text_model.final_layer_norm", "layer", ("text_model.head",), True)],
    # Through padding, rolling and partition into windows.
    "swin": [
        Norm("swin.encoder.layers.0.blocks.1.layernorm_before", "layer",
             under("swin.encoder.layers.0.blocks.1.attention", *QKV), False),
        Norm("swin.encoder.layers.0.downsample.norm", "layer", ("swin.encoder.layers.0.downsample.reduction",), False),
    ],
    "cvt": [
        Norm("cvt.encoder.stages.1.layers.1.layernorm_before", "layer",
             tuple(f"{CVT}_{part}.convolution_projection.convolution" for part in ("key", "query", "value")), False),
        Norm(f"{CVT}_key.convolution_projection.normalization", "batch",
             ("cvt.encoder.stages.1.layers.1.attention.attention.projection_key",), False),
    ],
    "segformer": [
        Norm("segformer.stages.0.blocks.0.layernorm_before", "layer",
             under("segformer.stages.0.blocks.0.attention", "q_proj", "sequence_reduction.sequence_reduction"), False),
        Norm("segformer.stages.0.layer_norm", "layer",
             ("segformer.stages.1.patch_embeddings.proj", "decode_head.linear_projections.0.proj"), False),
    ],
    "dpt": [Norm("dpt.encoder.layer.1.layernorm_after", "layer", ("dpt.encoder.layer.1.intermediate.dense",), False)],
    "convnext": [
        Norm("convnext.encoder.stages.1.downsampling_layer.0", "layer",
             ("convnext.encoder.stages.1.downsampling_layer.1",), False),
        Norm("convnext.embeddings.layernorm", "layer", ("convnext.encoder.stages.0.layers.0.dwconv",), True),
    ],
    "poolformer": [
        Norm("poolformer.encoder.block.2.1.before_norm", "group", (), True),
        Norm("poolformer.encoder.block.2.1.after_norm", "group", ("poolformer.encoder.block.2.1.output.conv1",), False),
    ],
    "resnet": [Norm("resnet.encoder.stages.1.layers.1.layer.2.normalization", "batch", (), True)],
    "mobilevit": [
        Norm("mobilevit.encoder.layer.2.layernorm", "layer",
             ("mobilevit.encoder.layer.2.conv_projection.convolution",), False),
    ],
}  # fmt: skip
COUNTS = {"bert": 7, "llama": 7, "qwen3": 13, "gemma3": 19, "t5": 17, "clip": 15, "swin": 18, "resnet": 25}


@pytest.mark.parametrize("name", CASES)
def test_norms_and_their_readers(name):
    found = {norm.path: norm for norm in build(name).graph.norms}
    assert [found[norm.path] for norm in CASES[name]] == CASES[name]


@pytest.mark.parametrize("name", COUNTS)
def test_every_norm_is_found(name):
    assert len(build(name).graph.norms) == COUNTS[name]


class Written(nn.Module):
    """A layer norm written out, and a map that reads it after `between`."""

    def __init__(self, between=lambda x: x) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.reader = nn.Linear(6, 5)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.relu(self.reader(self.between(normed * self.scale + self.shift)))


def test_a_layer_norm_written_out():
    assert trace(Written(), {"x": torch.randn(2, 6, 6)}).norms == (Norm("", "layer", ("reader",), False),)


@pytest.mark.parametrize(
    "between",
    [lambda x: x.flip(-1), lambda x: x.transpose(1, 2), lambda x: x.sigmoid(), lambda x: x + x.roll(1, 1)],
    ids=["features reversed", "places as features", "an activation", "a sum"],
)
def test_what_does_not_keep_the_features_is_no_direct_reader(between):
    assert trace(Written(between), {"x": torch.randn(2, 6, 6)}).norms == (Norm("", "layer", (), True),)
