"""Weighted modules: roles, what they read, costs; ties; the residual stream."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.graph import Tie, trace
from tests.zoo import BATCH, CLASSES, SEQUENCE, VOCABULARY, build

TOKENS = BATCH * SEQUENCE
HEADS = {
    "bert": [],
    "bert-classifier": ["classifier"],
    "bert-masked": ["cls.predictions.decoder"],
    "distilbert": ["classifier"],
    "gpt2": ["lm_head"],
    "opt": ["lm_head"],
    "llama": ["lm_head"],
    "gemma3": ["lm_head"],
    "phi3": ["lm_head"],
    "bloom": ["lm_head"],
    "gpt-neox": ["lm_head"],
    "t5": ["lm_head"],
    "whisper": ["proj_out"],
    "vit": ["classifier"],
    "deit": ["cls_classifier", "distillation_classifier"],
    "dinov2": [],
    "clip": [],
    "swin": ["classifier"],
    "cvt": ["classifier"],
    "segformer": ["decode_head.classifier"],
    "resnet": ["classifier.1"],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    assert [weight.path for weight in build(name).graph.weights if weight.role == "head"] == HEADS[name]


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama", "vit", "swin", "cvt", "resnet", "mobilevit", "segformer"]
)
def test_every_linear_map_and_convolution_is_found(name):
    model = build(name)
    kinds = {"linear": (nn.Linear,), "conv": (nn.Conv2d,), "embedding": (nn.Embedding,)}
    # GPT-2 has a linear layer of its own.
    kinds["linear"] += tuple({type(m) for m in model.module.modules() if type(m).__name__ == "Conv1D"})
    for kind, types in kinds.items():
        expected = {path for path, module in model.module.named_modules() if isinstance(module, types)}
        assert {weight.path for weight in model.graph.weights if weight.kind == kind} == expected


def test_maps_of_one_tensor_read_the_same():
    graph = build("bert").graph
    reads = {weight.path: weight.reads for weight in graph.weights}
    path = "encoder.layer.1.attention.self"
    assert reads[f"{path}.query"] == reads[f"{path}.key"] == reads[f"{path}.value"]
    assert reads[f"{path}.query"] == "encoder.layer.0.output.LayerNorm/layer_norm"
    assert reads["encoder.layer.1.intermediate.dense"] != reads[f"{path}.query"]


def test_maps_read_the_same_through_windows_and_reshapes():
    reads = {weight.path: weight.reads for weight in build("gpt2").graph.weights}
    assert reads["transformer.h.1.mlp.c_fc"] == "transformer.h.1.ln_2/layer_norm"


def test_a_module_that_does_more_than_its_weight_is_not_listed():
    graph = build("siglip").graph
    assert graph.weight("vision_model.head.attention") is None
    assert graph.weight("vision_model.head.attention.out_proj") is None
    assert graph.weight("vision_model.head.mlp.fc1") is not None


def test_macs_of_linear_maps_and_attention():
    graph = build("bert").graph
    projection, up = TOKENS * 40 * 40, TOKENS * 40 * 72
    products = 2 * BATCH * SEQUENCE * SEQUENCE * 40
    layer = 4 * projection + products + 2 * up
    assert graph.weight("encoder.layer.0.intermediate.dense").macs == up
    assert graph.macs["encoder.layer.0.attention.self"] == 3 * projection + products
    assert graph.macs["encoder.layer.0"] == layer
    assert graph.macs["encoder.layer"] == graph.macs["encoder"] == 3 * layer
    assert graph.macs["embeddings"] == 0
    assert graph.macs[""] == 3 * layer + BATCH * 40 * 40


def test_macs_of_convolutions():
    module = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 5, 2)
    )
    graph = trace(module, {"input": torch.randn(2, 4, 9, 9)})
    assert graph.macs["0"] == 2 * 6 * 4 * 4 * 4 * 9
    assert graph.macs["1"] == 2 * 6 * 2 * 2 * 9
    assert graph.macs["2"] == 2 * 6 * 2 * 2 * 5 * 4
    assert graph.macs[""] == graph.macs["0"] + graph.macs["1"] + graph.macs["2"]


# PyTorch does not count its fused attention on the CPU: these models write theirs out.
@pytest.mark.parametrize("name", ["bloom", "deberta", "cvt", "mobilevit"])
def test_macs_agree_with_pytorch(name):
    from torch.utils.flop_counter import FlopCounterMode

    model = build(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.module(**model.example)
    assert model.graph.macs[""] * 2 == counter.get_total_flops()


def test_a_classifier_costs_its_classes():
    assert build("vit").graph.weight("classifier").macs == BATCH * 40 * CLASSES
    assert build("llama").graph.weight("lm_head").macs == TOKENS * 48 * VOCABULARY


def test_ties():
    assert build("gpt2").graph.ties == (Tie(("transformer.wte.weight", "lm_head.weight")),)
    assert build("llama").graph.ties == ()
    shared = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert build("t5").graph.ties == (Tie(shared),)


def test_a_tied_weight_is_found_at_each_module_that_uses_it():
    graph = build("gpt2").graph
    assert graph.weight("transformer.wte").role == "embedding"
    assert graph.weight("lm_head").role == "head"


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bert", [("encoder.layer.{}", "attention.output.dense", "output.dense")] * 3),
        ("llama", [("model.layers.{}", "self_attn.o_proj", "mlp.down_proj")] * 3),
        # Norms after both parts.
        ("gemma3", [("model.layers.{}", "self_attn.o_proj", "mlp.down_proj")] * 3),
        # Both parts side by side.
        ("gpt-neox", [("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h")] * 3),
        # A learned scale after both parts.
        ("dinov2", [("encoder.layer.{}", "attention.o_proj", "mlp.fc2")] * 3),
        ("bloom", [("transformer.h.{}", "self_attention.dense", "mlp.dense_4h_to_h")] * 3),
    ],
)
def test_residual_writers(name, layers):
    expected = [f"{path.format(i)}.{part}" for i, (path, *parts) in enumerate(layers) for part in parts]
    assert list(build(name).graph.residual_writers) == expected


def test_a_shortcut_with_a_convolution_writes_too():
    found = build("resnet").graph.residual_writers
    first = "resnet.encoder.stages.1.layers.0"
    assert {f"{first}.shortcut.convolution", f"{first}.layer.2.convolution"} <= set(found)
    assert len(found) == 7 + 3


def test_a_sum_of_two_maps_of_one_tensor_is_no_residual():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.one(x) + self.two(x))

    assert trace(Both(), {"x": torch.randn(2, 6)}).residual_writers == ()
