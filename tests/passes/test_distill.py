"""Distillation: what a compressed model learns back from the model that it came from."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import compress
from compress.compare import forward
from compress.errors import DataError, NothingToDo, Unproved, Unsuitable, UsageError
from compress.layers.quantized import QuantizedWeight
from compress.model import Model
from compress.numerics.relations import divergence
from compress.passes.base import Context
from compress.passes.distill import Distill
from compress.passes.factorize import Factorize
from compress.passes.quantize import Quantize
from compress.passes.relating import last_attention, listen, relations_loss
from compress.passes.teaching import _task_part, hidden_loss, logits_loss, objective
from compress.pipeline import run
from compress.scope import Scope
from tests import tiny
from tests.zoo import build

NAMES = ["bert", "deberta", "gpt2", "gpt-neox", "llama", "qwen3", "phi3", "t5", "whisper", "vit", "swin"]


def shaken(model: Model, amount: float = 0.1, seed: int = 0) -> Model:
    """A copy with every weight a little off."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + amount * torch.randn(parameter.shape, generator=generator))
    return replace(model, module=module)


def taught(model: Model, teacher: Model, **settings) -> compress.Outcome:
    context = Context(training=[model.example], teacher=teacher)
    return run(model, [Distill(**{"steps": 8, "learning_rate": 1e-4, **settings})], context)


