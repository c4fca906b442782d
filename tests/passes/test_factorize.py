"""Low-rank factorization on models of many kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import compress
import export
from compress.compare import forward
from compress.errors import DataError, NothingToDo, Unsuitable
from compress.layers.low_rank import LowRankLinear
from compress.model import Model
from compress.passes.base import Context, Result
from compress.passes.factorize import Factorize
from compress.passes.quantize import Quantize
from compress.pipeline import run, state_bytes
from compress.scope import Scope
from tests.zoo import build, fresh

NAMES = ["bert", "deberta", "gpt2", "opt", "llama", "qwen3", "gemma3", "phi3", "t5", "whisper", "vit", "swin"]


def factorize(model: Model, **settings) -> Result:
    return Factorize(**{"multiple": 1, **settings}).apply(model, Context(calibration=[model.example]))


def cost(module: nn.Module, paths: list[str]) -> int:
    layers = [module.get_submodule(path) for path in paths]
    return sum(
        parameter.numel() for layer in layers for parameter in layer.parameters() if parameter.dim() == 2
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_model_keeps_its_budget(name):
    model = fresh(name)
    paths = [
        weight.path for weight in model.graph.weights if weight.kind == "linear" and weight.role == "body"
    ]
    before = cost(model.module, paths)
    result = factorize(model, keep=0.7)
    assert len(result.changes) > len(paths) / 3
    assert cost(result.module, paths) <= 0.7 * before


@pytest.mark.parametrize("method", ["fisher", "svd_llm", "asvd", "svd"])
def test_less_is_lost_with_more_kept(method):
    reference, lost = forward(build("llama").module, build("llama").example)["logits"], []
    for keep in (0.9, 0.6, 0.3):
        model = fresh("llama")
        module = Factorize(multiple=1, method=method, keep=keep).apply(model, many(model)).module
        lost.append((forward(module, model.example)["logits"] - reference).square().mean())
    assert 0 < lost[0] < lost[1] < lost[2]


def context(model: Model) -> Context:
    return Context(calibration=[model.example])


def many(model: Model) -> Context:
    """More positions than any layer has features, so that no second moment is singular."""
    torch.manual_seed(0)
    shape = model.example["input_ids"].shape
    return Context(
        calibration=[{**model.example, "input_ids": torch.randint(3, 60, shape)} for _ in range(24)]
    )


def test_a_model_of_low_rank_is_kept():
    """Planted: every weight has rank 2, so that factors of rank 2 change nothing."""
    model = fresh("bert")
    for weight in model.graph.weights:
        if weight.kind == "linear":
            layer = model.module.get_submodule(weight.path)
            u, s, v = torch.linalg.svd(layer.weight.data, full_matrices=False)
            layer.weight.data = (u[:, :2] * s[:2]) @ v[:2]
    outcome = run(model, [Factorize(keep=0.5, multiple=2)], context(model))
    assert outcome.steps[0].parity.relative < 1e-5
    assert state_bytes(outcome.model.module) < state_bytes(model.module)


def test_conv1d_is_factorized_as_linear_is():
    """GPT-2's weights are stored transposed; the same maps as nn.Linear get the same factors."""
    model = fresh("gpt2")
    factorize(model, method="svd", ranks="uniform")
    layer = model.module.get_submodule("transformer.h.0.mlp.c_fc")
    original = build("gpt2").module.get_submodule("transformer.h.0.mlp.c_fc").weight.T
    u, s, v = torch.linalg.svd(original.double(), full_matrices=False)
    rank = layer.reduce.out_features
    expected = ((u[:, :rank] * s[:rank]) @ v[:rank]).float()
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-4, atol=1e-6)
    assert layer.bias is layer.expand.bias


def test_uniform_ranks_are_those_of_the_formula():
    model = fresh("llama")
    result = factorize(model, method="svd", ranks="uniform", keep=0.8)
    for path, rank in result.record["ranks"].items():
        out, width = build("llama").module.get_submodule(path).weight.shape
        assert rank == int(0.8 * out * width / (out + width))


def test_ranks_are_multiples():
    ranks = factorize(fresh("bert"), multiple=4, keep=0.6).record["ranks"].values()
    assert ranks
    assert all(rank % 4 == 0 for rank in ranks)


def test_bytes_and_macs_are_budgets_too():
    for of in ("macs", "bytes"):
        model = fresh("bert")
        before, size = model.graph.macs[""], state_bytes(model.module)
        module = factorize(model, of=of, keep=0.5).module
        after = replace(model, module=module).graph.macs[""]
        assert after < 0.8 * before
        assert state_bytes(module) < size


