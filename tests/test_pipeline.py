"""The runner: proof after every step, history, resume."""

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from compress.errors import NothingToDo, RecipeError, Unproved, Unsuitable
from compress.model import Model
from compress.passes.base import Context, Pass, Result
from compress.pipeline import run, state_bytes
from compress.report import Change, Skip
from compress.scope import Scope


class Rescale(Pass):
    """Multiplies one weight by a factor and divides the next by `factor * error`."""

    effect: ClassVar = "exact"
    needs: ClassVar = "nothing"
    use: Literal["rescale"] = "rescale"
    factor: float = 2.0
    error: float = 1.0
    fail_after: bool = False

    def apply(self, model: Model, context: Context) -> Result:
        assert isinstance(model.module, nn.Sequential)
        if self.fail_after:
            raise ArithmeticError("the power failed")
        if self.factor == 1.0:
            return Result(model.module, (), (Skip("0", "the factor is one"),))
        model.module[0].weight.data.mul_(self.factor)
        model.module[1].weight.data.div_(self.factor * self.error)
        return Result(model.module, (Change("0", "weight", "as it was", f"times {self.factor}"),))

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        return module


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("compress.checkpoint.find", lambda group, name: {"rescale": Rescale}[name])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)).eval()
    return Model(module, {"input": torch.randn(2, 4)}, "feature-extraction")


def test_a_step_states_what_happened(model):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    outcome = run(model, [Rescale(factor=4.0)])
    (step,) = outcome.steps
    assert (step.name, step.effect, step.resumed) == ("rescale", "exact", False)
    assert step.settings["factor"] == 4.0
    assert step.changes == (Change("0", "weight", "as it was", "times 4.0"),)
    assert step.parity.relative < 1e-6
    assert step.bytes_before == step.bytes_after == (4 * 8 + 8 * 3) * 4
    assert torch.equal(outcome.model.module[0].weight, before["0.weight"] * 4)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert outcome.model.history == outcome.steps


def test_an_exact_pass_that_moves_the_outputs_is_refused(model):
    with pytest.raises(
        Unproved, match=r"`rescale` must keep the outputs, but they moved by .*e-0[34]"
    ) as caught:
        run(model, [Rescale(error=1.001)])
    assert caught.value.__notes__ == ["In the pass `rescale`."]


class Shake(Rescale):
    """Gives weights that a later pass must train."""

    use: Literal["shake"] = "shake"

    def owes(self, before):
        return f"weights shaken {len(before) + 1} times"


class Mend(Rescale):
    needs: ClassVar = "training"
    use: Literal["mend"] = "mend"


def test_what_must_be_trained_is_refused_before_any_work(model):
    run(model, [Shake(), Shake(), Mend()])
    with pytest.raises(
        Unsuitable,
        match="The pass `shake` gives weights shaken 3 times, and no pass that trains comes after it.\nPut one after",
    ):
        run(model, [Mend(fail_after=True), Mend(), Shake()])


def test_the_error_says_after_which_passes(model):
    with pytest.raises(Unproved) as caught:
        run(model, [Rescale(), Rescale(error=1.01)])
    assert caught.value.__notes__ == ["In the pass `rescale` after `rescale`."]


def test_outputs_that_are_not_finite_are_refused(model):
    with pytest.raises(Unproved, match="values that are not finite in `output`"):
        run(model, [Rescale(factor=float("inf"))])


def test_a_pass_that_does_nothing_fails_with_its_reasons(model):
    with pytest.raises(
        NothingToDo, match="found nothing to do in this model. It skipped 0: the factor is one"
    ) as caught:
        run(model, [Rescale(factor=1.0)])
    assert "allow_empty: true" in caught.value.remedy
    assert run(model, [Rescale(factor=1.0, allow_empty=True)]).steps[0].changes == ()


def test_a_scope_that_matches_nothing_fails(model):
    with pytest.raises(
        RecipeError, match=r"The scope `encoder\.\*` matches none of the 2 modules of this model"
    ):
        run(model, [Rescale(scope=Scope(exclude=("encoder.*",)))])


def test_an_interrupted_run_goes_on_from_the_last_finished_pass(model, tmp_path, installed):
    passes = [Rescale(factor=2.0), Rescale(factor=3.0)]
    with pytest.raises(ArithmeticError):
        run(model, [passes[0], Rescale(factor=3.0, fail_after=True)], store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    outcome = run(model, passes, store=tmp_path)
    assert [step.resumed for step in outcome.steps] == [True, False]
    whole = run(model, passes)
    for name, value in whole.model.module.state_dict().items():
        assert torch.equal(value, outcome.model.module.state_dict()[name])


@pytest.mark.parametrize("what", ["weights", "settings", "data", "labels"])
def test_what_a_step_depends_on_is_in_its_key(model, tmp_path, installed, what):
    batches, labels = [{"input": torch.ones(2, 4)}], torch.zeros(2)
    training = [{**batches[0], "labels": labels}]
    run(model, [Rescale()], Context(calibration=batches, training=training), store=tmp_path)
    settings = Rescale(factor=5.0) if what == "settings" else Rescale()
    if what == "weights":
        model.module[0].weight.data[0, 0] += 1
    if what == "data":
        batches = [{"input": torch.zeros(2, 4)}]
    if what == "labels":
        training = [{**batches[0], "labels": labels + 1}]
    (step,) = run(model, [settings], Context(calibration=batches, training=training), store=tmp_path).steps
    assert not step.resumed


@pytest.mark.parametrize("learns", [True, False])
def test_only_a_pass_that_learns_labels_is_given_them(model, monkeypatch, learns):
    seen = []
    monkeypatch.setattr(Rescale, "learns_labels", lambda self: learns)
    original = Rescale.apply

    def apply(self, model, context):
        seen.extend(set(batch) for batch in context.training)
        return original(self, model, context)

    monkeypatch.setattr(Rescale, "apply", apply)
    run(model, [Rescale()], Context(training=[{"input": torch.ones(2, 4), "labels": torch.ones(2)}]))
    assert seen == [{"input", "labels"} if learns else {"input"}]


def test_shared_tensors_are_counted_once():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert state_bytes(module) == 128
    module[1].weight = module[0].weight
    assert state_bytes(module) == 64
