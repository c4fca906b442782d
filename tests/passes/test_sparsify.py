"""Pruned weights on models of many kinds: which become zero, and that they stay zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import compress
import export
from compress.compare import forward
from compress.errors import DataError, NothingToDo, RecipeError, Unsuitable
from compress.layers.linear import ScaledLinear
from compress.layers.quantized import QuantizedWeight
from compress.layers.sparse import SparseConv2d, SparseLinear, is_sparse
from compress.layers.unfolded import weight_matrix
from compress.model import Model
from compress.passes.base import Context, Pass, Result
from compress.passes.distill import Distill
from compress.passes.drop_layers import DropLayers
from compress.passes.factorize import Factorize
from compress.passes.fold_batch_norm import FoldBatchNorm
from compress.passes.group_queries import GroupQueries
from compress.passes.multi_branch import MultiBranch
from compress.passes.quantize import Quantize
from compress.passes.smooth import Smooth
from compress.passes.sparsify import Sparsify
from compress.pipeline import run, state_bytes
from compress.recipe import load_recipe
from compress.scope import Scope
from compress.testing import check_pass
from tests.test_contract import shaken
from tests.zoo import build, fresh, varied

NAMES = [
    "bert",
    "gpt2",
    "opt",
    "llama",
    "qwen3",
    "phi3",
    "t5",
    "whisper",
    "vit",
    "swin",
    "resnet",
    "convnext",
]
SCORES = ["sparsegpt", "wanda", "magnitude"]


def context(model: Model, teacher: Model | None = None) -> Context:
    data = varied(model, 6)
    return Context(calibration=data, training=data, teacher=teacher)


def sparsify(model: Model, **settings) -> Result:
    return Sparsify(**settings).apply(model, Context(calibration=[model.example]))


def layers(module: nn.Module) -> dict[str, nn.Module]:
    return {path: part for path, part in module.named_modules() if is_sparse(part)}


def zeros(module: nn.Module) -> dict[str, Tensor]:
    """Where the weights of sparse layers are zero, as (out, in)."""
    return {path: weight_matrix(layer) == 0 for path, layer in layers(module).items()}


def healed(model: Model, source: Model) -> Model:
    """`model`, taught by a teacher that differs from it in every weight."""
    passes = [Distill(steps=8, learning_rate=1e-4, weight_decay=0.1)]
    return run(model, passes, context(source, shaken(source))).model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def shares(module: nn.Module) -> list[float]:
    return [float(mask.double().mean()) for mask in zeros(module).values()]


@pytest.mark.parametrize(
    ("name", "score"),
    [*((name, "sparsegpt") for name in NAMES), *((name, "wanda") for name in ("gpt2", "swin", "resnet"))],
)
def test_every_kind_of_model_gets_its_share_of_zeros(name, score):
    model = fresh(name)
    result = sparsify(model, score=score)
    targets = [change.target for change in result.changes if change.what == "sparsified"]
    assert targets == result.record["sparse"]
    assert set(targets) == set(layers(result.module))
    body = [one for one in model.graph.weights if one.role == "body"]
    assert len(targets) >= len([one for one in body if one.kind == "linear"])
    assert shares(result.module) == pytest.approx([0.5] * len(targets), abs=0.03)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "resnet"])
def test_a_pattern_is_kept_along_the_inputs(name, score):
    module = sparsify(fresh(name), score=score, pattern="2:4").module
    assert layers(module)
    for mask in zeros(module).values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_of_convolutions_the_pattern_is_over_channels_at_each_place():
    module = sparsify(fresh("resnet"), pattern="1:4").module
    conv = next(one for one in layers(module).values() if one.kernel_size == (3, 3))
    groups = (conv.weight == 0).unflatten(1, (-1, 4))
    assert (groups.sum(2) == 3).all()


def test_the_bytes_stay_and_the_report_says_so():
    model = build("llama")
    (step,) = run(model, [Sparsify()], context(model)).steps
    assert step.bytes_after == step.bytes_before == state_bytes(model.module)
    first, last = step.changes[0], step.changes[-1]
    assert first.target == "model.layers.0.self_attn.q_proj"
    assert first.before == "Linear 60x48"
    assert first.after.startswith("50.0 % zeros, anywhere; ")
    assert first.after.endswith(" % of the output's energy lost")
    assert (last.target, last.what) == ("the model", "stored")
    assert last.after == "as many: 50.0 % of the numbers are zeros, and are stored like any other"


def test_the_errors_are_those_of_the_outputs():
    """Of the first map, whose inputs nothing before it has changed."""
    model = build("llama")
    path, data = "model.layers.0.self_attn.q_proj", context(model)
    outcome = run(model, [Sparsify(pattern="2:4")], data)
    seen: list[Tensor] = []
    layer = model.module.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for batch in varied(model, 6):
        forward(model.module, batch)
    hook.remove()
    x = torch.cat(seen).double()
    after = outcome.model.module.get_submodule(path).weight.detach().double()
    wanted, found = x @ layer.weight.detach().double().T, x @ after.T
    share = 100 * float((found - wanted).square().sum() / wanted.square().sum())
    assert f"as 2:4; {share:.2g} % of the output's energy lost" in outcome.steps[0].changes[0].after


def test_the_better_the_score_the_nearer_the_model():
    def lost(**settings) -> float:
        model = fresh("llama")
        module = Sparsify(**settings).apply(model, context(model)).module
        pairs = [
            [forward(one, batch)["logits"] for one in (module, build("llama").module)]
            for batch in varied(model, 6)
        ]
        return sum(float((found - wanted).square().sum()) for found, wanted in pairs)

    assert lost() < 0.9 * lost(score="magnitude")
    assert lost() < lost(sparsity=0.7) < lost(sparsity=0.9)


def test_conv1d_is_pruned_as_linear_is():
    """GPT-2's weights are stored transposed; the same maps as nn.Linear get the same weights."""

    def swapped() -> Model:
        model = fresh("gpt2")
        for path in [one.path for one in model.graph.weights if "transformer.h." in one.path]:
            old = model.module.get_submodule(path)
            new = nn.Linear(*old.weight.shape)
            new.weight.data, new.bias.data = old.weight.data.T.contiguous(), old.bias.data
            parent, _, leaf = path.rpartition(".")
            setattr(model.module.get_submodule(parent), leaf, new)
        return replace(model, module=model.module)

    for settings in ({"score": "wanda"}, {"pattern": "2:4"}):
        data = context(build("gpt2"))
        one, other = (Sparsify(**settings).apply(model, data).module for model in (fresh("gpt2"), swapped()))
        path = "transformer.h.0.mlp.c_fc"
        assert isinstance(other.get_submodule(path), SparseLinear)
        torch.testing.assert_close(
            weight_matrix(one.get_submodule(path)),
            weight_matrix(other.get_submodule(path)),
            rtol=1e-4,
            atol=1e-6,
        )


