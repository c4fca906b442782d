"""Plain tensors in the place of computed ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from compress.errors import Unsuitable
from compress.plain import computed_in, make_plain, plain_copy, require_plain


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 2)))


def test_a_copy_is_plain_and_computes_the_same(module):
    x = torch.randn(5, 3)
    plain = plain_copy(module)
    assert type(plain[1]) is nn.Linear
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert torch.equal(plain(x), module(x))
    assert plain_copy(plain) is plain


def test_copies_that_share_a_class_stay(module):
    x = torch.randn(5, 3)
    expected = module(x)
    make_plain(copy.deepcopy(module))
    assert computed_in(module[1]) == ["weight"]
    assert torch.equal(module(x), expected)


def test_what_trained_trains_and_a_buffer_stays_one():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    module = nn.BatchNorm1d(3)
    module.bias.requires_grad_(False)
    for name in ("weight", "bias", "running_mean"):
        parametrize.register_parametrization(module, name, Double())
    make_plain(module)
    assert type(module) is nn.BatchNorm1d
    assert (module.weight.requires_grad, module.bias.requires_grad) == (True, False)
    assert torch.equal(module.weight, torch.full((3,), 2.0))
    assert "running_mean" in dict(module.named_buffers())


def test_the_tensor_is_named(module):
    require_plain(module[0], "0")
    with pytest.raises(Unsuitable, match="`block.1.weight` is computed from other tensors"):
        require_plain(module, "block")
