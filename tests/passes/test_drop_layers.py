"""Depth pruning on models of many kinds."""

from __future__ import annotations

import pytest
import torch

import compress
import export
from compress.compare import forward
from compress.errors import DataError, Unsuitable
from compress.model import Model
from compress.passes.base import Context
from compress.passes.drop_layers import DropLayers
from compress.passes.factorize import Factorize
from compress.passes.influence import block_influences, losses_without, macro_influences, run_distances
from compress.pipeline import run
from compress.progress import SILENT
from compress.scope import Scope
from tests.zoo import build, fresh


def with_identity(name: str, path: str) -> Model:
    """A model whose block at `path` gives what it reads: what it adds to the residual is zero."""
    model = fresh(name)
    for writer in model.graph.residual_writers:
        if writer.startswith(f"{path}."):
            for parameter in model.module.get_submodule(writer).parameters():
                parameter.data.zero_()
    return model


def context(model: Model) -> Context:
    return Context(calibration=[model.example])


@pytest.mark.parametrize("score", ["influence", "angular", "macro"])
def test_an_identity_goes_first_and_nothing_moves(score):
    model = with_identity("llama", "model.layers.1")
    outcome = run(model, [DropLayers(remove=1, score=score, protect=0)], context(model))
    assert outcome.steps[0].record == {"stack": "model.layers", "count": 3, "removed": [1]}
    assert outcome.steps[0].parity.relative < 1e-6


def test_scores_of_an_identity_are_zero():
    model = with_identity("llama", "model.layers.1")
    blocks = model.graph.stacks[0].blocks
    given = (model.module, blocks, [model.example])
    assert block_influences(*given, SILENT)[1] == pytest.approx(0, abs=1e-6)
    assert macro_influences(*given, SILENT)[1] == pytest.approx(0, abs=1e-6)
    assert run_distances(*given, 1, SILENT)[1] == pytest.approx(0, abs=1e-3)
    others = losses_without(*given, SILENT)
    whole = losses_without(*given[:1], blocks[1:2] + blocks[2:], [model.example], SILENT)[0]
    assert others[1] == pytest.approx(whole, rel=1e-5)


def test_perplexity_removes_what_the_loss_misses_least():
    model = fresh("llama")
    losses = losses_without(model.module, model.graph.stacks[0].blocks, [model.example], SILENT)
    outcome = run(model, [DropLayers(remove=1, score="perplexity", protect=0)], context(model))
    assert outcome.steps[0].record["removed"] == [losses.index(min(losses))]
    ids = model.example["input_ids"]
    module = outcome.model.module
    logits = module(**model.example).logits[:, :-1]
    kept = model.example["attention_mask"][:, 1:].bool()
    loss = torch.nn.functional.cross_entropy(logits[kept], ids[:, 1:][kept])
    assert float(loss.detach()) == pytest.approx(min(losses), rel=1e-5)


def test_influence_does_not_see_the_scale_of_the_stream():
    model = fresh("llama")
    blocks = model.graph.stacks[0].blocks
    before = block_influences(model.module, blocks, [model.example], SILENT)
    assert all(0 < one < 2 for one in before)
    assert block_influences(model.module, blocks, [model.example], SILENT) == before


def test_padding_and_first_tokens_do_not_count():
    model = fresh("llama")
    blocks = model.graph.stacks[0].blocks
    ids, mask = model.example["input_ids"].clone(), model.example["attention_mask"]
    before = block_influences(model.module, blocks, [model.example], SILENT)
    ids[mask == 0] = 7
    other = {**model.example, "input_ids": ids}
    assert block_influences(model.module, blocks, [other], SILENT) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "qwen3", "gemma3", "phi3", "vit", "dinov2"])
def test_every_kind_of_model_runs_on_with_fewer_blocks(name, tmp_path):
    model = build(name)
    outcome = run(model, [DropLayers(remove=1, protect=0)], context(model))
    stack = model.graph.stacks[0]
    assert len(outcome.model.graph.stacks[0].blocks) == len(stack.blocks) - 1
    compress.save(outcome.model, tmp_path / "model")
    back = compress.load(tmp_path / "model")
    for name, value in forward(outcome.model.module, model.example).items():
        assert torch.equal(forward(back.module, model.example)[name], value)


