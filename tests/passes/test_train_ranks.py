"""Factors that train for every rank at once, and the slices that they give without more training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import compress
import export
from benchmarks.digits import Digits, read_digits
from compress.checkpoint import load, save
from compress.compare import forward
from compress.errors import DataError, Unsuitable
from compress.layers.low_rank import LowRankLinear, OrderedLowRank
from compress.model import Model
from compress.numerics.low_rank import Offer, decompose
from compress.passes.base import Context
from compress.passes.distill import Distill
from compress.passes.factorize import Factorize
from compress.passes.quantize import Quantize
from compress.passes.rank_dropout import RankDropout, factor_out, settle
from compress.passes.slice_ranks import SliceRanks
from compress.passes.slicing import factored, slice_layers
from compress.passes.taught import EVERYTHING
from compress.passes.train_ranks import TrainRanks
from compress.pipeline import run, state_bytes
from compress.scope import Scope
from compress.testing import check_pass
from export.runners import OnnxRunner
from tests.zoo import fresh

QUICK: dict[str, Any] = {"steps": 48, "multiple": 1}


def taught(model: Model) -> Context:
    """Batches that differ from the example, with the model as its own teacher."""
    torch.manual_seed(0)
    shape = model.example["input_ids"].shape
    batches = [{**model.example, "input_ids": torch.randint(3, 60, shape)} for _ in range(4)]
    return Context(training=batches, calibration=batches, teacher=model)


class Line(nn.Module):
    """One linear map, as a model."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = nn.Parameter(weight)

    def forward(self, states: torch.Tensor, output_hidden_states: bool = False) -> dict[str, object]:
        made = self.map(states)
        return {
            "last_hidden_state": made,
            **({"hidden_states": (states, made)} if output_hidden_states else {}),
        }


def test_the_linear_case_recovers_the_svd():
    """Identity inputs, a target of rank 3, and a start that is far off it: what trains with ranks left out becomes the
    target's SVD, so that every cut is the best of its rank."""
    torch.manual_seed(0)
    target = torch.randn(9, 3) @ torch.randn(3, 6)
    target = 4 * target / target.norm(dim=0)  # the loss takes each output relative to its length
    example = {"states": torch.eye(6)}
    teacher = Model(Line(target).eval(), example, "feature-extraction")
    start = target + 0.5 * torch.randn(9, 6)
    student = Model(Line(start).eval(), example, "feature-extraction")
    context = Context(training=[example], calibration=[example], teacher=teacher)
    settings = TrainRanks(
        steps=2000,
        learning_rate=0.03,
        dropout="layer",
        method="svd",
        multiple=1,
        keep=None,
        loss="hidden",
        head=True,
    )
    layer = run(student, [settings], context).model.module.get_submodule("map")
    assert isinstance(layer, LowRankLinear)
    expand, reduce = layer.expand.weight.detach(), layer.reduce.weight.detach()
    left, values, right = torch.linalg.svd(target)
    for rank in range(1, 4):
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert (expand[:, :rank] @ reduce[:rank] - best).norm() < 0.01 * target.norm(), rank
        first, size, second = torch.linalg.svd(start)
        assert (first[:, :rank] * size[:rank] @ second[:rank] - best).norm() > 0.1 * target.norm(), rank
    found = expand.norm(dim=0) * reduce.norm(dim=1)
    torch.testing.assert_close(found[:3], values[:3], rtol=0.01, atol=0.0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_whole_factors_are_the_dense_model(name):
    model = fresh(name)
    layers = {path: matrix for path, matrix in linears(model).items() if min(matrix.shape) > 4}
    reference = forward(model.module.double(), example(model))
    made = factor_out(model.module, {path: decompose(one.double()) for path, one in layers.items()})
    for key, value in forward(model.module, example(model)).items():
        torch.testing.assert_close(value, reference[key], rtol=1e-9, atol=1e-9)
    settle(model.module, made, 1)
    for key, value in forward(model.module, example(model)).items():
        torch.testing.assert_close(value, reference[key], rtol=1e-9, atol=1e-9)


def linears(model: Model) -> dict[str, torch.Tensor]:
    from compress.layers.linear import matrix
    from compress.passes.plain_maps import plain_maps

    weights, _ = plain_maps(model, EVERYTHING, True)
    return {one.path: matrix(model.module.get_submodule(one.path)) for one in weights}


def example(model: Model) -> dict[str, torch.Tensor]:
    return {
        name: value.double() if value.is_floating_point() else value for name, value in model.example.items()
    }


def ordered() -> tuple[dict[str, OrderedLowRank], dict[str, Offer]]:
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(8, 16)})
    spectra = {path: decompose(layer.weight) for path, layer in module.items()}
    return factor_out(module, spectra), {
        path: one.offer(float(len(one.expand) * one.reduce.shape[1]), relative=True)
        for path, one in spectra.items()
    }


