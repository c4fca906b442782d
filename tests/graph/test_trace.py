"""Tracing: any names, quantized models, repeated modules, the module left alone, and failures that say why."""

from __future__ import annotations

import ast
import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import compress.graph
from compress.errors import Unsuitable
from compress.graph import Attention, Mlp, Norm, Projection, Stack, trace
from compress.layers.quantized import Activation, QuantizedConv2d, QuantizedLinear
from compress.model import Model
from tests.graph.zork import DEPTH, HEADS, HIDDEN, SIZE, WIDTH, WORDS, Snark
from tests.zoo import build


@pytest.fixture(scope="module")
def zork():
    torch.manual_seed(0)
    return trace(Snark(), {"r": torch.randint(0, WORDS, (2, 12))})


def rows(part: int) -> tuple[tuple[int, int], ...]:
    starts = [(3 * head + part) * SIZE for head in range(HEADS)]
    return tuple((start, start + SIZE) for start in starts)


def test_attention_of_a_model_with_meaningless_names(zork):
    assert zork.attentions == tuple(
        Attention(
            path=f"m.{i}.b7",
            query=Projection(f"m.{i}.b7.u", rows(1)),
            key=Projection(f"m.{i}.b7.u", rows(2)),
            value=Projection(f"m.{i}.b7.u", rows(0)),
            output=Projection(f"m.{i}.b7.e", ((0, WIDTH),)),
            heads=HEADS,
            kv_heads=HEADS,
            head_size=SIZE,
            causal=True,
            cross=False,
            positions="none",
        )
        for i in range(DEPTH)
    )


def test_the_rest_of_a_model_with_meaningless_names(zork):
    assert zork.stacks == (Stack("m", tuple(f"m.{i}" for i in range(DEPTH))),)
    assert zork.mlps[1] == Mlp(
        path="m.1",
        up=Projection("m.1.k", ((0, HIDDEN),)),
        gate=Projection("m.1.k", ((HIDDEN, 2 * HIDDEN),)),
        down=Projection("m.1.w", ((0, WIDTH),)),
        activation="silu",
    )
    assert zork.norms[:2] == (
        Norm("m.0.a1", "rms", ("m.0.b7.u",), False),
        Norm("m.0.q", "rms", ("m.0.k",), False),
    )
    assert zork.norms[-1] == Norm("y", "rms", ("v",), False)
    assert zork.residual_writers == tuple(f"m.{i}.{part}" for i in range(DEPTH) for part in ("b7.e", "w"))
    assert {weight.path: weight.role for weight in zork.weights if "m." not in weight.path} == {"v": "head"}
    assert len(zork.weights) == 4 * DEPTH + 1


def quantized(model: Model) -> nn.Module:
    """A copy of the module with all linear maps and convolutions of its body in int8."""
    module = copy.deepcopy(model.module)
    for weight in model.graph.weights:
        if weight.role == "body":
            parent, _, name = weight.path.rpartition(".")
            layer = module.get_submodule(weight.path)
            make = QuantizedLinear if weight.kind == "linear" else QuantizedConv2d
            setattr(module.get_submodule(parent), name, make(layer, Activation(-3.0, 3.0)))
    return module


@pytest.mark.parametrize(
    "name", ["bert", "deberta", "gpt2", "gemma3", "bloom", "t5", "swin", "segformer", "resnet"]
)
def test_a_quantized_model_gives_the_same_answers(name):
    model = build(name)
    before, after = model.graph, trace(quantized(model), model.example)
    for field in dataclasses.fields(before):
        if field.name != "macs":
            assert getattr(after, field.name) == getattr(before, field.name), field.name
    assert {path: after.macs[path] for path in before.macs} == before.macs


class Twice(nn.Module):
    """One block that runs three times, after a map of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(4, 6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        for _ in range(3):
            x = x + self.down(torch.relu(self.up(self.norm(x))))
        return x.sigmoid()


def test_a_module_that_runs_three_times_is_one_answer():
    graph = trace(Twice(), {"x": torch.randn(2, 5, 4)})
    assert len(graph.mlps) == 1
    assert graph.norms == (Norm("norm", "layer", ("up",), False),)
    assert graph.weight("up").macs == 3 * 2 * 5 * 6 * 9
    assert graph.weight("up").reads.count("|") == 2


class Overwrites(nn.Module):
    """A norm whose output is changed in place before a map reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        first = self.one(x)
        x[:, 0] = 1.0
        return torch.relu(first + self.two(x))


def test_a_tensor_that_is_changed_in_place_is_not_taken_for_what_it_was():
    graph = trace(Overwrites(), {"x": torch.randn(2, 3, 6)})
    assert graph.norms == (Norm("norm", "layer", (), True),)
    assert graph.weight("one").reads != graph.weight("two").reads


def test_pytorchs_own_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 18, batch_first=True, norm_first=True)
    graph = trace(
        nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), {"src": torch.randn(2, 5, 8)}
    )
    path = "layers.1.self_attn"
    assert graph.attentions[1] == Attention(
        path=path,
        query=Projection(path, ((0, 8),)),
        key=Projection(path, ((8, 16),)),
        value=Projection(path, ((16, 24),)),
        output=Projection(f"{path}.out_proj", ((0, 8),)),
        heads=2,
        kv_heads=2,
        head_size=4,
        causal=False,
        cross=False,
        positions="none",
    )
    assert graph.stacks == (Stack("layers", ("layers.0", "layers.1", "layers.2")),)
    assert [mlp.activation for mlp in graph.mlps] == ["relu"] * 3
    assert graph.weight("layers.1.linear1") is not None
    assert graph.weight(path) is None


def test_the_module_is_left_as_it_was():
    model = build("t5")
    module = copy.deepcopy(model.module).train()
    module.encoder.block[0].eval()
    flags = {path: part.training for path, part in module.named_modules()}
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    config = copy.deepcopy(module.config.to_dict())
    attributes = {path: set(vars(part)) for path, part in module.named_modules()}
    trace(module, model.example)
    assert {path: part.training for path, part in module.named_modules()} == flags
    assert module.config.to_dict() == config
    assert {path: set(vars(part)) for path, part in module.named_modules()} == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) if x.sum() > 0 else x


def test_a_module_that_cannot_be_traced_says_why():
    with pytest.raises(Unsuitable) as raised:
        trace(Branch(), {"x": torch.randn(2, 3)})
    assert raised.value.fact.startswith("Branch cannot be traced with inputs x (2, 3): ")
    assert "data-dependent" in raised.value.fact
    assert "branches on values of tensors" in raised.value.remedy


def test_training_flags_come_back_after_a_failure():
    module = Branch().train()
    with pytest.raises(Unsuitable):
        trace(module, {"x": torch.randn(2, 3)})
    assert module.training
    assert module.part.training


def test_no_model_type_or_class_or_module_name_decides():
    """No string in the code of the discovery is part of any name in the models above, except names of aten ops."""
    folder = Path(compress.graph.__file__).parent
    forbidden = {"model_type", "architectures", "__class__", "isinstance(module", "named_children"}
    names = {
        "self_attn",
        "q_proj",
        "query",
        "attention",
        "lm_head",
        "classifier",
        "layers",
        "encoder",
        "decoder",
    }
    for file in folder.glob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in source], file.name
        strings = {
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & names, file.name
