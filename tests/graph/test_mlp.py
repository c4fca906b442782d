"""Feed-forward parts: maps, gates, activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.graph import Mlp, Projection, trace
from tests.zoo import build

PLAIN = {
    "bert": ("encoder.layer.2", "intermediate.dense", "output.dense", 72, 40, "gelu"),
    "roberta": ("encoder.layer.2", "intermediate.dense", "output.dense", 72, 40, "gelu"),
    "deberta": ("encoder.layer.2", "intermediate.dense", "output.dense", 72, 40, "gelu"),
    "distilbert": ("distilbert.transformer.layer.2.ffn", "lin1", "lin2", 72, 40, "gelu"),
    "gpt2": ("transformer.h.2.mlp", "c_fc", "c_proj", 88, 48, "gelu_tanh"),
    "bloom": ("transformer.h.2.mlp", "dense_h_to_4h", "dense_4h_to_h", 192, 48, "gelu_tanh"),
    "gpt-neox": ("gpt_neox.layers.2.mlp", "dense_h_to_4h", "dense_4h_to_h", 88, 48, "gelu"),
    "opt": ("model.decoder.layers.2", "fc1", "fc2", 88, 48, "relu"),
    "vit": ("vit.layers.2.mlp", "fc1", "fc2", 72, 40, "gelu"),
    "deit": ("deit.layers.2.mlp", "fc1", "fc2", 72, 40, "gelu"),
    "dinov2": ("encoder.layer.2.mlp", "fc1", "fc2", 120, 40, "gelu"),
    "clip": ("text_model.encoder.layers.2.mlp", "fc1", "fc2", 88, 48, "quick_gelu"),
    "siglip": ("vision_model.head.mlp", "fc1", "fc2", 72, 40, "gelu_tanh"),
    "whisper": ("model.decoder.layers.2", "fc1", "fc2", 76, 40, "gelu"),
    "swin": ("swin.encoder.layers.2.blocks.2.mlp", "fc1", "fc2", 192, 64, "gelu"),
    "cvt": ("cvt.encoder.stages.2.layers.2", "intermediate.dense", "output.dense", 96, 32, "gelu"),
    "dpt": ("dpt.encoder.layer.3", "intermediate.dense", "output.dense", 72, 40, "gelu"),
    "convnext": ("convnext.encoder.stages.3.layers.1", "pwconv1", "pwconv2", 160, 40, "gelu"),
    "poolformer": ("poolformer.encoder.block.3.1.output", "conv1", "conv2", 120, 40, "gelu"),
    "mobilevit": (
        "mobilevit.encoder.layer.4.transformer.layer.2",
        "intermediate.dense",
        "output.dense",
        80,
        40,
        "silu",
    ),
}
GATED = {
    "llama": ("model.layers.2.mlp", "up_proj", "gate_proj", "down_proj", 88, 48, "silu"),
    "mistral": ("model.layers.2.mlp", "up_proj", "gate_proj", "down_proj", 88, 48, "silu"),
    "qwen3": ("model.layers.2.mlp", "up_proj", "gate_proj", "down_proj", 88, 48, "silu"),
    "gemma3": ("model.layers.2.mlp", "up_proj", "gate_proj", "down_proj", 88, 48, "gelu_tanh"),
    "t5": ("decoder.block.2.layer.2.DenseReluDense", "wi_1", "wi_0", "wo", 72, 40, "gelu_tanh"),
    "dinov2-gated": ("encoder.layer.2.mlp", "up_proj", "gate_proj", "down_proj", 80, 40, "silu"),
}
COUNTS = {"clip": 6, "siglip": 7, "whisper": 6, "swin": 7, "cvt": 6, "dpt": 4, "convnext": 9, "poolformer": 9}
COUNTS |= {"mobilevit": 9, "t5": 6}


def whole(path: str, features: int) -> Projection:
    return Projection(path, ((0, features),))


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name):
    path, up, down, hidden, width, activation = PLAIN[name]
    found = build(name).graph.mlps
    assert len(found) == COUNTS.get(name, 3)
    expected = Mlp(path, whole(f"{path}.{up}", hidden), None, whole(f"{path}.{down}", width), activation)
    assert next(mlp for mlp in found if mlp.path == path) == expected


@pytest.mark.parametrize("name", GATED)
def test_gated(name):
    path, up, gate, down, hidden, width, activation = GATED[name]
    found = build(name).graph.mlps
    assert len(found) == COUNTS.get(name, 3)
    assert next(mlp for mlp in found if mlp.path == path) == Mlp(
        path,
        whole(f"{path}.{up}", hidden),
        whole(f"{path}.{gate}", hidden),
        whole(f"{path}.{down}", width),
        activation,
    )


@pytest.mark.parametrize(
    ("name", "path", "fused", "down", "hidden", "width", "activation"),
    [
        ("phi3", "model.layers.1.mlp", "gate_up_proj", "down_proj", 88, 48, "silu"),
        ("modernbert", "layers.1.mlp", "Wi", "Wo", 72, 40, "gelu"),
    ],
)
def test_gate_and_up_in_one_map(name, path, fused, down, hidden, width, activation):
    assert build(name).graph.mlps[1] == Mlp(
        path,
        up=Projection(f"{path}.{fused}", ((hidden, 2 * hidden),)),
        gate=Projection(f"{path}.{fused}", ((0, hidden),)),
        down=whole(f"{path}.{down}", width),
        activation=activation,
    )


def test_depthwise_convolutions_in_between_are_named():
    found = build("segformer").graph.mlps
    path = "segformer.stages.3.blocks.2.mlp"
    assert len(found) == 9
    assert found[-1] == Mlp(
        path,
        whole(f"{path}.fc1", 120),
        None,
        whole(f"{path}.fc2", 40),
        "gelu",
        depthwise=(f"{path}.dwconv.dwconv",),
    )


def test_a_pooler_and_a_classifier_are_no_mlp():
    assert [mlp.path for mlp in build("bert-classifier").graph.mlps] == [
        f"bert.encoder.layer.{i}" for i in range(3)
    ]


def test_convolutions_over_several_places_are_no_mlp():
    assert build("resnet").graph.mlps == ()


def test_an_activation_that_is_not_known_is_left_out():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 14), nn.Linear(14, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.down(torch.sin(3 * self.up(x))))

    assert trace(Odd(), {"x": torch.randn(2, 5, 6)}).mlps == ()


def test_hidden_features_in_another_order_are_left_out():
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 14), nn.Linear(14, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.down(torch.relu(self.up(x)).flip(-1)))

    assert trace(Flipped(), {"x": torch.randn(2, 5, 6)}).mlps == ()