def test_a_sweep_leaves_out_each_rank_of_each_layer_once():
    layers, offers = ordered()
    dropout = RankDropout(layers, offers, "layer", 0.2, 1, seed=0)
    seen = []
    for step in range(18):
        dropout.draw(step)
        seen.append((layers["a"].active, layers["b"].active))
    cut = [(a, b) for a, b in seen if (a, b) != (10, 8)]
    assert sorted(a for a, b in cut if b == 8) == list(range(1, 10))
    assert sorted(b for a, b in cut if a == 10) == list(range(1, 8))
    assert len(cut) == 16
    again = RankDropout(layers, offers, "layer", 0.2, 1, seed=0)
    again.draw(17)
    assert (layers["a"].active, layers["b"].active) == seen[17]


def test_a_budget_for_the_model_grows_with_its_share():
    layers, offers = ordered()
    dropout = RankDropout(layers, offers, "model", 0.3, 1, seed=0)
    assert [round(share, 2) for share in dropout.judged] == [0.3, 0.67, 1.0]
    costs = []
    for ranks in dropout.judged.values():
        costs.append(sum(offers[path].cost(rank) for path, rank in ranks.items()))
    assert costs[0] <= 0.3 * 248 < costs[1] <= 0.68 * 248 < costs[2]
    with dropout.at(next(iter(dropout.judged.values()))):
        assert any(layer.active < layer.rank for layer in layers.values())
    assert all(layer.active == layer.rank for layer in layers.values())


def test_a_strong_lasso_takes_all_features_but_the_first():
    model = fresh("bert")
    settings = TrainRanks(keep=None, lasso=1e6, scope=Scope(include=("*.query",)), **QUICK)
    # The loss grows where everything is taken away: the pass says so, and does not hand the model over.
    with pytest.raises(compress.ModelpressError, match="did not lower its loss"):
        run(model, [settings], taught(model))
    layers, _ = ordered()
    dropout = RankDropout(layers, ordered()[1], "layer", 0.2, 1, seed=0)
    dropout.shrink(100.0)
    plain = settle(nn.ModuleDict(layers), layers, 1)
    assert {path: layer.rank for path, layer in plain.items()} == {"a": 1, "b": 1}


def test_a_weak_lasso_takes_the_last_features():
    layers, offers = ordered()
    dropout = RankDropout(layers, offers, "layer", 0.2, 1, seed=0)
    for _ in range(4):
        dropout.shrink(0.1)
    plain = settle(nn.ModuleDict(layers), layers, 1)
    assert 1 < plain["a"].rank < 10


@pytest.mark.parametrize(("name", "dropout"), [("bert", "model"), ("gpt2", "layer"), ("llama", "model")])
def test_it_keeps_the_contract_of_passes(name, dropout):
    model = fresh(name)
    settings = TrainRanks(keep=0.6, dropout=dropout, loss="hidden", **QUICK)
    outcome = check_pass(settings, model, taught(model))
    kept = outcome.steps[-1].record["ranks"]
    assert kept
    before = sum(matrix.numel() for path, matrix in linears(model).items() if path in kept)
    after = sum(
        parameter.numel()
        for path in kept
        for parameter in outcome.model.module.get_submodule(path).parameters()
        if parameter.dim() == 2
    )
    assert after <= 0.6 * before