def test_padding_changes_nothing():
    model = build("bert")
    ids, mask = model.example["input_ids"], model.example["attention_mask"]
    padded = {
        "input_ids": torch.cat([ids, torch.full_like(ids, 7)], 1),
        "attention_mask": torch.cat([mask, torch.zeros_like(mask)], 1),
    }
    first, second = (
        Sparsify(score="wanda").apply(fresh("bert"), Context(calibration=[batch])).module
        for batch in (model.example, padded)
    )
    path = "encoder.layer.0.attention.self.query"
    assert torch.equal(first.get_submodule(path).weight, second.get_submodule(path).weight)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "resnet"])
def test_a_pattern_keeps_the_contract(name):
    model = build(name)
    check_pass(Sparsify(pattern="2:4", score="wanda"), model, Context(calibration=[model.example]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_zeros_stay_through_distillation(name):
    model = build(name)
    pruned = run(model, [Sparsify(pattern="2:4")], context(model)).model
    taught = healed(pruned, model)
    assert same(zeros(taught.module), zeros(pruned.module))
    path = next(iter(layers(pruned.module)))
    before, after = (weight_matrix(one.module.get_submodule(path)) for one in (pruned, taught))
    assert (before != after)[before != 0].double().mean() > 0.9


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_zeros_stay_through_quantization(name, tmp_path):
    model = build(name)
    outcome = run(model, [Sparsify(), Quantize()], context(model))
    pruned = run(model, [Sparsify()], context(model)).model.module
    quantized = {
        path: part for path, part in outcome.model.module.named_modules() if isinstance(part, QuantizedWeight)
    }
    assert quantized
    for path, layer in quantized.items():
        old = pruned.get_submodule(path)
        weight = old.weight if isinstance(old, SparseConv2d) else weight_matrix(old)
        assert not layer.integers[weight == 0].any()
    if name == "resnet":
        compress.save(outcome.model, tmp_path / "model")
        artifact = export.Onnx().write(compress.load(tmp_path / "model"), tmp_path / "onnx")
        assert artifact.facts["proof"]["without_rounding"]["relative"] < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "resnet"])
