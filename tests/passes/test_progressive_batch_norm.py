"""Norms that fade into batch norms as a model trains, and go into the weights beside them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import export
from compress.checkpoint import load, save
from compress.errors import DataError, NothingToDo, Unproved, Unsuitable
from compress.layers.progressive_norm import ProgressiveNorm, RepBatchNorm, Rescaling
from compress.model import Inputs, Model
from compress.outputs import forward
from compress.passes.base import Context
from compress.passes.calibration import tokens_of
from compress.passes.fading import fading_norms, settle
from compress.passes.norm_places import replaceable_norms
from compress.passes.progressive_batch_norm import ProgressiveBatchNorm
from compress.passes.quantize import Quantize
from compress.pipeline import Outcome, run
from compress.scope import Scope
from tests.normed import shake
from tests.zoo import build

LAYERS = (nn.LayerNorm, ProgressiveNorm, RepBatchNorm, Rescaling)


def kinds(module: nn.Module) -> Counter[str]:
    """How many norms there are, and layers that stand where norms were, by class."""
    return Counter(
        type(part).__name__
        for part in module.modules()
        if isinstance(part, LAYERS) or type(part).__name__.endswith("RMSNorm")
    )


def shaken(name: str, kind: torch.dtype = torch.float64) -> Model:
    """A model of the zoo with biases that are not zero."""
    known = build(name)
    module = copy.deepcopy(known.module)
    torch.manual_seed(0)
    shake(module)
    floats = {key: one.to(kind) if one.is_floating_point() else one for key, one in known.example.items()}
    return replace(known, module=module.to(kind), example=floats)


def taught(model: Model, batches: Sequence[Inputs] = (), **settings) -> Outcome:
    chosen = ProgressiveBatchNorm(**{"steps": 6, "learning_rate": 1e-3, **settings})
    return run(model, [chosen], Context(training=batches or [model.example]))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest value of its output."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).abs().max() / one.abs().max()) for name, one in expected.items())


# A model that has learnt something


class Digits:
    """A small vision transformer that reads digits, and the digits."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        torch.manual_seed(0)
        order = torch.randperm(len(digits.images))
        self.images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
        self.classes = torch.tensor(digits.target)[order]
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10)
        module = ViTForImageClassification(config)
        optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
        for batch, classes in zip(*(all_.split(64) for all_ in self._rounds(10)), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(pixel_values=batch).logits, classes).backward()
            optimizer.step()
        self.model = Model(module.eval(), {"pixel_values": self.images[:4]}, "image-classification")
        self.batches = [{"pixel_values": batch} for batch in self.images[:1408].split(64)]

    def _rounds(self, count: int) -> tuple[Tensor, Tensor]:
        order = torch.cat([torch.randperm(1400) for _ in range(count)])
        return self.images[order], self.classes[order]

    def right(self, module: nn.Module) -> float:
        """The share of the last 389 digits that `module` reads, in per cent."""
        answers = forward(module, {"pixel_values": self.images[1408:]})["logits"].argmax(-1)
        return 100 * float((answers == self.classes[1408:]).double().mean())


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def normless(digits: Digits) -> Outcome:
    return taught(digits.model, digits.batches, steps=120, learning_rate=2e-3)


def test_it_reads_digits_as_well_without_norms(digits: Digits, normless: Outcome) -> None:
    before, after = (digits.right(one.module) for one in (digits.model, normless.model))
    assert before > 75
    assert after > before - 2
    assert kinds(digits.model.module) == {"LayerNorm": 5}
    assert kinds(normless.model.module) == {}


def test_it_says_what_it_did(normless: Outcome) -> None:
    (step,) = normless.steps
    learnt, *changes = step.changes
    assert (learnt.target, learnt.what) == ("the model", "trained on logits and hidden")
    assert learnt.before.endswith(" with fitted batch norms")
    losses = [float(said.split()[1]) for said in (learnt.before, learnt.after)]
    assert losses[1] < losses[0] / 2
    assert {change.what for change in changes} == {"folded"}
    projections = ", ".join(f"vit.layers.0.attention.{name}_proj" for name in "qkv")
    assert changes[0].after == f"in {projections}"
    assert (changes[-1].target, changes[-1].after) == ("vit.layernorm", "in classifier")
    assert changes[-1].before == "LayerNorm of 32 features"


def test_no_norm_is_left_in_the_exported_graph(digits: Digits, normless: Outcome, tmp_path: Path) -> None:
    found = []
    for name, model in (("before", digits.model), ("after", normless.model)):
        export.Onnx().write(model, tmp_path / name)  # proves the graph in ONNX Runtime
        graph = onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph
        found.append(Counter(node.op_type for node in graph.node))
    assert [one["LayerNormalization"] for one in found] == [5, 0]
    assert [one[kind] for one in found for kind in ("ReduceMean", "BatchNormalization", "Sqrt")] == [0] * 6
    # Without norms, the biases of the four residual writers go into what reads them, and the class token is chosen
    # from one tensor for query and residual alike.
    assert sum(found[1].values()) == sum(found[0].values()) - 5 - 4 - 1


