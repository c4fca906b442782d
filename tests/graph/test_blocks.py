"""Stacks of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.graph import trace
from tests.zoo import build

ONE = {
    "bert": ("encoder.layer", range(3)),
    "roberta": ("encoder.layer", range(3)),
    "deberta": ("encoder.layer", range(3)),
    "distilbert": ("distilbert.transformer.layer", range(3)),
    # The first block has no norm before its attention.
    "modernbert": ("layers", range(1, 3)),
    "gpt2": ("transformer.h", range(3)),
    "opt": ("model.decoder.layers", range(3)),
    "llama": ("model.layers", range(3)),
    "mistral": ("model.layers", range(3)),
    "qwen3": ("model.layers", range(3)),
    "gemma3": ("model.layers", range(3)),
    "phi3": ("model.layers", range(3)),
    "bloom": ("transformer.h", range(3)),
    "gpt-neox": ("gpt_neox.layers", range(3)),
    "vit": ("vit.layers", range(3)),
    "deit": ("deit.layers", range(3)),
    "dinov2": ("encoder.layer", range(3)),
}
SEVERAL = {
    # The first block of each side holds the position bias of all.
    "t5": {"encoder.block": range(1, 3), "decoder.block": range(1, 3)},
    "whisper": {"model.encoder.layers": range(3), "model.decoder.layers": range(3)},
    "clip": {"vision_model.encoder.layers": range(3), "text_model.encoder.layers": range(3)},
    "siglip": {"vision_model.encoder.layers": range(3), "text_model.encoder.layers": range(3)},
    "swin": {f"swin.encoder.layers.{i}.blocks": range(depth) for i, depth in enumerate((2, 2, 3))},
    "cvt": {"cvt.encoder.stages.1.layers": range(2), "cvt.encoder.stages.2.layers": range(3)},
    "segformer": {f"segformer.stages.{i}.blocks": range(depth) for i, depth in enumerate((2, 2, 2, 3))},
    # The first fusion layer leaves half of its convolutions unused.
    "dpt": {"dpt.encoder.layer": range(4), "neck.fusion_stage.layers": range(1, 4)},
    "convnext": {f"convnext.encoder.stages.{i}.layers": range(depth) for i, depth in enumerate((2, 2, 3, 2))},
    "poolformer": {f"poolformer.encoder.block.{i}": range(depth) for i, depth in enumerate((2, 2, 3, 2))},
    # The first block of each stage has a convolution in its shortcut.
    "resnet": {"resnet.encoder.stages.1.layers": range(1, 3)},
    "mobilevit": {
        # The first block of the second layer halves the picture.
        "mobilevit.encoder.layer.1.layer": range(1, 3),
        "mobilevit.encoder.layer.2.transformer.layer": range(2),
        "mobilevit.encoder.layer.3.transformer.layer": range(4),
        "mobilevit.encoder.layer.4.transformer.layer": range(3),
    },
}
EXPECTED = {name: {path: numbers} for name, (path, numbers) in ONE.items()} | SEVERAL


@pytest.mark.parametrize("name", EXPECTED)
def test_stacks(name):
    found = {stack.path: stack.blocks for stack in build(name).graph.stacks}
    assert found == {
        path: tuple(f"{path}.{number}" for number in numbers) for path, numbers in EXPECTED[name].items()
    }


class Side(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def test_equal_modules_side_by_side_are_no_stack():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Side() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part(x) for part in self.parts], -1)

    assert trace(Beside(), {"x": torch.randn(2, 6)}).stacks == ()


def test_a_residual_sum_outside_the_blocks():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Side() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = x + part(x)
            return x

    (stack,) = trace(Around(), {"x": torch.randn(2, 6)}).stacks
    assert stack.blocks == ("parts.0", "parts.1", "parts.2")
