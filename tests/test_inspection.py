"""The tree of parts: what each is called, and that its numbers are those of the modules."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from compress.inspection import Part, as_tree, inspect, scaled
from tests.zoo import build


def printed(part: Part) -> list[str]:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(as_tree(part))
    return [line.strip("│├└─ ") for line in console.file.getvalue().splitlines()]


def at(part: Part, path: str) -> Part:
    found = [part]
    while found:
        part = found.pop()
        if part.path == path:
            return part
        found += part.children
    raise AssertionError(path)


def test_parts_are_called_what_they_are():
    whole = inspect(build("llama"))
    assert whole.kind == "LlamaForCausalLM"
    assert at(whole, "model.layers").kind == "stack of 3 blocks"
    assert at(whole, "model.layers.1").kind == "block"
    assert at(whole, "model.layers.1.self_attn").kind == (
        "attention, 6 heads of 10, 2 key-value heads, causal, rotary positions"
    )
    assert at(whole, "model.layers.1.mlp").kind == "mlp, gated, silu, 88 hidden"
    assert at(whole, "model.norm").kind == "RMS norm"
    assert at(whole, "model.embed_tokens").kind == "look-up, weight 99 × 48"
    assert at(whole, "lm_head").kind == "linear, weight 99 × 48, head"


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_numbers_are_those_of_the_module(name):
    model = build(name)
    whole = inspect(model)
    queue = [whole]
    while queue:
        part = queue.pop()
        module = model.module.get_submodule(part.path)
        tensors = [*module.parameters(), *module.buffers()]
        assert part.parameters == sum(parameter.numel() for parameter in module.parameters())
        assert part.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert part.macs == model.graph.macs[part.path]
        queue += part.children
    assert whole.macs == model.graph.macs[""] > 0


def test_no_part_is_lost():
    model = build("vit")
    whole = inspect(model)
    paths, queue = set(), [whole]
    while queue:
        part = queue.pop()
        paths.add(part.path)
        queue += part.children
    assert {weight.path for weight in model.graph.weights} <= paths
    assert {norm.path for norm in model.graph.norms} <= paths


def test_equal_blocks_are_one_line():
    lines = printed(inspect(build("bert")))
    assert lines[0] == "BertModel 45.5 k parameters, 183 kB, 948 k MACs"
    assert "0 … 2 block; mlp, gelu, 72 hidden × 3 12.6 k parameters, 50.4 kB, 315 k MACs" in lines
    assert "query … value linear, weight 40 × 40 × 3 1.64 k parameters, 6.56 kB, 38.4 k MACs" in lines
    assert len([line for line in lines if "attention, 4 heads of 10" in line]) == 1


def test_unequal_blocks_are_lines_of_their_own():
    lines = printed(inspect(build("modernbert")))
    assert len([line for line in lines if "attention, 4 heads of 10, rotary positions" in line]) == 2
    assert any(line.startswith("1 … 2 block × 2 ") for line in lines)


def test_numbers_are_scaled_to_three_digits():
    numbers = [0, 950, 1_000, 22_713_216, 4_096_000_000]
    assert [scaled(number, "B") for number in numbers] == ["0 B", "950 B", "1 kB", "22.7 MB", "4.1 GB"]
    assert scaled(80, " parameters") == "80 parameters"
    assert scaled(22_713_216, " parameters") == "22.7 M parameters"