# The forms that are left are the same function


FORMS = {
    "vit": (7, 0),
    "swin": (18, 0),
    "llama": (7, 0),
    "gpt2": (6, 1),
    "t5": (15, 2),
    "bert": (0, 7),
}
"""How many norms of each model are folded, and how many stay as a product and a sum."""


@pytest.mark.parametrize("name", FORMS)
def test_merged_or_not_it_is_the_same_function(name: str) -> None:
    model = shaken(name)
    merged, kept = (taught(model, merge=merge) for merge in (True, False))
    folded, left = FORMS[name]
    found = Counter(change.what for change in merged.steps[0].changes[1:])
    assert found == Counter({"folded": folded, "rescaled": left})
    assert kinds(merged.model.module) == Counter({"Rescaling": left})
    assert kinds(kept.model.module) == Counter({"RepBatchNorm": folded + left})
    wanted = forward(kept.model.module, model.example)
    assert distance(forward(merged.model.module, model.example), wanted) < 1e-12
    # The line above would say nothing of batch norms that do nothing.
    for part in kept.model.module.modules():
        if isinstance(part, RepBatchNorm):
            assert float(part.running_mean.abs().max()) > 1e-3
            assert float(part.bias.detach().abs().max()) > 1e-3
            assert float(part.alpha.detach()) != 0


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", ["vit", "llama", "bert"])
def test_a_checkpoint_gives_the_model_back(name: str, merge: bool, tmp_path: Path) -> None:
    model = shaken(name, torch.float32)
    made = taught(model, merge=merge).model
    save(made, tmp_path / "model")
    back = load(tmp_path / "model")
    assert kinds(back.module) == kinds(made.module)
    wanted = forward(made.module, model.example)
    assert all(torch.equal(one, wanted[key]) for key, one in forward(back.module, model.example).items())


def test_linear_maps_get_the_biases_that_they_lack() -> None:
    model = shaken("llama")
    assert not any(part.bias is not None for part in model.module.modules() if isinstance(part, nn.Linear))
    made = taught(model)
    readers = Counter(name for change in made.steps[0].changes for name in change.after[3:].split(", "))
    biased = {
        path
        for path, part in made.model.module.named_modules()
        if isinstance(part, nn.Linear) and part.bias is not None
    }
    assert biased <= set(readers)
    assert len(biased) == 3 * 5 + 1


def test_norms_that_the_residual_reads_stay_as_a_product_and_a_sum() -> None:
    changes = taught(shaken("bert"), steps=2).steps[0].changes
    (change,) = [one for one in changes if one.target == "encoder.layer.0.output.LayerNorm"]
    assert change.after == (
        "a product and a sum stay: it reads add of `encoder.layer.0.output`, "
        "and add of `encoder.layer.1.attention.output` reads it"
    )


# Statistics


def settled(model: Model, batches: Sequence[Inputs], path: str) -> RepBatchNorm:
    """The batch norm at `path`, a norm before all others, with the statistics of `batches`."""
    module = copy.deepcopy(model.module)
    norms, _ = replaceable_norms(model, Scope())
    with fading_norms(module, norms, 0.0) as fading:
        fading.share = 0.0
        settle(module, batches, range(len(batches)), Context())
    found = module.get_submodule(path)
    assert isinstance(found, RepBatchNorm)
    return found


def read_by(module: nn.Module, path: str, batch: Inputs) -> Tensor:
    """What the module at `path` reads."""
    seen: list[Tensor] = []
    hook = module.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    forward(module, batch)
    hook.remove()
    return seen[0]


def test_statistics_are_those_of_all_positions_of_all_batches_but_padding() -> None:
    model, path = shaken("bert"), "embeddings.LayerNorm"
    batches = [
        {name: value[:count] for name, value in model.example.items()} | {"token_type_ids": types[:count]}
        for count in (1, 2)
        for types in [torch.zeros(2, 12, dtype=torch.long)]
    ]
    found = settled(model, batches, path)
    rows = [read_by(model.module, path, one)[one["attention_mask"].bool()] for one in batches]
    assert [len(one) for one in rows] == [12, 21]
    together = torch.cat(rows)
    torch.testing.assert_close(found.running_mean, together.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.running_var, together.var(0, correction=0), rtol=1e-12, atol=1e-12)


def test_with_accumulation_statistics_are_those_of_all_batches(digits: Digits) -> None:
    batches = digits.batches[:4]
    settings = {"steps": 4, "accumulate": 2, "merge": False, "learning_rate": 1e-4}
    made = taught(digits.model, batches, **settings).model.module
    path = "vit.layers.0.layernorm_before"
    read = torch.cat([read_by(made, path, batch) for batch in batches]).flatten(0, 1)
    norm = made.get_submodule(path)
    torch.testing.assert_close(norm.running_mean, read.mean(0))
    torch.testing.assert_close(norm.running_var, read.var(0, correction=0))


