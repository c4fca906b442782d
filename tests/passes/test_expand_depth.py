"""A learngene: fitted, expanded, trained, stored once, and refused where it does not serve."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers as tf

import compress
import export
from compress.checkpoint import load, save
from compress.compare import forward
from compress.errors import NothingToDo, Unsuitable
from compress.layers.learngene import gene_of
from compress.model import Model
from compress.passes.base import Context
from compress.passes.distill import Distill
from compress.passes.drop_layers import DropLayers
from compress.passes.expand_depth import ExpandDepth
from compress.passes.factorize import Factorize
from compress.passes.fuse_layers import FuseLayers
from compress.passes.quantize import Quantize
from compress.passes.smooth import Smooth
from compress.pipeline import run
from compress.scope import Scope
from tests.zoo import build

GENE = ExpandDepth(unhealed=True)
PLAIN = ExpandDepth(unhealed=True, form="plain")


def gene(depth: int | None = None) -> ExpandDepth:
    return ExpandDepth(unhealed=True, depth=depth)


def linear(name: str, count: int = 3) -> Model:
    """A model whose weights lie on a line: those of block l of L are `a + l / L * b`."""
    model = build(name)
    module = copy.deepcopy(model.module)
    blocks = [module.get_submodule(path) for path in model.graph.stacks[0].blocks]
    torch.manual_seed(0)
    for name, first in blocks[0].named_parameters():
        slope = 0.05 * torch.randn_like(first)
        base = first.detach().clone()
        for place, block in enumerate(blocks):
            block.get_parameter(name).data = base + place / count * slope
    return replace(model, module=module)


def logits(module, model: Model) -> torch.Tensor:
    return next(iter(forward(module, model.example).values()))


@pytest.mark.parametrize("form", ["gene", "plain"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_a_linear_stack_is_recovered(name, form):
    model = linear(name)
    outcome = run(model, [ExpandDepth(form=form, unhealed=True)])
    assert outcome.steps[0].parity.relative < 1e-5
    path = model.graph.stacks[0].path
    for change in outcome.steps[0].changes:
        assert change.target.startswith(f"{path}.*.")
        assert "R^2 1.0000" in change.after


def test_a_poor_fit_is_said_for_each_tensor():
    model = build("llama")
    (step,) = run(model, [gene(4)]).steps
    said = {change.target: change for change in step.changes}
    assert len(said) == len(list(model.module.model.layers[0].parameters()))
    change = said["model.layers.*.mlp.up_proj.weight"]
    assert change.before == "3 tensors 88x48"
    assert change.after.startswith("2 for 4 blocks, R^2 0.4")
    assert change.after.endswith("% of the energy lost")


def test_one_block_is_the_base():
    model = linear("llama")
    first = model.module.model.layers[0].mlp.up_proj.weight
    for form in ("gene", "plain"):
        outcome = run(model, [ExpandDepth(depth=1, form=form, unhealed=True)])
        (block,) = outcome.model.module.model.layers
        torch.testing.assert_close(block.mlp.up_proj.weight, first)


def test_a_gene_is_stored_once(tmp_path):
    config = tf.LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=128,
        tie_word_embeddings=True,
    )
    module = tf.LlamaForCausalLM(config).eval()
    model = Model(module, {"input_ids": torch.randint(3, 40, (2, 9))}, "text-generation")
    (step,) = run(model, [GENE]).steps
    in_blocks = sum(4 * one.numel() for one in module.model.layers.parameters())
    assert step.bytes_before - step.bytes_after == pytest.approx(in_blocks * (1 - 2 / 8), rel=1e-6)
    for settings, share in ((GENE, 2 / 8), (gene(16), 2 / 8)):
        folder = save(run(model, [settings]).model, tmp_path / str(settings.depth))
        rest = step.bytes_before - in_blocks
        size = (folder / "model.safetensors").stat().st_size
        header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") + 8
        assert size - header - rest == pytest.approx(in_blocks * share, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "gemma3"])
@pytest.mark.parametrize("form", ["gene", "plain"])
@pytest.mark.parametrize("depth", [2, 5])
def test_another_depth_has_blocks_of_the_same_shapes_and_is_loaded_bit_for_bit(name, form, depth, tmp_path):
    model = build(name)
    outcome = run(model, [ExpandDepth(depth=depth, form=form, unhealed=True)])
    path = model.graph.stacks[0].path
    (stack,) = [stack for stack in outcome.model.graph.stacks if stack.path == path]
    assert len(stack.blocks) == depth
    before = {key: one.shape for key, one in model.module.get_submodule(f"{path}.0").named_parameters()}
    for block in compress.plain.plain_copy(outcome.model.module).get_submodule(path):
        assert {key: one.shape for key, one in block.named_parameters()} == before
    folder = save(outcome.model, tmp_path / "model")
    expected = logits(outcome.model.module, model)
    for back in (load(folder), load(folder, skeleton=copy.deepcopy(model.module))):
        assert torch.equal(logits(back.module, model), expected)
        assert bool(gene_of(back.module.get_submodule(f"{path}.{depth - 1}"))) == (form == "gene")


def test_a_loaded_gene_is_one_again(tmp_path):
    folder = save(run(build("llama"), [gene(6)]).model, tmp_path / "model")
    layers = load(folder).module.model.layers
    count = len(list(layers[0].parameters()))
    assert len(list(layers.parameters())) == count
    assert len(json.loads((folder / "compress.json").read_text())["aliases"]) == 5 * count


def test_transformers_itself_loads_the_plain_form(tmp_path):
    model = build("llama")
    outcome = run(model, [ExpandDepth(depth=5, form="plain", unhealed=True)])
    save(outcome.model, tmp_path / "model")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(plain, model), logits(outcome.model.module, model))


@pytest.mark.parametrize("form", ["gene", "plain"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_the_cache_is_generation_without(name, depth, form):
    model = build(name)
    module = run(model, [ExpandDepth(depth=depth, form=form, unhealed=True)]).model.module
    prompt = model.example["input_ids"][:1, :5]
    cached = module.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, module.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False))


def test_a_gene_is_expanded_again_without_a_fit(tmp_path):
    model = build("llama")
    once = run(model, [gene()]).model
    deeper = run(once, [gene(4)]).model
    assert torch.equal(logits(deeper.module, model), logits(run(model, [gene(4)]).model.module, model))
    outcome = run(deeper, [gene(3)])
    assert [(one.target, one.what, one.before, one.after) for one in outcome.steps[0].changes] == [
        ("model.layers", "expanded", "gene with 4 blocks", "gene with 3 blocks")
    ]
    back = outcome.model
    assert torch.equal(logits(back.module, model), logits(once.module, model))
    save(back, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model").module, model), logits(once.module, model))


def test_plain_at_the_same_depth_is_the_same_function_and_owes_nothing():
    model = run(build("llama"), [gene(4)]).model
    expected = logits(model.module, model)
    outcome = run(model, [ExpandDepth(form="plain")])
    assert torch.equal(logits(outcome.model.module, model), expected)
    assert not gene_of(outcome.model.module.model.layers[0])
    # The caller's model, which shares classes with the copy, computes on.
    assert torch.equal(logits(model.module, model), expected)
    assert gene_of(model.module.model.layers[0])


def test_a_gene_of_that_depth_has_nothing_to_do():
    model = run(build("llama"), [gene()]).model
    with pytest.raises(NothingToDo, match="It skipped model.layers: it is a gene with 3 blocks already"):
        run(model, [gene()])


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_distill_trains_the_gene(name):
    model = build(name)
    context = Context(training=[model.example])
    outcome = run(model, [ExpandDepth(), Distill(steps=40, learning_rate=1e-3)], context)
    change = outcome.steps[1].changes[0]
    before, after = (float(said.split()[1]) for said in (change.before, change.after))
    assert after < 0.8 * before
    path = model.graph.stacks[0].path
    fitted = gene_of(run(model, [GENE]).model.module.get_submodule(f"{path}.0"))
    first, last = (gene_of(outcome.model.module.get_submodule(f"{path}.{place}")) for place in (0, 2))
    for key, line in first.items():
        assert line.base is last[key].base
        assert line.slope is last[key].slope
    assert any(not torch.equal(line.slope, fitted[key].slope) for key, line in first.items())
    assert any(not torch.equal(line.base, fitted[key].base) for key, line in first.items())


@pytest.mark.parametrize("settings", [gene(2), ExpandDepth(depth=2, form="plain", unhealed=True)])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_both_forms_are_exported(name, settings, tmp_path):
    model = run(build(name), [settings]).model
    artifact = export.Onnx().write(model, tmp_path / "onnx")
    assert artifact.parity.relative < 1e-4


def test_the_plain_form_goes_on_to_other_passes(tmp_path):
    model = build("llama")
    context = Context(calibration=[model.example])
    passes = [gene(5), PLAIN, DropLayers(remove=1, protect=0), Smooth(), Quantize()]
    outcome = run(model, passes, context)
    save(outcome.model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model").module, model), logits(outcome.model.module, model))


@pytest.mark.parametrize(
    "settings",
    [
        DropLayers(remove=1, protect=0),
        Factorize(multiple=1, method="svd", ranks="uniform"),
        FuseLayers(remove=1, steps=1),
        Quantize(),
        Smooth(),
    ],
)
def test_passes_that_change_weights_ask_for_the_plain_form(settings):
    model = run(build("llama"), [GENE]).model
    context = Context(calibration=[model.example], training=[model.example])
    with pytest.raises(
        Unsuitable, match="is computed from other tensors.*\nPut `{use: expand_depth, form: plain}`"
    ):
        run(model, [settings], context)


def test_growing_after_shrinking_is_restored(tmp_path):
    model = build("llama")
    passes = [DropLayers(remove=1, protect=0), ExpandDepth(depth=7, unhealed=True)]
    outcome = run(model, passes, Context(calibration=[model.example]))
    save(outcome.model, tmp_path / "model")
    expected = logits(outcome.model.module, model)
    assert torch.equal(logits(load(tmp_path / "model").module, model), expected)
    again = load(tmp_path / "model", skeleton=copy.deepcopy(model.module))
    assert torch.equal(logits(again.module, model), expected)


def test_an_unhealed_fit_is_refused_before_any_work():
    model = build("llama")
    said = (
        "The pass `expand_depth` gives blocks that were not trained, or not at this depth, and no pass that trains "
        "comes after it.\nPut one after it, such as `distill`, or set `unhealed: true` to take them as they are."
    )
    with pytest.raises(Unsuitable) as caught:
        run(replace(model, module=torch.nn.Identity()), [ExpandDepth()])
    assert str(caught.value) == said
    with pytest.raises(Unsuitable, match="gives blocks that were not trained"):
        run(model, [Distill(), ExpandDepth()])


@pytest.mark.parametrize(
    ("passes", "owed"),
    [
        ([GENE], None),
        ([ExpandDepth(), Distill()], None),
        ([ExpandDepth(), Distill(), ExpandDepth(form="plain")], None),
        ([ExpandDepth(depth=4), Distill(), ExpandDepth(depth=4, form="plain")], None),
        ([ExpandDepth(), Distill(), ExpandDepth(depth=4)], 2),
        ([ExpandDepth(form="plain"), Distill(), ExpandDepth()], 2),
        ([ExpandDepth(), Distill(), ExpandDepth(form="plain", scope=Scope(include=["decoder.*"]))], 2),
        ([Smooth(), ExpandDepth(), Quantize()], 1),
    ],
)
def test_what_must_be_trained(passes, owed):
    from compress.passes.base import unpaid

    debt = unpaid(passes)
    assert (debt.place if debt else None) == owed


def test_blocks_of_unequal_shapes():
    model = build("llama")
    module = copy.deepcopy(model.module)
    mlp = module.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(48, 80, bias=False) for _ in range(2))
    mlp.down_proj = torch.nn.Linear(80, 48, bias=False)
    with pytest.raises(
        Unsuitable,
        match="not of equal shapes: `mlp.gate_proj.weight` is 88x48 in `model.layers.0` and 80x48 in `model.layers.2`",
    ):
        run(replace(model, module=module.eval()), [GENE])


def test_a_first_block_with_more_in_it():
    with pytest.raises(
        Unsuitable, match="relative_attention_bias.weight` is .* in `encoder.block.0` and missing in"
    ):
        run(build("t5"), [ExpandDepth(scope=Scope(include=["encoder.block.*"]), unhealed=True)])


def test_two_stacks_take_a_step_each(tmp_path):
    model = build("whisper")
    with pytest.raises(Unsuitable, match="works on one stack of blocks, and there are 2"):
        run(model, [GENE])
    passes = [
        ExpandDepth(scope=Scope(include=[f"model.{tower}.layers.*"]), depth=depth, unhealed=True)
        for tower, depth in (("encoder", 2), ("decoder", 5))
    ]
    outcome = run(model, passes)
    save(outcome.model, tmp_path / "model")
    back = load(tmp_path / "model").module
    assert (len(back.model.encoder.layers), len(back.model.decoder.layers)) == (2, 5)
    assert torch.equal(logits(back, model), logits(outcome.model.module, model))


def test_a_part_of_a_stack():
    with pytest.raises(
        Unsuitable, match="A gene makes whole blocks, and `model.layers.1` is not in the scope"
    ):
        run(build("llama"), [ExpandDepth(scope=Scope(exclude=["model.layers.1*"]), unhealed=True)])


def test_buffers_that_differ():
    model = build("llama")
    module = copy.deepcopy(model.module)
    for place, block in enumerate(module.model.layers):
        block.register_buffer("place", torch.tensor(place))
    with pytest.raises(Unsuitable, match="The buffer `place` differs between the blocks"):
        run(replace(model, module=module), [GENE])


def test_a_tensor_that_others_share():
    model = build("llama")
    module = copy.deepcopy(model.module)
    module.model.layers[1].mlp.up_proj.weight = module.model.layers[0].mlp.up_proj.weight
    with pytest.raises(Unsuitable, match="shares its tensor with model.layers.1.mlp.up_proj.weight"):
        run(replace(model, module=module), [GENE])


def test_it_comes_before_passes_that_note_blocks():
    model = build("llama")
    with pytest.raises(
        Unsuitable, match="`expand_depth` comes after `quantize`, whose changes are kept by block"
    ):
        run(model, [Quantize(), GENE], Context(calibration=[model.example]))