def test_it_comes_back_and_some_are_exported(name, tmp_path):
    model = build(name)
    pruned = run(model, [Sparsify(pattern="2:4")], context(model)).model
    compress.save(pruned, tmp_path / "model")
    back = compress.load(tmp_path / "model")
    assert same(zeros(back.module), zeros(pruned.module))
    outputs = forward(pruned.module, model.example), forward(back.module, model.example)
    assert all(torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[0])
    if name in ("gpt2", "resnet"):
        artifact = export.Onnx().write(back, tmp_path / "onnx")
        assert artifact.parity.relative < 1e-4


def test_generation_goes_on():
    module = sparsify(fresh("llama")).module
    prompt = build("llama").example["input_ids"][:, :4]
    cached = module.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, module.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


def test_more_can_be_pruned_later():
    """Prune, train, prune more: each step chooses anew."""
    model = build("llama")
    passes: list[Pass] = [Sparsify(sparsity=0.3), Distill(steps=4), Sparsify(sparsity=0.6), Distill(steps=4)]
    outcome = run(model, passes, context(model))
    assert shares(outcome.model.module) == pytest.approx(
        [0.6] * len(outcome.steps[0].record["sparse"]), abs=0.02
    )


def test_factors_are_pruned_and_pruned_maps_are_not_factorized():
    model = build("llama")
    outcome = run(model, [Factorize(multiple=4, keep=0.5), Sparsify(pattern="2:4")], context(model))
    assert any(path.endswith(".reduce") for path in layers(outcome.model.module))
    with pytest.raises(NothingToDo, match="its weight is sparse, and another form would fill its zeros"):
        run(model, [Sparsify(), Factorize()], context(model))


def test_new_heads_would_fill_zeros():
    model = build("llama")
    with pytest.raises(NothingToDo, match="q_proj`, is sparse, and new heads would fill its zeros"):
        run(model, [Sparsify(), GroupQueries(kv_heads=1, unhealed=True)], context(model, model))


def test_branches_would_fill_zeros():
    model = build("llama")
    pruned = run(model, [Sparsify(scope=Scope(exclude=["*.mlp.*"]))], context(model)).model
    step = run(pruned, [MultiBranch(steps=2, learning_rate=1e-5)], context(model, model)).steps[0]
    why = "its weight is sparse, and branches would fill its zeros; it trains without branches"
    assert {skip.target for skip in step.skips if skip.why == why} == set(layers(pruned.module))


def test_blocks_go_before():
    model = build("llama")
    with pytest.raises(Unsuitable, match="Put `drop_layers` before `sparsify`|comes after `sparsify`"):
        run(model, [Sparsify(), DropLayers(remove=1)], context(model))


