"""Branches begin as nothing, train, and go into the layers beside them; what is merged is what was trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import compress
import export
from benchmarks.digits import Digits, read_digits
from compress.checkpoint import load, save
from compress.compare import forward
from compress.errors import NothingToDo, Unproved, Unsuitable
from compress.layers.branches import EPS, Branched, groups_for
from compress.model import Model
from compress.passes.base import Context
from compress.passes.drop_layers import DropLayers
from compress.passes.factorize import Factorize
from compress.passes.multi_branch import MultiBranch, branch_out, branched_in, measure, merge
from compress.passes.quantize import Quantize
from compress.pipeline import run
from compress.scope import Scope
from export.runners import OnnxRunner
from tests import zoo


def layers(biased: bool = True) -> dict[str, tuple[nn.Module, Tensor]]:
    """A layer of each kind that can branch, with an input."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "linear": (nn.Linear(8, 12, biased), torch.randn(3, 5, 8)),
        "square": (nn.Linear(8, 8, biased), torch.randn(3, 5, 8)),
        "conv": (nn.Conv2d(8, 12, 1, stride=2, bias=biased), torch.randn(3, 8, 6, 4)),
    }
    return made | ({"Conv1D": (Conv1D(12, 8), torch.randn(3, 5, 8))} if biased else {})


def stirred(plain: nn.Module, groups: tuple[int, ...] = (1, 2, 4)) -> Branched:
    """Branches whose every parameter and statistic is random, biases too."""
    layer = Branched(copy.deepcopy(plain), groups_for(plain, groups)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for branch in layer.branches:
            branch.variance.uniform_(0.5, 2)
            if branch.shift is not None:
                branch.mean.normal_()
    return layer.eval()


def written_out(layer: Branched, x: Tensor) -> Tensor:
    """What `layer` gives by torch's own grouped convolutions and batch norms, one branch after the other."""
    plain = layer.plain
    places = x if isinstance(plain, nn.Conv2d) else x.movedim(-1, 1)[..., None]
    made = plain(x)
    made = made if isinstance(plain, nn.Conv2d) else made.movedim(-1, 1)[..., None]
    stride = plain.stride if isinstance(plain, nn.Conv2d) else 1
    for branch in layer.branches:
        response = places
        if branch.weight is not None:
            kernel = branch.weight[..., None, None]
            response = nn.functional.conv2d(places, kernel, stride=stride, groups=branch.groups)
        made = made + nn.functional.batch_norm(
            response, branch.mean, branch.variance, branch.scale, branch.shift, eps=EPS
        )
    return made if isinstance(plain, nn.Conv2d) else made[..., 0].movedim(1, -1)


@pytest.mark.parametrize("biased", [True, False])
def test_branches_are_grouped_convolutions_and_batch_norms_and_merge_exactly(biased: bool) -> None:
    for name, (plain, x) in layers(biased).items():
        layer, x = stirred(plain), x.double()
        expected = written_out(layer, x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10, msg=name)
        merged = layer.merge()
        assert type(merged) is type(plain)
        assert sum(one.numel() for one in merged.parameters()) == sum(
            one.numel() for one in plain.parameters()
        )
        torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10, msg=name)
        assert float((expected - plain.double()(x)).detach().abs().max()) > 0.1


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_merging_in_the_type_of_the_layer(kind: torch.dtype) -> None:
    plain = nn.Linear(8, 12)
    layer, x = stirred(plain), torch.randn(4, 5, 8)
    expected = written_out(layer, x.double())
    layer = layer.float()
    layer.plain.to(kind)
    assert layer(x.to(kind)).dtype == kind
    tolerance = 1e-5 if kind == torch.float32 else 1e-2
    given = layer.merge()(x.to(kind)).double()
    assert float(((given - expected).abs().max() / expected.abs().max()).detach()) < tolerance


def test_a_new_branch_changes_no_bit() -> None:
    for plain, x in layers().values():
        expected = plain(x)
        assert torch.equal(Branched(plain, groups_for(plain, (1, 2, 4)))(x), expected)


def test_groups_that_do_not_divide_are_left_out() -> None:
    assert groups_for(nn.Linear(8, 12), (1, 2, 3, 4, 8)) == (1, 2, 4)
    assert groups_for(nn.Linear(6, 6), (3, 5)) == (3, 0)


def test_factors_move_first_and_matrices_after_them() -> None:
    layer = Branched(nn.Linear(8, 8), (2, 0))
    layer(torch.randn(4, 8)).square().sum().backward()
    branch = layer.branches[0]
    assert float(branch.scale.grad.abs().min()) > 0
    assert not branch.weight.grad.any()
    with torch.no_grad():
        branch.scale.add_(0.1)
    layer(torch.randn(4, 8)).square().sum().backward()
    assert branch.weight.grad.any()


def test_statistics_are_pooled_over_all_places_without_padding() -> None:
    model = zoo.build("bert")
    module = copy.deepcopy(model.module)
    path = "encoder.layer.1.intermediate.dense"
    new = branch_out(module, {path: (1, 2)})
    batches = [model.example, {name: value[:1, :7] for name, value in model.example.items()}]
    measure(module, new, batches, Context())
    seen = []
    for batch in batches:
        states = module(**batch, output_hidden_states=True)
        hook = model.module.get_submodule(path).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        model.module(**batch)
        hook.remove()
        seen[-1] = seen[-1][batch["attention_mask"].bool()]
        assert states is not None
    rows = torch.cat(seen)
    assert len(rows) == 12 + 9 + 7
    for branch in new[path].branches:
        response = rows @ branch.matrix().T
        torch.testing.assert_close(branch.mean, response.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(branch.variance, response.var(0, correction=0), rtol=1e-4, atol=1e-6)


def shaken(model: Model) -> Model:
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return replace(model, module=module)


def taught(model: Model, **settings) -> compress.Outcome:
    context = Context(training=[model.example], teacher=shaken(model))
    return run(model, [MultiBranch(**{"steps": 8, "learning_rate": 1e-5, **settings})], context)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "resnet"])