def test_the_fisher_metric_protects_what_the_output_reads():
    """A layer whose output hardly matters gives its ranks to the others."""
    model = fresh("bert")
    model.module.get_submodule("encoder.layer.1.output.dense").weight.data *= 1e-3
    ranks = factorize(model, keep=0.7, scope=Scope(include=["encoder.layer.*"])).record["ranks"]
    mlps = {path: rank for path, rank in ranks.items() if path.endswith("intermediate.dense")}
    first = mlps.get("encoder.layer.0.intermediate.dense", 22)  # dense would be rank 22
    assert mlps["encoder.layer.1.intermediate.dense"] < first


def test_attentions_and_mlps_are_still_found():
    model = fresh("llama")
    module = factorize(model, method="svd", ranks="uniform", keep=0.5).module
    graph = replace(model, module=module).graph
    assert len(graph.attentions) == len(model.graph.attentions)
    assert len(graph.mlps) == len(model.graph.mlps)
    assert graph.attentions[0].query.path.endswith("q_proj.expand")


def test_training_and_generation_go_on():
    model = fresh("llama")
    module = factorize(model).module
    loss = module(**model.example, labels=model.example["input_ids"]).loss
    loss.backward()
    layers = [layer for layer in module.modules() if isinstance(layer, LowRankLinear)]
    assert layers
    assert all(layer.reduce.weight.grad.abs().sum() > 0 for layer in layers)
    prompt = model.example["input_ids"][:, :4]
    with_cache = module.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(
        with_cache, module.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    )


def test_factors_are_quantized_and_exported(tmp_path):
    model = build("bert")
    outcome = run(model, [Factorize(multiple=8, keep=0.6), Quantize()], context(model))
    compress.save(outcome.model, tmp_path / "model")
    back = compress.load(tmp_path / "model")
    artifact = export.Onnx().write(back, tmp_path / "onnx")
    assert artifact.facts["proof"]["without_rounding"]["relative"] < 1e-4
    assert len(outcome.steps[1].changes) > len(
        [weight for weight in model.graph.weights if weight.role == "body"]
    )


def test_seeds_repeat_and_differ():
    def ranks(seed: int) -> dict[str, int]:
        model = fresh("llama")
        settings = Factorize(multiple=1, keep=0.6)
        return settings.apply(model, replace(context(model), seed=seed)).record["ranks"]

    assert ranks(1) == ranks(1)


def test_padding_changes_nothing():
    model = fresh("bert")
    ids, mask = model.example["input_ids"], model.example["attention_mask"]
    padded = {
        "input_ids": torch.cat([ids, torch.full_like(ids, 7)], 1),
        "attention_mask": torch.cat([mask, torch.zeros_like(mask)], 1),
    }
    settings = Factorize(multiple=1, method="svd_llm", ranks="uniform")
    first = settings.apply(fresh("bert"), Context(calibration=[model.example])).module
    second = settings.apply(fresh("bert"), Context(calibration=[padded])).module
    name = "encoder.layer.0.attention.self.query"
    torch.testing.assert_close(first.get_submodule(name).weight, second.get_submodule(name).weight)


def test_heads_embeddings_and_ties_stay():
    model = fresh("llama")
    reasons = {skip.target: skip.why for skip in factorize(model).skips}
    assert reasons["model.embed_tokens"] == "an embedding; look-ups have no product to save"
    assert reasons["lm_head"] == "the output head; set `head: true` to include it"


def test_thin_layers_stay():
    model = fresh("llama")
    settings = Factorize(multiple=64)
    with pytest.raises(NothingToDo, match="has no rank of 64 or more that saves anything"):
        run(model, [settings], context(model))


def test_an_impossible_budget():
    model = fresh("bert")
    with pytest.raises(
        Unsuitable, match=r"`keep: 0.05` of the parameters cannot be reached: with ranks of 8, the smallest"
    ):
        factorize(model, keep=0.05, multiple=8)


def test_without_data():
    with pytest.raises(DataError, match="factorize: second moments needs calibration data"):
        Factorize().apply(fresh("bert"), Context())


def test_after_quantize():
    model = build("bert")
    quantized = run(model, [Quantize()], context(model)).model
    with pytest.raises(Unsuitable, match="quantized already, and integer weights have no factors"):
        run(quantized, [Factorize()], context(model))