@pytest.mark.parametrize("multiply", [False, True])
def test_smoothing_keeps_zeros_and_that_they_stay(multiply):
    model = build("bert")
    pruned = run(model, [Sparsify()], context(model)).model
    smoothed = run(pruned, [Smooth(alpha=0.8, multiply=multiply)], context(model)).model
    taught = healed(smoothed, model)
    scaled = [part for part in taught.module.modules() if isinstance(part, ScaledLinear)]
    assert bool(scaled) is multiply
    for path, mask in zeros(pruned.module).items():
        assert torch.equal(taught.module.get_submodule(path).weight == 0, mask)


def test_batch_norms_are_folded_into_sparse_convolutions():
    model = build("resnet")
    pruned = run(model, [Sparsify()], context(model)).model
    folded = run(pruned, [FoldBatchNorm()], context(model)).model
    assert same(zeros(folded.module), zeros(pruned.module))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.module.modules())


def test_reasons_for_what_stays():
    reasons = {skip.target: skip.why for skip in sparsify(fresh("llama"), pattern="5:7", block=7).skips}
    assert reasons["model.embed_tokens"] == "an embedding; look-ups have no product to save"
    assert reasons["lm_head"] == "the output head; set `head: true` to include it"
    assert reasons["model.layers.0.self_attn.q_proj"] == "its 48 inputs are no multiple of 7"
    stem = {skip.target: skip.why for skip in sparsify(fresh("resnet"), pattern="2:4").skips}
    assert "its 3 inputs are no multiple of 4" in stem.values()
    grouped = {skip.why for skip in sparsify(fresh("convnext")).skips}
    assert "a convolution in 8 groups" in grouped


def test_the_head_and_a_scope():
    result = sparsify(fresh("llama"), head=True, scope=Scope(include=["lm_head", "model.layers.1.*"]))
    assert "lm_head" in result.record["sparse"]
    assert not any(path.startswith("model.layers.0.") for path in result.record["sparse"])
    tied = {skip.target: skip.why for skip in sparsify(fresh("gpt2"), head=True).skips}
    assert tied["lm_head"] == "its weight is tied with transformer.wte.weight"


def test_weights_that_read_zeros_stay():
    model = fresh("llama")
    model.module.model.layers[1].post_attention_layernorm.weight.data.zero_()
    result = sparsify(model)
    reasons = {skip.target: skip.why for skip in result.skips}
    for name in ("gate_proj", "up_proj", "down_proj"):
        path = f"model.layers.1.mlp.{name}"
        assert reasons[path] == "reads nothing but zeros in the calibration data, or nothing"
        assert path not in result.record["sparse"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.5}, "says how many zeros there are; leave `sparsity` out"),
        ({"pattern": "4:4"}, "keeps 4 of 4, and prunes none"),
        ({"pattern": "4:2"}, "keeps 4 of 2, and prunes none"),
        ({"pattern": "2:6"}, "`block: 128` is no multiple of the 6 of"),
        ({"pattern": "half"}, "String should match pattern"),
        ({"pattern": 124}, 'write it in quotes, as "2:4"; without them YAML reads the number 124'),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go(settings, message):
    with pytest.raises(ValidationError, match=message):
        Sparsify(**settings)


def test_a_pattern_without_quotes_in_a_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = "summary: a\nmodel: {task: text-generation}\npasses:\n  - {use: sparsify, pattern: PATTERN}\n"
    file.write_text(text.replace("PATTERN", '"2:4"'))
    assert load_recipe(file).passes == (Sparsify(pattern="2:4"),)
    file.write_text(text.replace("PATTERN", "2:4"))
    with pytest.raises(RecipeError, match="write it in quotes"):
        load_recipe(file)


def test_without_data():
    with pytest.raises(DataError, match="sparsify needs calibration data, and there is none"):
        Sparsify().apply(fresh("bert"), Context())


def test_after_quantize():
    model = build("bert")
    quantized = run(model, [Quantize()], context(model)).model
    with pytest.raises(Unsuitable, match="quantized already, and its integer weights cannot be pruned"):
        run(quantized, [Sparsify()], context(model))