def test_transformers_itself_loads_the_checkpoint(tmp_path):
    import transformers

    model = build("llama")
    outcome = run(model, [DropLayers(remove=1, protect=0)], context(model))
    compress.save(outcome.model, tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = forward(outcome.model.module, model.example)["logits"]
    assert torch.equal(forward(plain, model.example)["logits"], expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generation_with_the_cache_is_generation_without(name):
    model = build(name)
    module = run(model, [DropLayers(remove=1, protect=0)], context(model)).model.module
    prompt = model.example["input_ids"][:1, :5]
    cached = module.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, module.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False))


def test_two_steps_are_restored_in_order(tmp_path):
    model = build("llama")
    passes = [DropLayers(remove=1, protect=0), DropLayers(remove=1, protect=0, score="macro")]
    outcome = run(model, passes, context(model))
    compress.save(outcome.model, tmp_path / "model")
    back = compress.load(tmp_path / "model")
    assert len(back.module.model.layers) == 1
    expected = forward(outcome.model.module, model.example)["logits"]
    assert torch.equal(forward(back.module, model.example)["logits"], expected)


def test_the_shortened_model_is_factorized_and_exported(tmp_path):
    model = build("llama")
    passes = [DropLayers(remove=2, protect=0), Factorize(multiple=1, method="svd", ranks="uniform")]
    outcome = run(model, passes, context(model))
    compress.save(outcome.model, tmp_path / "model")
    artifact = export.Onnx().write(compress.load(tmp_path / "model"), tmp_path / "onnx")
    assert artifact.parity.relative < 1e-4


def test_a_run_of_blocks():
    model = build("llama")
    outcome = run(model, [DropLayers(remove=2, score="angular", protect=0)], context(model))
    assert outcome.steps[0].record["removed"] in ([0, 1], [1, 2])


def test_the_ends_are_protected():
    model = build("llama")
    outcome = run(model, [DropLayers(remove=1)], context(model))
    assert outcome.steps[0].record["removed"] == [1]
    with pytest.raises(Unsuitable, match="`remove: 2` of the 3 blocks of `model.layers`: only 1 may go"):
        run(model, [DropLayers(remove=2)], context(model))


def test_two_stacks_need_a_choice():
    model = build("whisper")
    with pytest.raises(
        Unsuitable, match="works on one stack of blocks, and there are 2: `model.encoder.layers`"
    ):
        run(model, [DropLayers(remove=1, protect=0)], context(model))
    scope = Scope(include=["model.decoder.layers.*"])
    outcome = run(model, [DropLayers(remove=1, protect=0, scope=scope)], context(model))
    assert outcome.steps[0].record["stack"] == "model.decoder.layers"


def test_no_stack():
    model = build("llama")
    with pytest.raises(Unsuitable, match="`drop_layers` found no stack of repeated blocks in scope"):
        run(model, [DropLayers(remove=1, scope=Scope(include=["lm_head"]))], context(model))


def test_perplexity_needs_text():
    model = build("bert")
    with pytest.raises(Unsuitable, match="`score: perplexity` needs a model that writes text; the task is"):
        run(model, [DropLayers(remove=1, score="perplexity")], context(model))


def test_depth_comes_first():
    model = build("llama")
    passes = [Factorize(multiple=1, method="svd", ranks="uniform"), DropLayers(remove=1)]
    with pytest.raises(
        Unsuitable, match="`drop_layers` comes after `factorize`, whose changes are kept by block"
    ):
        run(model, passes, context(model))


def test_without_data():
    with pytest.raises(DataError, match="drop_layers: calibration data needs calibration data"):
        run(build("llama"), [DropLayers(remove=1)], Context())


def test_data_that_the_model_cannot_take():
    model = build("llama")
    bad = {**model.example, "input_ids": model.example["input_ids"] + 1000}
    with pytest.raises(
        DataError, match=r"cannot take calibration batch 1 \(input_ids \(2, 12\), attention_mask"
    ):
        run(model, [DropLayers(remove=1)], Context(calibration=[bad]))
