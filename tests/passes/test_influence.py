"""The influence of a block with a linear substitute in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.passes.blocks import run_stack
from compress.passes.influence import macro_influences, substituted_influences
from compress.passes.substitutes import Substitutes
from compress.progress import SILENT
from tests.zoo import build

WIDTH = 8
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


class Block(nn.Module):
    """h + down(act(up(h)))."""

    def __init__(self, act: nn.Module, scale: float) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), act, nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(self.up.weight, std=scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.act(self.up(hidden)))


class Stack(nn.Module):
    """Blocks 0 and 1 are linear maps, and block 2 is not."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [(nn.Identity(), 1.0), (nn.Identity(), 1.0), (nn.ReLU(), 3.0)]
        self.blocks = nn.ModuleList(Block(*kind) for kind in kinds)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_what_a_linear_map_can_do_has_no_influence():
    torch.manual_seed(0)
    given = Stack().eval(), BLOCKS, [{"hidden": torch.randn(16, 9, WIDTH)}] * 2, SILENT
    plain, substituted = macro_influences(*given), substituted_influences(*given)
    assert substituted[0] == plain[0], "the first block has no block before it"
    assert substituted[1] < 0.1 * plain[1]
    assert substituted[2] > 5 * substituted[1]


def test_positions_that_do_not_count_are_those_of_the_block():
    torch.manual_seed(0)
    module = Stack().eval()
    substitutes = Substitutes(list(module.blocks))
    kept = torch.rand(16, 9) > 0.5
    with substitutes.listening():
        run = run_stack(module, BLOCKS, {"hidden": torch.randn(16, 9, WIDTH)}, 1)
    substitutes.see(run, kept)
    hidden = substitutes.stand_in(1, run, substitutes.reads[0], kept)
    assert torch.equal(hidden[~kept], run.hidden[2][~kept])
    assert (hidden != run.hidden[2])[kept].any()


def test_padding_changes_nothing():
    model = build("llama")
    blocks = model.graph.stacks[0].blocks
    mask = model.example["attention_mask"].bool()
    assert not mask.all()
    other = {**model.example, "input_ids": model.example["input_ids"].where(mask, 7)}
    first, second = (
        substituted_influences(model.module, blocks, [batch], SILENT) for batch in (model.example, other)
    )
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second))
