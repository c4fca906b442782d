"""Clipped softmax as a pass: it rises from nothing while the model learns."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import compress
import export
from compress.compare import forward
from compress.errors import NothingToDo, Unproved, Unsuitable
from compress.layers.clip import clips_of
from compress.passes.clip_softmax import ClipSoftmax
from export.runners import OnnxRunner
from tests.passes.outlying import distance, in_8_bits, outlying, texts
from tests.zoo import build


@pytest.fixture(scope="module")
def source():
    return outlying()


@pytest.fixture(scope="module")
def outcome(source):
    clip = ClipSoftmax(steps=100, learning_rate=3e-3, penalty=1.0, alpha=0.5)
    return compress.apply(source, [clip], calibration=texts(8, seed=1), training=texts(16, seed=1))


def test_8_bits_cost_less_afterwards(source, outcome):
    assert distance(source, in_8_bits(outcome.model)) < distance(source, in_8_bits(source))
    *clips, trained = outcome.steps[0].changes
    assert [change.after for change in clips] == ["zero below 0.5 / keys"] * 2
    assert trained.what == "trained for fewer outliers"
    assert [clip.share for clip in clips_of(outcome.model.module)] == [1.0, 1.0]


def test_the_plan_rises_from_nothing_to_all():
    module = copy.deepcopy(build("bert").module)
    paths = ["encoder.layer.0.attention.self"]
    settings = ClipSoftmax(steps=10, rise=0.5)
    (clip,) = clips_of(settings.restore(module, {"paths": paths}))
    assert clip.share == 1
    rise = settings._plan(module)
    assert clip.share == 0
    seen = [(rise(step), clip.share)[1] for step in range(7)]
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_a_checkpoint_and_an_export_answer_alike(source, outcome, tmp_path):
    expected = forward(outcome.model.module, source.example)["logits"]
    compress.save(outcome.model, tmp_path / "clipped")
    back = compress.load(tmp_path / "clipped")
    assert torch.equal(forward(back.module, source.example)["logits"], expected)
    export.Onnx(runtime="standard").write(back, tmp_path / "onnx")
    found = OnnxRunner(tmp_path / "onnx", threads=1)(**source.example).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_calms_nothing_is_not_proved(source):
    with pytest.raises(Unproved, match="`clip_softmax` did not make outliers fewer"):
        compress.apply(source, [ClipSoftmax(steps=2, penalty=0)], training=texts(2, seed=1))


def test_attentions_outside_the_registry_are_left_alone():
    model = build("deberta")
    with pytest.raises(NothingToDo, match="does not go through transformers' registry"):
        compress.apply(model, [ClipSoftmax(steps=1)], training=[model.example])


def test_twice_and_after_quantization_are_refused(outcome):
    with pytest.raises(Unsuitable, match="clipped already"):
        ClipSoftmax().check(outcome.model)
    quantized = in_8_bits(replace(outcome.model, module=outlying().module, history=()))
    with pytest.raises(Unsuitable, match="quantized already"):
        ClipSoftmax().check(quantized)