def test_models_have_the_form_they_had(name: str) -> None:
    model = zoo.build(name)
    outcome = taught(model)
    found, before = (one.module.state_dict() for one in (outcome.model, model))
    assert {key: one.shape for key, one in found.items()} == {key: one.shape for key, one in before.items()}
    assert branched_in(outcome.model.module) == {}
    (step,) = outcome.steps
    assert step.bytes_after == step.bytes_before
    (change,) = step.changes
    assert ", with branches beside " in change.what
    assert float(change.after.split()[1]) < float(change.before.split()[1])


def test_branches_that_stay_are_saved_exported_and_merged_by_another_run(tmp_path: Path) -> None:
    model = zoo.build("vit")
    scope = Scope(include=("*.layers.1.mlp.*", "*.layers.1.attention.o_proj"))
    outcome = taught(model, merge=False, scope=scope)
    paths = list(branched_in(outcome.model.module))
    assert [change.target for change in outcome.steps[0].changes[1:]] == paths
    assert [change.after for change in outcome.steps[0].changes[1:]] == [
        "with 4 branches: 1 block, 2 blocks, 4 blocks, identity",
        "with 3 branches: 1 block, 2 blocks, 4 blocks",
        "with 3 branches: 1 block, 2 blocks, 4 blocks",
    ]
    save(outcome.model, tmp_path / "model")
    back = load(tmp_path / "model")
    expected = forward(outcome.model.module, model.example)
    assert torch.equal(forward(back.module, model.example)["logits"], expected["logits"])

    export.Onnx().write(outcome.model, tmp_path / "onnx")
    given = OnnxRunner(tmp_path / "onnx")(**model.example).logits
    torch.testing.assert_close(given, expected["logits"], rtol=1e-4, atol=1e-5)

    context = Context(training=[model.example], teacher=shaken(model))
    again = run(back, [MultiBranch(steps=4, learning_rate=1e-5, scope=scope)], context)
    assert f"with branches beside {len(paths)} layers" in again.steps[0].changes[0].what
    save(again.model, tmp_path / "again")
    last = load(tmp_path / "again")
    assert branched_in(last.module) == {}
    wanted = forward(again.model.module, model.example)["logits"]
    assert torch.equal(forward(last.module, model.example)["logits"], wanted)

    module = copy.deepcopy(outcome.model.module)
    merge(module)
    torch.testing.assert_close(forward(module, model.example), expected, rtol=1e-5, atol=1e-6)
    moved = {
        path: not torch.equal(module.get_submodule(path).weight, last.module.get_submodule(path).weight)
        for path in paths
    }
    assert all(moved.values()), moved


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits()


def test_a_model_that_lost_blocks_reads_digits_again(digits: Digits) -> None:
    context = Context(calibration=digits.batches, training=digits.batches, teacher=digits.model)
    worse = run(digits.model, [DropLayers(remove=2)], context).model
    outcome = run(worse, [MultiBranch(steps=60, learning_rate=1e-3)], context)
    (change,) = outcome.steps[0].changes
    assert float(change.after.split()[1]) < float(change.before.split()[1]) / 4
    assert digits.accuracy(worse) < 0.8 < 0.9 < digits.accuracy(outcome.model)


def test_factors_of_a_factorized_layer_get_branches() -> None:
    model = zoo.build("bert")
    context = Context(calibration=[model.example], training=[model.example])
    passes = [Factorize(multiple=1, keep=0.6), MultiBranch(steps=10, learning_rate=3e-5)]
    (_, step) = run(model, passes, context).steps
    assert not any(skip.why.startswith("LowRank") for skip in step.skips)


def test_what_gets_no_branches_is_told() -> None:
    reasons = {skip.target: skip.why for skip in taught(zoo.build("gpt2")).steps[0].skips}
    assert reasons["transformer.wte"] == "an embedding has no product to put branches beside"
    assert reasons["lm_head"] == "the output head trains without branches"
    reasons = {skip.target: skip.why for skip in taught(zoo.build("vit")).steps[0].skips}
    path = "vit.embeddings.patch_embeddings.projection"
    assert reasons[path] == "Conv2d is no plain linear map or 1x1 convolution; it trains without branches"


def test_scope_and_groups_say_where() -> None:
    model = zoo.build("vit")
    with pytest.raises(
        NothingToDo, match=r"vit.layers.0.mlp.fc1: none of \[7\] cuts both of its sides evenly"
    ):
        taught(model, groups=(7,), scope=Scope(include=("*.mlp.*",)))
    scope = Scope(include=("*.layers.0.*",))
    module = taught(model, scope=scope).model.module
    for (name, value), other in zip(module.named_parameters(), model.module.parameters(), strict=True):
        assert torch.equal(value, other) != (name.rpartition(".")[0] in scope), name


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn() -> None:
    model = zoo.build("vit")
    with pytest.raises(NothingToDo, match="answers as its teacher does already; put `multi_branch` after"):
        run(model, [MultiBranch()], Context(training=[model.example]))


def test_a_loss_that_does_not_fall_is_refused() -> None:
    with pytest.raises(Unproved, match="`multi_branch` did not lower its loss"):
        taught(zoo.build("vit"), learning_rate=0.9)


def test_a_quantized_model_is_refused() -> None:
    model = zoo.build("vit")
    context = Context(calibration=[model.example], training=[model.example], teacher=shaken(model))
    with pytest.raises(Unsuitable, match="integer weights cannot take branches in"):
        run(model, [Quantize(), MultiBranch()], context)
