"""Gates between the heads of an attention and its output map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.layers.gates import OutputGate, install_gate
from compress.layers.quantized import swap

HEADS, SIZE, WIDTH = 4, 3, 8
KINDS = ["linear", "mlp", "all"]


class Plain(nn.Module):
    """Maps of one attention's shape, with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * SIZE)
        self.output = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x):
        return self.output(self.query(x))


def gated(kind: str, scale: float = 4.0) -> tuple[Plain, OutputGate]:
    torch.manual_seed(0)
    module = Plain().double()
    gate = OutputGate(kind, WIDTH, HEADS, scale).double()
    gate.reset(torch.Generator().manual_seed(1))
    install_gate(module, "", "query", "output", gate)
    return module, gate


def shaken(gate: OutputGate) -> None:
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [4.0, 1.25])
def test_it_begins_as_one(kind, scale):
    module, gate = gated(kind, scale)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(gate(x), torch.ones(2, 5, HEADS, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(module(x), module.output.forward(module.query.forward(x)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_each_head_is_multiplied_by_its_gate(kind):
    module, gate = gated(kind)
    shaken(gate)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mixture = module.query.forward(x).unflatten(-1, (HEADS, SIZE)) * gate(x)[..., None]
    torch.testing.assert_close(module(x), module.output.forward(mixture.flatten(-2)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_folds_into_the_output_map(kind):
    module, gate = gated(kind)
    shaken(gate)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    expected = module(x)
    gate.fold(module.output)
    assert gate.scale == 1
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_reads_its_own_share_after_training_too(kind):
    module, gate = gated(kind)
    with gate.in_blocks():
        optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            module(torch.randn(2, 5, WIDTH, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64)
    other = x.clone()
    other[..., : WIDTH // HEADS] += 1
    changed = (gate(x) != gate(other)).flatten().tolist()
    assert changed == [True, False, False, False]


def test_all_reads_every_feature():
    _, gate = gated("all")
    shaken(gate)
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64)
    other = x.clone()
    other[..., 0] += 1
    assert (gate(x) != gate(other)).all()


def test_it_stays_when_its_maps_are_replaced_or_copied():
    module, gate = gated("all")
    shaken(gate)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    expected = module(x)
    swap(module, {one: copy.copy(one) for one in (module.query, module.output)})
    assert torch.equal(module(x), expected)
    apart = copy.deepcopy(module)
    with torch.no_grad():
        gate.maps[-1].bias.add_(1)
    assert torch.equal(apart(x), expected)
    assert not torch.equal(module(x), expected)


def test_it_keeps_nothing_of_a_run():
    module, gate = gated("linear")
    module(torch.randn(2, 5, WIDTH, dtype=torch.float64))
    assert gate.read is None
