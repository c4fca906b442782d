"""The training loop: repeatable, resumable, and it touches what it is told to touch."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress.errors import DataError, Unproved, Unsuitable, UsageError
from compress.passes.base import Context
from compress.trainer import order
from compress.training import Training, train, training_batches, training_only

SETTINGS = Training(steps=20, learning_rate=1e-2)
ALONE = Context()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Dropout(0.5), nn.GELU(), nn.BatchNorm1d(8), nn.Linear(8, 3)
    return nn.Sequential(*layers).eval()


def batches(count: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 6, generator=generator)} for _ in range(count)]


def loss(module: nn.Module, batch) -> Tensor:
    return (module(batch["x"]) - batch["x"][:, :3]).square().mean()


def total(module: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(loss(module, batch)) for batch in batches())


def run(module: nn.Module, settings: Training = SETTINGS, context: Context = ALONE, objective=loss, **more):
    return train(module, batches(), objective, settings, context, "test", **more)


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_training_lowers_the_loss_and_says_so():
    module, before = network(), total(network())
    trained = run(module, Training(steps=100, learning_rate=1e-2))
    assert total(module) < before / 2
    assert trained.steps == 100
    assert trained.last_loss < trained.first_loss / 2
    assert trained.seconds > 0


def test_the_seed_decides_and_nothing_else():
    results = []
    for seed, noise in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(noise)
        random.seed(noise)
        module = network()
        run(module, context=Context(seed=seed))
        results.append(module)
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_the_randomness_of_others_goes_on_as_if_nothing_had_happened():
    torch.manual_seed(5)
    random.seed(5)
    wanted = torch.rand(1), random.random()
    module = network()
    torch.manual_seed(5)
    random.seed(5)
    run(module)
    assert (torch.rand(1), random.random()) == wanted


def test_the_module_stays_in_evaluation_mode():
    module, modes = network(), []

    def watched(module: nn.Module, batch) -> Tensor:
        modes.append(any(one.training for one in module.modules()))
        return loss(module, batch)

    statistics = module[3].running_mean.clone()
    run(module, objective=watched)
    assert modes == [False] * 20
    assert not any(one.training for one in module.modules())
    assert torch.equal(module[3].running_mean, statistics)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_is_frozen_stays():
    module = network()
    module[0].weight.requires_grad_(False)
    run(module)
    assert torch.equal(module[0].weight, network()[0].weight)
    assert not torch.equal(module[0].bias, network()[0].bias)


def test_only_the_named_parameters_train_inside_the_block():
    module = network()
    module[4].bias.requires_grad_(False)
    with training_only(module, ["0.weight", "4.bias"]):
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        assert names == ["0.weight", "4.bias"]
    assert not module[4].bias.requires_grad
    assert module[3].weight.requires_grad


def test_rates_are_by_name():
    module = network()
    run(module, Training(steps=1, learning_rate=1e-2, warmup=0), rates={"0.weight": 1e-4})
    # The first step of Adam moves every weight by its learning rate.
    moved = {
        name: float((value - other).detach().abs().max())
        for (name, value), other in zip(module.named_parameters(), network().parameters(), strict=True)
    }
    assert moved["0.weight"] == pytest.approx(1e-4, rel=1e-3)
    assert moved["4.weight"] == pytest.approx(1e-2, rel=1e-3)
    with pytest.raises(UsageError, match="there are no parameters 9.weight to give learning rates to"):
        run(module, rates={"9.weight": 1.0})


def test_each_step_is_announced_by_its_number(tmp_path):
    heard = []
    accumulating = Training(steps=6, learning_rate=1e-2, accumulate=2)
    run(network(), accumulating, before_step=heard.append)
    assert heard == [0, 1, 2, 3, 4, 5]
    stopped, context = [], Context(scratch=tmp_path)

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        stopped.append(step)

    with pytest.raises(KeyboardInterrupt):
        run(network(), accumulating, context, before_step=stop)
    run(network(), accumulating, context, before_step=stopped.append)
    assert stopped == [0, 1, 2, 3, 4, 5]


def test_matrices_decay_and_vectors_do_not():
    module = network()
    still = Training(steps=1, learning_rate=1e-1, warmup=0, weight_decay=0.5)
    run(module, still, objective=lambda module, batch: 0 * loss(module, batch))
    torch.testing.assert_close(module[0].weight, network()[0].weight * 0.95)
    assert torch.equal(module[0].bias, network()[0].bias)


def test_gradients_are_clipped(monkeypatch):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [one.grad for group in self.param_groups for one in group["params"]]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(network(), Training(steps=5, learning_rate=1e-3, clip=0.01), objective=lambda *of: 100 * loss(*of))
    assert len(norms) == 5
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_accumulated_batches_are_one_step_of_their_mean():
    seen: list[int] = []

    def watched(module: nn.Module, batch) -> Tensor:
        seen.append(len(seen))
        return loss(module, batch)

    module, joined = network(), network()
    settings = Training(steps=3, learning_rate=1e-2, accumulate=5)
    run(module, settings, objective=watched)
    assert len(seen) == 15
    whole = [{"x": torch.cat([batch["x"] for batch in batches()])}]
    train(joined, whole, loss, settings.model_copy(update={"accumulate": 1}), Context(), "test")
    for one, other in zip(module.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_every_round_goes_over_all_batches_in_an_order_of_its_own():
    numbers = order(7, 20, seed=0)
    assert sorted(numbers[:7]) == sorted(numbers[7:14]) == list(range(7))
    assert numbers[:7] != numbers[7:14]
    assert len(numbers) == 20
    assert numbers != order(7, 20, seed=1)


def test_bfloat16_trains_float_weights_under_autocast():
    kinds = []

    def watched(module: nn.Module, batch) -> Tensor:
        kinds.append(module[0](batch["x"]).dtype)
        return loss(module, batch)

    module, before = network(), total(network())
    run(module, Training(steps=60, learning_rate=1e-2, precision="bfloat16"), objective=watched)
    assert set(kinds) == {torch.bfloat16}
    assert module[0].weight.dtype == torch.float32
    assert total(module) < before


def fails_at(number: int) -> Callable[..., Tensor]:
    calls = []

    def failing(module: nn.Module, batch) -> Tensor:
        calls.append(number)
        if len(calls) == number:
            raise ArithmeticError("the power failed")
        return loss(module, batch)

    return failing


@pytest.mark.parametrize("at", [2, 12, 20])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, at):
    whole, module = network(), network()
    expected = run(whole)
    context = Context(scratch=tmp_path / "scratch")
    with pytest.raises(ArithmeticError):
        run(module, context=context, objective=fails_at(at))
    kept = list(tmp_path.glob("scratch/*/checkpoint-*"))
    assert [folder.name for folder in kept] == ([f"checkpoint-{(at - 1) // 2 * 2}"] if at > 2 else [])
    again, calls = network(), []
    trained = run(again, context=context, objective=lambda *of: calls.append(1) or loss(*of))
    assert len(calls) == 20 - (at - 1) // 2 * 2
    assert same(whole, again)
    assert (trained.first_loss, trained.last_loss) == (expected.first_loss, expected.last_loss)


def test_a_finished_run_is_not_done_again(tmp_path):
    context, module, again = Context(scratch=tmp_path), network(), network()
    first = run(module, context=context)
    second = run(again, context=context, objective=fails_at(1))
    assert same(module, again)
    assert second == replace(first, seconds=second.seconds)


@pytest.mark.parametrize("changed", ["settings", "seed", "weights", "frozen"])
def test_another_run_begins_anew(tmp_path, changed):
    context = Context(scratch=tmp_path)
    run(network(), context=context)
    module, calls = network(), []
    settings = Training(steps=20, learning_rate=2e-2) if changed == "settings" else SETTINGS
    if changed == "weights":
        module[0].bias.data += 1
    if changed == "frozen":
        module[0].bias.requires_grad_(False)
    context = replace(context, seed=int(changed == "seed"))
    run(module, settings, context, objective=lambda *of: calls.append(1) or loss(*of))
    assert len(calls) == 20


def test_half_a_checkpoint_is_no_checkpoint(tmp_path):
    context, calls = Context(scratch=tmp_path), []
    run(network(), context=context)
    next(tmp_path.glob("*/checkpoint-20/trainer_state.json")).unlink()
    run(network(), context=context, objective=lambda *of: calls.append(1) or loss(*of))
    assert len(calls) == 20


def test_without_scratch_nothing_is_written(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run(network())
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_progress_and_losses_are_told(caplog):
    steps: list[int] = []

    class Watcher:
        def begin(self, what, total):
            steps.append(total)
            return self

        def advance(self, number=1):
            steps.append(number)

        def end(self, task):
            steps.append(-1)

    with caplog.at_level(logging.DEBUG, logger="compress.trainer"):
        run(network(), context=Context(observer=Watcher()))
    assert steps == [20, 0, *[1] * 20, -1]
    assert "step 1 of 20: loss " in caplog.text


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    calls = []

    def broken(module: nn.Module, batch) -> Tensor:
        calls.append(1)
        return loss(module, batch) * (float("nan") if len(calls) == 4 else 1)

    with pytest.raises(Unproved, match="test: the loss is nan at step 4 of 20") as caught:
        run(network(), objective=broken)
    assert "Lower the learning rate" in caught.value.remedy


def test_no_data():
    with pytest.raises(DataError, match="test: the training data gives no batches"):
        train(network(), [], loss, SETTINGS, Context(), "test")
    with pytest.raises(DataError, match="distill needs training data, and there is none") as caught:
        training_batches(Context(), "distill")
    assert "`data: {training: {text: FILE}}`" in caught.value.remedy
    with pytest.raises(DataError, match="distill: the training data gives no batches"):
        training_batches(Context(training=[]), "distill")


def test_nothing_to_train():
    module = network()
    module.requires_grad_(False)
    with pytest.raises(Unsuitable, match="test: no parameter of Sequential asks for gradients"):
        run(module)


def test_batches_that_processes_cannot_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UsageError, match="3 batches of a step cannot be shared evenly by 2 processes"
    ) as caught:
        run(network(), Training(steps=1, learning_rate=1e-3, accumulate=3))
    assert "Set `accumulate` to a multiple of 2" in caught.value.remedy
