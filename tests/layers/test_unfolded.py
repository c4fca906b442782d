"""Linear maps and convolutions as one matrix that multiplies rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.errors import Unsuitable
from compress.layers.unfolded import neighbours, rows, weight_matrix, write_matrix

IN, OUT = 4, 6
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "1x1": lambda: nn.Conv2d(IN, OUT, 1, stride=2),
    "3x3": lambda: nn.Conv2d(IN, OUT, 3, padding=1),
    "uneven": lambda: nn.Conv2d(IN, OUT, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(IN, OUT, 3, padding="same", dilation=2),
    "circular": lambda: nn.Conv2d(IN, OUT, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_outputs(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    conv = isinstance(layer, nn.Conv2d)
    layer.bias.data.normal_()
    x = torch.randn(2, IN, 9, 8, dtype=torch.float64) if conv else torch.randn(2, 5, IN, dtype=torch.float64)
    expected = layer(x).movedim(1, -1) if conv else layer(x)
    found = rows(layer, x) @ weight_matrix(layer).T + layer.bias
    torch.testing.assert_close(found, expected.flatten(0, -2), rtol=1e-10, atol=1e-12)
    assert neighbours(layer) == IN


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_written_is_read(name: str) -> None:
    layer = LAYERS[name]()
    wanted = torch.randn_like(weight_matrix(layer).contiguous())
    write_matrix(layer, wanted)
    assert torch.equal(weight_matrix(layer), wanted)


def test_one_picture_alone() -> None:
    layer, x = LAYERS["3x3"](), torch.randn(IN, 5, 5)
    assert torch.equal(rows(layer, x), rows(layer, x[None]))


def test_channels_at_one_place_are_neighbours() -> None:
    layer = LAYERS["3x3"]()
    assert torch.equal(weight_matrix(layer)[:, IN : 2 * IN], layer.weight[:, :, 0, 1])


def test_a_computed_weight() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(IN, OUT, 1))
    with pytest.raises(Unsuitable, match="`weight` is computed from other tensors"):
        weight_matrix(layer)