def test_any_smaller_size_is_sliced_out_of_one_training(tmp_path):
    model = fresh("bert")
    context = taught(model)
    whole = run(model, [TrainRanks(keep=None, loss="hidden", **QUICK)], context).model
    assert all(
        layer.rank == min(len(layer.expand.weight), layer.reduce.weight.shape[1])
        for layer in factored(whole.module, EVERYTHING).values()
    )
    sizes = []
    for keep in (0.75, 0.5, 0.3):
        outcome = run(whole, [SliceRanks(keep=keep, multiple=1)], context)
        sizes.append(state_bytes(outcome.model.module))
        save(outcome.model, tmp_path / str(keep))
        back = load(tmp_path / str(keep), skeleton=fresh("bert").module)
        for name, value in forward(outcome.model.module, model.example).items():
            assert torch.equal(forward(back.module, model.example)[name], value)
    assert sizes[0] > sizes[1] > sizes[2]
    again = run(outcome.model, [SliceRanks(keep=0.2, multiple=1)], context)
    assert state_bytes(again.model.module) < sizes[2]
    with pytest.raises(compress.ModelpressError, match="found nothing to do"):
        run(again.model, [SliceRanks(keep=0.9, multiple=1)], context)


def test_a_slice_is_what_the_whole_gives_at_that_rank():
    model = fresh("llama")
    torch.manual_seed(0)
    made = factor_out(
        model.module, {path: decompose(one) for path, one in linears(model).items() if path != "lm_head"}
    )
    for layer in made.values():
        layer.active = 5
    reference = forward(model.module, model.example)["logits"]
    settle(model.module, made, 1)
    slice_layers(model.module, dict.fromkeys(made, 5))
    torch.testing.assert_close(forward(model.module, model.example)["logits"], reference)


def test_factors_of_other_passes_are_sliced_too():
    model = fresh("bert")
    context = taught(model)
    halved = run(model, [Factorize(keep=0.6, multiple=1)], context).model
    sliced = run(halved, [SliceRanks(keep=0.2, multiple=1)], context).model
    assert state_bytes(sliced.module) < state_bytes(halved.module)


def test_the_result_exports_and_quantizes(tmp_path):
    model = fresh("bert")
    outcome = run(model, [TrainRanks(keep=0.5, loss="hidden", **QUICK), Quantize()], taught(model))
    export.Onnx(runtime="cpu").write(outcome.model, tmp_path / "onnx")
    found = OnnxRunner(tmp_path / "onnx", threads=1)(**model.example).last_hidden_state
    wanted = forward(outcome.model.module, model.example)["last_hidden_state"]
    assert torch.nn.functional.cosine_similarity(torch.as_tensor(found), wanted, dim=-1).min() > 0.99


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits()


def test_one_training_gives_better_slices_than_truncation(digits):
    """Read digits at three sizes: slices of one training against factors that nothing trained."""
    context = {"calibration": digits.batches[:8], "training": digits.batches}
    settings = TrainRanks(steps=200, learning_rate=1e-3, keep=None, multiple=4)
    whole = compress.apply(digits.model, [settings], **context).model
    for keep in (0.5, 0.35, 0.25):
        sliced = compress.apply(
            whole, [SliceRanks(keep=keep, multiple=4)], calibration=digits.batches[:8]
        ).model
        cut = compress.apply(
            digits.model, [Factorize(keep=keep, method="svd", multiple=4)], calibration=digits.batches[:8]
        ).model
        assert state_bytes(sliced.module) <= state_bytes(cut.module) * 1.02
        assert digits.accuracy(sliced) > digits.accuracy(cut)
    assert digits.accuracy(sliced) > digits.accuracy(digits.model) - 0.1


def test_it_declines_what_it_cannot_serve():
    model = fresh("bert")
    with pytest.raises(DataError, match="needs training data"):
        run(model, [TrainRanks(**QUICK)], Context())
    quantized = run(model, [Quantize()], taught(model)).model
    for settings in (TrainRanks(**QUICK), SliceRanks()):
        with pytest.raises(Unsuitable, match="quantized already"):
            run(quantized, [settings], taught(model))
    with pytest.raises(Unsuitable, match="No factored layer"):
        run(model, [SliceRanks()], taught(model))
    whole = run(model, [TrainRanks(keep=None, loss="hidden", **QUICK)], taught(model)).model
    with pytest.raises(Unsuitable, match="cannot be reached"):
        run(whole, [SliceRanks(keep=0.01, multiple=8)], taught(model))


def test_distill_heals_slices():
    model = fresh("bert")
    context = taught(model)
    passes = [TrainRanks(keep=0.4, loss="hidden", **QUICK), Distill(steps=32, loss="hidden")]
    assert [step.name for step in run(model, passes, context).steps] == ["train_ranks", "distill"]