def test_so_many_batches_give_the_statistics(digits: Digits) -> None:
    one, all_ = (
        taught(digits.model, digits.batches[:4], steps=2, merge=False, statistics=count).model.module
        for count in (1, 4)
    )
    path = "vit.layers.0.layernorm_before"
    read = read_by(one, path, digits.batches[0]).flatten(0, 1)
    torch.testing.assert_close(one.get_submodule(path).running_mean, read.mean(0))
    assert not torch.equal(one.get_submodule(path).running_mean, all_.get_submodule(path).running_mean)


def test_a_settled_norm_gives_what_it_gave_in_training(digits: Digits) -> None:
    module, batch = copy.deepcopy(digits.model.module), digits.batches[0]
    norms, _ = replaceable_norms(digits.model, Scope())
    with fading_norms(module, norms, 0.5) as fading:
        fading.share, fading.tokens = 0.0, partial(tokens_of, batch)
        wanted = forward(module, batch)
        settle(module, [batch], [0], Context())
    assert distance(forward(module, batch), wanted) < 1e-5


# Lambda


def test_lambda_falls_to_zero_over_a_share_of_the_steps(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    plain = ProgressiveNorm.forward

    def seen(self: ProgressiveNorm, x: Tensor) -> Tensor:
        if x.requires_grad:
            shares.append(self.fading.share)
        return plain(self, x)

    monkeypatch.setattr(ProgressiveNorm, "forward", seen)
    taught(digits.model, digits.batches, steps=10, decay=0.5, learning_rate=1e-4)
    # Five norms a step; the first run is not a step, but asks which parameters the loss reaches.
    assert shares[5::5] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])


def test_without_decay_the_norms_are_gone_at_once(digits: Digits) -> None:
    assert kinds(taught(digits.model, digits.batches, steps=20, decay=0).model.module) == {}


# What it declines


def test_without_training_data_it_does_nothing(digits: Digits) -> None:
    with pytest.raises(DataError, match="progressive_batch_norm needs training data, and there is none"):
        run(digits.model, [ProgressiveBatchNorm()], Context())


def test_training_that_does_not_help_is_refused(digits: Digits) -> None:
    with pytest.raises(Unproved, match="`progressive_batch_norm` did not lower its loss|the loss is"):
        taught(digits.model, digits.batches, steps=3, learning_rate=3.0, warmup=0)


def test_half_precision_and_integers_are_refused(digits: Digits) -> None:
    half = shaken("vit", torch.float16)
    with pytest.raises(Unsuitable, match="trains in float32, and the model is in torch.float16"):
        ProgressiveBatchNorm().check(half)
    quantized = run(digits.model, [Quantize()], Context(calibration=digits.batches[:1])).model
    with pytest.raises(Unsuitable, match="quantized already, and its integer weights neither train nor"):
        ProgressiveBatchNorm().check(quantized)


def test_a_norm_that_the_loss_does_not_depend_on_stays() -> None:
    model = shaken("dinov2")
    made = taught(model)
    (skip,) = made.steps[0].skips
    assert skip.target == "layernorm"
    assert skip.why.startswith("the loss (hidden) does not depend on it, so that nothing would train")
    assert kinds(made.model.module) == {"LayerNorm": 1}
    with pytest.raises(NothingToDo, match=r"It skipped layernorm: the loss \(hidden\) does not depend on it"):
        taught(model, scope=Scope(include=("layernorm",)))


def test_scope_says_which_norms_go(digits: Digits) -> None:
    scope = Scope(include=("*.layernorm_after",))
    made = taught(digits.model, digits.batches, steps=20, scope=scope)
    assert [one.after for one in made.steps[0].changes[1:]] == [f"in vit.layers.{n}.mlp.fc1" for n in (0, 1)]
    assert kinds(made.model.module) == {"LayerNorm": 3}


class Odd(nn.Module):
    """Norms that nothing can stand in for."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.groups = nn.LayerNorm(4), First(4), nn.GroupNorm(2, 4)
        self.shared = self.again = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.groups(x))
        return self.last(self.shared(self.twice(self.twice(x.movedim(1, -1)).tanh())))


class First(nn.LayerNorm):
    """Norms the second axis."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def test_norms_that_nothing_can_stand_in_for_are_named() -> None:
    torch.manual_seed(0)
    model = Model(Odd().eval(), {"x": torch.randn(2, 4, 3, 4)}, "feature-extraction")
    with pytest.raises(NothingToDo) as raised:
        taught(model)
    for skip in (
        "twice: it runs 2 times",
        "first: it does not norm the last axis alone",
        "groups: it is a group norm",
        "again: its module stands in several places",
    ):
        assert skip in raised.value.fact
