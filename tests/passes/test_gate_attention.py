"""Gated attention: it begins as the model that it came from, and calms what it is trained on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import compress
import export
from compress.compare import forward
from compress.errors import NothingToDo, Unproved, Unsuitable
from compress.graph import trace
from compress.layers.gates import OutputGate, is_gated
from compress.model import Model
from compress.numerics.outliers import rounding_noise
from compress.passes.base import Context
from compress.passes.calming import penalised
from compress.passes.distill import Distill
from compress.passes.gate_attention import GateAttention
from compress.passes.gate_sites import gate_sites
from compress.passes.spreads import Place
from compress.pipeline import run
from compress.scope import Scope
from export.runners import OnnxRunner
from tests.passes.outlying import distance, in_8_bits, outlying, texts
from tests.zoo import build

NAMES = ["bert", "gpt2", "gpt-neox", "llama", "phi3", "t5", "whisper", "vit", "swin"]
QUICK = {"steps": 4, "learning_rate": 1e-3, "penalty": 1.0}


def gated(model: Model, **settings) -> compress.Outcome:
    return run(model, [GateAttention(**QUICK | settings)], Context(training=[model.example], teacher=model))


@pytest.fixture(scope="module")
def source() -> Model:
    return outlying()


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_the_model_that_it_came_from(name):
    model = build(name)
    model = replace(model, module=copy.deepcopy(model.module))
    expected = forward(model.module, model.example)
    sites, skips = gate_sites(model, Scope(), apart=True)
    assert len(sites) == len(model.graph.attentions)
    assert not skips
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        GateAttention()._install(model.module, site, 4.0).reset(generator)
    found = forward(model.module, model.example)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp", "all"])
def test_8_bits_cost_less_afterwards(source, kind):
    settings = {"kind": kind, "steps": 100, "learning_rate": 3e-3, "penalty": 1.0}
    outcome = compress.apply(
        source, [GateAttention(**settings)], calibration=texts(8, seed=1), training=texts(16, seed=1)
    )
    before, after = distance(source, in_8_bits(source)), distance(source, in_8_bits(outcome.model))
    assert after < before / 2
    *gates, trained = outcome.steps[0].changes
    assert [change.before for change in gates] == ["4 heads"] * 2
    assert trained.what == "trained for fewer outliers"
    largest, kurtosis = zip(*map(figures, (trained.before, trained.after)), strict=True)
    assert largest[1] < largest[0] / 2
    assert kurtosis[1] < kurtosis[0] / 2


def figures(text: str) -> tuple[float, float]:
    """The figures in the words of a change."""
    first, second = text.split(" (")[0].split(", mean kurtosis ")
    return float(first.removeprefix("largest input of a linear map ")), float(second)


def test_distill_with_a_penalty_does_it_too(source):
    distill = Distill(steps=100, learning_rate=3e-3, penalty=1.0)
    outcome = compress.apply(source, [distill], training=texts(16, seed=1))
    assert distance(source, in_8_bits(outcome.model)) < distance(source, in_8_bits(source)) / 2
    assert [change.what for change in outcome.steps[0].changes] == ["trained for fewer outliers"]


def test_without_a_penalty_nothing_is_proved(source):
    with pytest.raises(Unproved) as caught:
        compress.apply(source, [GateAttention(steps=2, penalty=0)], training=texts(2, seed=1))
    assert caught.value.fact.startswith(
        "`gate_attention` did not make outliers fewer: largest input of a linear"
    )
    assert caught.value.remedy == "Raise `penalty`, take more steps, or give more data."


def test_gates_stay_through_quantization_and_a_checkpoint(tmp_path):
    model = build("bert")
    outcome = compress.apply(gated(model).model, [compress.Quantize()], calibration=[model.example])
    gates = [part for part in outcome.model.module.modules() if isinstance(part, OutputGate)]
    expected = forward(outcome.model.module, model.example)
    compress.save(outcome.model, tmp_path / "gated")
    back = compress.load(tmp_path / "gated", skeleton=copy.deepcopy(model.module))
    assert all(
        torch.equal(value, forward(back.module, model.example)[key]) for key, value in expected.items()
    )
    with torch.no_grad():
        for gate in gates:
            gate.maps[-1].bias.fill_(-40)
    assert not torch.equal(
        forward(outcome.model.module, model.example)["pooler_output"], expected["pooler_output"]
    )


def test_the_export_answers_alike_and_keeps_attention_fused(tmp_path):
    model = gated(build("gpt2")).model
    export.Onnx(runtime="standard").write(model, tmp_path / "gated")
    found = OnnxRunner(tmp_path / "gated", threads=1)(**model.example).logits
    seen = model.example["attention_mask"].bool()
    expected = forward(model.module, model.example)["logits"]
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)
    graph = trace(model.module, model.example)
    assert [one.heads for one in graph.attentions] == [6, 6, 6]


def test_only_the_scope_is_gated():
    model = build("bert")
    outcome = gated(model, scope=Scope(include=("encoder.layer.1.attention",)))
    assert [change.target for change in outcome.steps[0].changes] == [
        "encoder.layer.1.attention",
        "the model",
    ]
    assert is_gated(outcome.model.module.get_submodule("encoder.layer.1"))
    assert not is_gated(outcome.model.module.get_submodule("encoder.layer.0"))


def test_features_that_heads_cannot_share_out_are_left_alone():
    torch.manual_seed(0)
    model = Model(Uneven().eval(), {"x": torch.randn(2, 5, 6)}, "feature-extraction")
    with pytest.raises(NothingToDo, match="6 features cannot be shared out among 4 heads; set `kind: all`"):
        gated(model)
    assert len(gate_sites(model, Scope(), apart=False)[0]) == 1


@pytest.mark.parametrize("how", ["by name", "as a weight"])
def test_maps_that_a_gate_would_not_hear_are_left_alone(how):
    torch.manual_seed(0)
    model = Model(Unheard(how).eval(), {"x": torch.randn(2, 5, 8)}, "feature-extraction")
    why = "`query` is not called with its input as first argument, where a gate would hear it"
    with pytest.raises(NothingToDo, match=why):
        gated(model)


def test_a_scope_in_which_nothing_moves_an_input_is_refused(source):
    """The last norm is read by the output head alone, whose input is not rounded."""
    settings = Distill(steps=2, penalty=1.0, scope=Scope(include=("model.norm",)))
    with pytest.raises(Unsuitable) as caught:
        compress.apply(source, [settings], training=texts(2, seed=1))
    assert caught.value.fact == (
        "What `distill` may train moves no input of a linear map, where outliers would be."
    )
    assert caught.value.remedy == "Widen the scope."


@pytest.mark.parametrize("times", [0, 1, 3])
def test_the_penalty_counts_every_run_of_a_layer_that_sees_tokens(times):
    torch.manual_seed(0)
    module = nn.ModuleDict({"always": nn.Linear(4, 4), "often": nn.Linear(4, 4)})
    wanted = [Place(path, "linear input") for path in module]
    x = torch.randn(3, 5, 4)

    def loss(module, batch):
        made = module["always"](batch["x"])
        for _ in range(times):
            made = module["often"](made)
        if not times:  # an expert that no token goes to
            module["often"](made.flatten(0, 1)[:0])
        return made.sum() * 0

    with penalised(module, loss, wanted, 0.5) as penalty:
        found = penalty(module, {"x": x})
    expected = rounding_noise(x)
    state = module["always"](x)
    for _ in range(times):
        expected = expected + rounding_noise(state)
        state = module["often"](state)
    assert found.item() == pytest.approx(0.5 * expected.item())


class Unheard(nn.Module):
    """An attention of 2 heads, whose map of the queries is used without hooks that see its input."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how
        self.query, self.key, self.value, self.output = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        if self.how == "by name":
            query = self.query(input=x)
        else:
            query = nn.functional.linear(x, self.query.weight, self.query.bias)
        sides = [one.unflatten(-1, (2, 4)).transpose(1, 2) for one in (query, self.key(x), self.value(x))]
        mixture = nn.functional.scaled_dot_product_attention(*sides)
        return {"last_hidden_state": self.output(mixture.transpose(1, 2).flatten(-2))}


class Uneven(nn.Module):
    """An attention of 4 heads over 6 features."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 8) for _ in range(3))
        self.output = nn.Linear(8, 6)

    def forward(self, x):
        sides = [side(x).unflatten(-1, (4, 2)).transpose(1, 2) for side in (self.query, self.key, self.value)]
        mixture = nn.functional.scaled_dot_product_attention(*sides)
        return {"last_hidden_state": self.output(mixture.transpose(1, 2).flatten(-2))}


def test_twice_and_after_quantization_are_refused():
    model = gated(build("bert")).model
    with pytest.raises(Unsuitable, match="have gates already"):
        GateAttention().check(model)
    quantized = compress.apply(build("bert"), [compress.Quantize()], calibration=[model.example]).model
    with pytest.raises(Unsuitable) as caught:
        GateAttention().check(quantized)
    assert caught.value.remedy == "Put `gate_attention` before `quantize` in the recipe."