def writer(seed: int = 0) -> Model:
    """A tiny Llama whose logits are not all alike."""
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def texts(model: Model, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    size = model.module.config.vocab_size
    ids = [torch.randint(5, size, (8, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def distance(teacher: Model, student: Model, batches) -> float:
    pairs = [[forward(one.module, batch)["logits"] for one in (teacher, student)] for batch in batches]
    return sum(float(divergence(*pair)) for pair in pairs)


def test_a_factorized_model_heals():
    teacher = writer()
    context = Context(
        calibration=texts(teacher, 4, seed=1), training=texts(teacher, 32, seed=1), teacher=teacher
    )
    worse = run(teacher, [Factorize(multiple=1, keep=0.8, method="svd")], context).model
    outcome = run(worse, [Distill(steps=250, learning_rate=3e-3)], context)
    held_out = texts(teacher, 4, seed=2)
    assert distance(teacher, outcome.model, held_out) < distance(teacher, worse, held_out) / 2
    (change,) = outcome.steps[0].changes
    assert (change.target, change.what) == ("the model", "trained on logits")
    assert change.after.endswith(" tensors, 250 steps)")


@pytest.mark.parametrize("loss", ["auto", "hidden", "minilm"])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_model_learns(name, loss):
    model = build(name)
    outcome = taught(model, shaken(model), loss=loss)
    (change,) = outcome.steps[0].changes
    before, after = (float(text.split()[1]) for text in (change.before, change.after))
    assert after < before


def losses(student: Model, teacher: Model) -> dict[str, torch.Tensor]:
    made = {
        "logits": logits_loss(student, teacher, 1.0),
        "hidden": hidden_loss(student, teacher),
        "minilm": relations_loss(student, teacher, None),
        "relations": relations_loss(student, teacher, 4),
    }
    return {name: loss(student.module, student.example) for name, loss in made.items()}


def test_both_is_the_sum_of_logits_and_hidden():
    model = build("gpt2")
    student, apart = shaken(model), losses(shaken(model), model)
    kind, loss = objective(Distill(loss="both"), student, model)
    assert kind == "logits and hidden"
    with torch.no_grad():
        given = float(loss(student.module, model.example))
    assert given == pytest.approx(float(apart["logits"] + apart["hidden"]))
    (change,) = taught(model, student, loss="both").steps[0].changes
    assert change.what == "trained on logits and hidden"


@pytest.mark.parametrize("name", ["bert-masked", "gpt2"])
def test_a_student_like_its_teacher_loses_nothing(name):
    assert all(loss.item() < 1e-9 for loss in losses(build(name), build(name)).values())


def test_shared_keys_and_values_are_repeated():
    model = build("llama")
    heads = listen(model.module, last_attention(model, "teacher"), model.example)
    assert heads.query.shape == heads.key.shape == heads.value.shape == (2, 6, 12, 10)
    assert torch.equal(heads.key[:, 0], heads.key[:, 2])
    assert not torch.equal(heads.key[:, 2], heads.key[:, 3])


@pytest.mark.parametrize("name", ["bert-masked", "gpt2"])
def test_padding_changes_no_loss(name):
    model = build(name)
    student, teacher = shaken(model, 0.5), model
    ids, mask = model.example["input_ids"], model.example["attention_mask"]
    padded = {
        "input_ids": torch.cat([ids, torch.full_like(ids, 7)], 1),
        "attention_mask": torch.cat([mask, torch.zeros_like(mask)], 1),
    }
    wanted = losses(student, teacher)
    given = losses(replace(student, example=padded), teacher)
    for kind, loss in wanted.items():
        torch.testing.assert_close(given[kind], loss, rtol=1e-4, atol=1e-8)


def test_relations_are_those_of_the_attention_that_the_model_computes():
    model = build("bert")
    module = copy.deepcopy(model.module)
    module.set_attn_implementation("eager")
    heads = listen(module, last_attention(model, "teacher"), model.example)
    scores = heads.query @ heads.key.transpose(-1, -2) / heads.query.shape[-1] ** 0.5
    scores = scores.masked_fill(model.example["attention_mask"][:, None, None] == 0, -1e9)
    wanted = module(**model.example, output_attentions=True).attentions[-1]
    torch.testing.assert_close(scores.softmax(-1), wanted)


def test_relations_do_not_need_equal_widths():
    """The student is half as wide, in models and in heads, and gets nearer to its teacher."""
    teacher, student = tiny.bert(), tiny.bert(hidden_size=16, num_hidden_layers=1)
    batches = [student.example]
    context = Context(training=batches, teacher=teacher)
    settings = Distill(loss="minilm", steps=30, learning_rate=3e-3)
    (change,) = run(student, [settings], context).steps[0].changes
    assert change.what == "trained on minilm"
    with pytest.raises(Unsuitable, match="hidden states have 32 features and the student's 16") as caught:
        run(student, [Distill(loss="hidden")], context)
    assert "`loss: minilm`, which compares models of any width" in caught.value.remedy


def test_relation_heads_relate_models_with_other_heads():
    teacher, student = shaken(tiny.bert(), 0.5), tiny.bert(num_attention_heads=2)
    context = Context(training=[student.example], teacher=teacher)
    with pytest.raises(Unsuitable, match="last attention has 4 heads and the student's 2") as caught:
        run(student, [Distill(loss="minilm")], context)
    assert "Set `relation_heads`" in caught.value.remedy
    with pytest.raises(Unsuitable, match="32 features cannot be cut into 5 relation heads"):
        run(student, [Distill(loss="minilm", relation_heads=5)], context)
    settings = Distill(loss="minilm", relation_heads=8, steps=10, learning_rate=1e-3)
    assert run(student, [settings], context).steps[0].changes


def test_relations_train_nothing_after_the_last_attention():
    model = build("bert")
    module = taught(model, shaken(model), loss="minilm").model.module
    moved = {
        name
        for (name, value), other in zip(module.named_parameters(), model.module.parameters(), strict=True)
        if not torch.equal(value, other)
    }
    assert any(name.startswith("encoder.layer.1.output") for name in moved)
    assert "encoder.layer.2.attention.self.query.weight" in moved
    assert not any(name.startswith(("encoder.layer.2.output", "pooler")) for name in moved)


def test_a_shallow_student_answers_to_blocks_spread_evenly():
    teacher, student = tiny.bert(num_hidden_layers=4), tiny.bert(num_hidden_layers=2)
    for number, place in enumerate((1, 3)):
        layers = student.module.encoder.layer[number], teacher.module.encoder.layer[place]
        layers[0].load_state_dict(layers[1].state_dict())
    batch = {**student.example, "attention_mask": torch.ones_like(student.example["input_ids"])}
    states = forward(teacher.module, {**batch, "output_hidden_states": True})
    given = forward(student.module, {**batch, "output_hidden_states": True})
    expected = [
        ((given[f"hidden_states.{number}"] - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
        for number, wanted in ((1, states["hidden_states.2"]), (2, states["hidden_states.4"]))
    ]
    found = hidden_loss(student, teacher)(student.module, batch)
    torch.testing.assert_close(found.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-7)


def test_embeddings_and_tied_heads_stay_unless_asked():
    model = build("gpt2")
    outcome = taught(model, shaken(model))
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        before, after = (one.get_parameter(name) for one in (model.module, outcome.model.module))
        assert torch.equal(before, after)
    reasons = {skip.target: skip.why for skip in outcome.steps[0].skips}
    assert reasons["transformer.wte"] == "an embedding; set `train_embeddings: true` to train it"
    module = taught(model, shaken(model), train_embeddings=True).model.module
    assert not torch.equal(module.transformer.wte.weight, model.module.transformer.wte.weight)
    assert module.lm_head.weight is module.transformer.wte.weight


def test_the_scope_says_what_trains():
    model = build("bert")
    scope = Scope(include=("encoder.layer.1.*",))
    module = taught(model, shaken(model), scope=scope).model.module
    for (name, value), other in zip(module.named_parameters(), model.module.parameters(), strict=True):
        assert torch.equal(value, other) != name.startswith("encoder.layer.1."), name


def test_what_asked_for_no_gradient_still_does_not():
    model = shaken(build("bert"), amount=0.0)
    model.module.encoder.layer[0].requires_grad_(False)
    module = taught(model, shaken(build("bert"))).model.module
    assert not any(parameter.requires_grad for parameter in module.encoder.layer[0].parameters())
    assert all(parameter.requires_grad for parameter in module.encoder.layer[1].parameters())


def test_a_quantized_model_trains_what_is_float():
    teacher = build("bert")
    context = Context(calibration=[teacher.example], training=[teacher.example], teacher=shaken(teacher))
    outcome = run(teacher, [Quantize(), Distill(steps=20, learning_rate=1e-4)], context)
    layers = {
        path: layer
        for path, layer in outcome.model.module.named_modules()
        if isinstance(layer, QuantizedWeight)
    }
    reasons = {skip.target: skip.why for skip in outcome.steps[1].skips}
    assert layers
    assert all(reasons[path] == "its integer weight does not train; its bias does" for path in layers)


def test_a_healed_model_is_saved_and_comes_back(tmp_path):
    model = build("llama")
    context = Context(calibration=[model.example], training=[model.example])
    passes = [Factorize(multiple=1, keep=0.6), Distill(steps=10, learning_rate=3e-5)]
    outcome = run(model, passes, context)
    compress.save(outcome.model, tmp_path / "model")
    back = compress.load(tmp_path / "model")
    wanted, given = (forward(one.module, model.example)["logits"] for one in (outcome.model, back))
    assert torch.equal(wanted, given)


def test_an_interrupted_run_goes_on_within_the_pass(tmp_path, monkeypatch):
    model = build("bert")
    context, settings = Context(training=[model.example], teacher=shaken(model)), Distill(steps=20)
    whole = run(model, [settings], context).model.module
    calls = []

    def failing(self, *args, original=torch.optim.AdamW.step, **kwargs):
        calls.append(1)
        if len(calls) == 11:
            raise ArithmeticError("the power failed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(ArithmeticError):
        run(model, [settings], context, store=tmp_path)
    assert [folder.name[:8] for folder in tmp_path.iterdir()] == ["scratch-"]
    module = run(model, [settings], context, store=tmp_path).model.module
    assert len(calls) == 11 + 10
    assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.glob("scratch-*"))
    for one, other in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_teacher_is_the_model_that_the_run_began_with():
    model = build("bert")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    context = Context(calibration=[model.example], training=[model.example])
    run(model, [Factorize(multiple=1, keep=0.4), Distill(steps=10, learning_rate=3e-5)], context)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    with pytest.raises(UsageError, match="`distill` needs a teacher, and the context has none"):
        Distill().apply(model, context)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn():
    with pytest.raises(NothingToDo, match="the model: it answers as its teacher does already"):
        taught(build("bert"), build("bert"))


def test_a_loss_that_does_not_fall_is_refused():
    model = build("bert")
    with pytest.raises(Unproved, match=r"`distill` did not lower its loss: .* before and .* after") as caught:
        taught(model, shaken(model, 0.001), learning_rate=0.5)
    assert "Lower the learning rate" in caught.value.remedy


def test_without_data():
    context = Context(teacher=shaken(build("bert")))
    with pytest.raises(DataError, match="distill needs training data, and there is none"):
        run(build("bert"), [Distill()], context)


def test_a_scope_in_which_nothing_trains():
    model = build("bert")
    scope = Scope(include=("embeddings.word_embeddings",))
    with pytest.raises(Unsuitable, match="No parameter in the scope of `distill` trains"):
        taught(model, shaken(model), scope=scope)
    with pytest.raises(Unsuitable, match="The loss of `distill` depends on no parameter in its scope"):
        taught(model, shaken(model), scope=Scope(include=("pooler.*",)), loss="minilm")


def test_losses_that_a_model_cannot_be_asked():
    model = build("bert")
    with pytest.raises(Unsuitable, match="a model for feature-extraction gives none"):
        taught(model, shaken(model), loss="logits")
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    plain = Model(net, {"input": torch.randn(2, 4)}, "feature-extraction")
    with pytest.raises(Unsuitable, match="Sequential gives no hidden states when asked"):
        taught(plain, shaken(plain))
    with pytest.raises(Unsuitable, match="`loss: minilm` finds no attention in the teacher"):
        taught(plain, shaken(plain), loss="minilm")
    classes = [tiny.bert_classifier(dict(enumerate("abc"[:count]))) for count in (2, 3)]
    with pytest.raises(Unsuitable, match=r"The teacher's logits are \(2, 3\) and the student's \(2, 2\)"):
        taught(*classes)


def labelled(model: Model, rows: int = 2) -> dict[str, torch.Tensor]:
    return {**model.example, "labels": torch.arange(rows) % 2}


@pytest.mark.parametrize("loss", ["logits", "hidden", "both"])
def test_labels_count_beside_the_teacher(loss):
    teacher = tiny.bert_classifier(dict(enumerate("ab")))
    student, batch = shaken(teacher), labelled(teacher)
    kind, both = objective(Distill(loss=loss, task=0.3), student, teacher)
    alone = objective(Distill(loss=loss), student, teacher)[1]
    own = nn.functional.cross_entropy(forward(student.module, student.example)["logits"], batch["labels"])
    assert kind.endswith(" and labels")
    assert both(student.module, batch).item() == pytest.approx(
        alone(student.module, student.example).item() + 0.3 * own.item(), rel=1e-5
    )


def test_a_student_learns_labels_that_its_teacher_does_not_know():
    teacher = tiny.bert_classifier(dict(enumerate("ab")))
    batch = labelled(teacher)
    settings = Distill(steps=60, learning_rate=1e-2, task=10)
    made = compress.apply(teacher, [settings], training=[batch]).model
    before, after = (forward(one.module, one.example)["logits"] for one in (teacher, made))
    assert after.argmax(-1).equal(batch["labels"])
    losses = [nn.functional.cross_entropy(one, batch["labels"]).item() for one in (before, after)]
    assert losses[1] < 0.5 * losses[0]


def test_a_task_needs_labels_and_a_head():
    teacher = tiny.bert_classifier(dict(enumerate("ab")))
    with pytest.raises(DataError, match="the training data has none"):
        taught(teacher, shaken(teacher), task=1)
    with pytest.raises(Unsuitable, match="no head to learn with"):
        taught(teacher, shaken(teacher), task=1, loss="minilm")
    with pytest.raises(DataError, match="gives the arguments"):
        compress.apply(
            teacher, [Distill(steps=1)], calibration=[labelled(teacher)], training=[labelled(teacher)]
        )
    with pytest.raises(
        Unsuitable, match="BertModel gives no loss for labels, which `task` would count"
    ) as caught:
        compress.apply(tiny.bert(), [Distill(task=1)], training=[labelled(tiny.bert())])
    assert "load the model for a task with labels" in caught.value.remedy
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    plain = Model(net, {"input": torch.randn(2, 4)}, "image-classification")
    with pytest.raises(Unsuitable, match="Sequential gives no loss for labels"):
        _task_part(plain, 1.0)


def test_the_teacher_sees_no_labels():
    teacher = tiny.bert_classifier(dict(enumerate("ab")))
    student = shaken(teacher)
    objective(Distill(task=1), student, teacher)[1](student.module, labelled(teacher))
    # A model of transformers that sees labels writes into its config what kind they are.
    assert teacher.module.config.problem_type is None
    assert student.module.config.problem_type == "single_label_classification"
