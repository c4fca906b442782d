"""Fewer tokens in real architectures: what goes, what is given back, what is declined, and the way to ONNX."""

import copy

import pytest
import torch
import transformers as tf
from pydantic import ValidationError

import compress
import export
from compress.errors import Unproved, Unsuitable
from compress.layers.tokens import is_reduced, remove
from compress.outputs import forward

BODY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
EYES = {**BODY, "image_size": 32, "patch_size": 4}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def tokens():
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def made(kind, config, example, task):
    torch.manual_seed(0)
    return compress.Model(kind(config).eval(), example, task)


def classifier():
    return made(tf.ViTForImageClassification, tf.ViTConfig(**EYES), PIXELS, "image-classification")


def features():
    return made(tf.ViTModel, tf.ViTConfig(**EYES), PIXELS, "feature-extraction")


def reduced(model, **settings):
    return compress.apply(model, [compress.MergeTokens(**{"keep": 0.7, **settings})])


@pytest.mark.parametrize(
    ("kind", "config", "protected"),
    [
        (tf.ViTForImageClassification, tf.ViTConfig(**EYES), 1),
        (tf.DeiTForImageClassificationWithTeacher, tf.DeiTConfig(**EYES), 2),
        (tf.Dinov2WithRegistersForImageClassification, tf.Dinov2WithRegistersConfig(**EYES), 5),
        (tf.CLIPVisionModel, tf.CLIPVisionConfig(**EYES), 1),
        (tf.SiglipVisionModel, tf.SiglipVisionConfig(**EYES), 0),
    ],
)
def test_special_tokens_are_found_and_the_share_is_kept(kind, config, protected):
    task = "image-classification" if "Classification" in kind.__name__ else "feature-extraction"
    model = made(kind, config, PIXELS, task)
    outcome = reduced(model)
    assert outcome.steps[-1].record["protected"] == protected
    share = outcome.model.graph.macs[""] / model.graph.macs[""]
    assert 0.66 < share <= 0.705
    assert {name: value.shape for name, value in forward(outcome.model.module, PIXELS).items()} == {
        name: value.shape for name, value in forward(model.module, PIXELS).items()
    }


def test_positions_are_given_back_where_they_are_read():
    assert not any(reduced(classifier()).steps[-1].record["restored"])
    assert reduced(features()).steps[-1].record["restored"] == [False, False, False, True]


def test_hidden_states_that_transformers_records_within_a_block_are_refused():
    """It records them behind the reducer's hook, where they have fewer tokens; nothing goes out in another shape."""
    model = made(tf.ViTModel, tf.ViTConfig(**EYES, output_hidden_states=True), PIXELS, "feature-extraction")
    with pytest.raises(Unproved, match=r"gives `hidden_states.2` of shape \(2, 5\d, 32\), not \(2, 65, 32\)"):
        reduced(model)


@pytest.mark.parametrize(
    "settings", [{}, {"method": "tome"}, {"method": "prune"}, {"method": "prune", "fuse": False}]
)
def test_it_saves_loads_and_lets_itself_be_removed(settings, tmp_path):
    model = features()
    outcome = reduced(model, **settings)
    wanted = forward(outcome.model.module, PIXELS)
    loaded = compress.load(compress.save(outcome.model, tmp_path / "model"))
    assert is_reduced(loaded.module)
    for name, value in forward(loaded.module, PIXELS).items():
        assert torch.equal(value, wanted[name])
    first = forward(outcome.model.module, {"pixel_values": PIXELS["pixel_values"][:1]})
    torch.testing.assert_close(
        first["last_hidden_state"], wanted["last_hidden_state"][:1], atol=1e-5, rtol=1e-5
    )
    whole = copy.deepcopy(outcome.model.module)
    remove(whole)
    for name, value in forward(whole, PIXELS).items():
        assert torch.equal(value, forward(model.module, PIXELS)[name])
    assert is_reduced(outcome.model.module)


def test_both_ways_to_compute_agree():
    model = features()
    found = [
        forward(reduced(model, by=by).model.module, PIXELS)["last_hidden_state"]
        for by in ("gather", "matrix")
    ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_merging_pictures_of_one_colour_changes_nothing():
    """All patches are alike, but for their positions; without those, merging with sizes is exact."""
    model = classifier()
    with torch.no_grad():
        model.module.vit.embeddings.position_embeddings[:, 1:] = 0.3
    flat = {"pixel_values": torch.full((2, 3, 32, 32), 0.4)}
    wanted = forward(model.module, flat)["logits"]
    merged = reduced(model, keep=0.5).model.module
    torch.testing.assert_close(forward(merged, flat)["logits"], wanted, atol=1e-5, rtol=1e-4)
    unaware = reduced(model, keep=0.5, proportional=False).model.module
    assert (forward(unaware, flat)["logits"] - wanted).abs().max() > 1e-4


def test_padding_does_not_matter():
    config = tf.BertConfig(**BODY, vocab_size=90)
    model = made(tf.BertForSequenceClassification, config, tokens(), "text-classification")
    outcome = reduced(model, left=(24, 20, 14, 10), keep=None)
    assert outcome.steps[-1].record["protected"] == 1
    other = tokens()
    other["input_ids"][1, -7:] = 3
    found = [forward(outcome.model.module, one)["logits"] for one in (tokens(), other)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["transform", "tome", "prune"])
def test_it_is_exported_with_a_dynamic_batch(method, tmp_path):
    outcome = reduced(features(), method=method)
    artifact = export.Onnx(runtime="cpu").write(outcome.model, tmp_path)
    assert artifact.parity.relative < 1e-4
    assert artifact.inputs[0].shape[0] == "batch"
    three = torch.cat([PIXELS["pixel_values"], PIXELS["pixel_values"][:1]])
    given = export.load(tmp_path)(pixel_values=three).last_hidden_state
    wanted = forward(outcome.model.module, {"pixel_values": three})["last_hidden_state"]
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)


def test_it_is_quantized_afterwards():
    passes = [compress.MergeTokens(keep=0.7), compress.Quantize()]
    outcome = compress.apply(classifier(), passes, calibration=[PIXELS])
    assert len(outcome.steps[-1].changes) >= 4 * 6
    with pytest.raises(
        Unsuitable, match="The model is quantized already, and its ranges were measured with all tokens."
    ):
        compress.apply(outcome.model, [compress.MergeTokens(keep=0.7)])


@pytest.mark.parametrize(
    ("kind", "config", "example", "said"),
    [
        (tf.LlamaForCausalLM, tf.LlamaConfig(**BODY, vocab_size=90), tokens(), "is causal"),
        (
            tf.BeitForImageClassification,
            tf.BeitConfig(**EYES, use_relative_position_bias=True),
            PIXELS,
            "adds a term for each pair of positions",
        ),
        (
            tf.ResNetForImageClassification,
            tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 2], layer_type="basic"),
            PIXELS,
            "The model has no attention",
        ),
    ],
)
def test_what_cannot_be_reduced_is_declined_with_the_reason(kind, config, example, said):
    task = "text-generation" if "input_ids" in example else "image-classification"
    with pytest.raises(Unsuitable, match=said):
        reduced(made(kind, config, example, task))


def test_schedules_that_do_not_fit_are_declined():
    with pytest.raises(Unsuitable, match="`keep: 0.05` of the multiply-accumulates cannot be reached"):
        reduced(classifier(), keep=0.05)
    with pytest.raises(Unsuitable, match=r"`at: \[0\]` names blocks that cannot be reduced before"):
        reduced(classifier(), at=(0,))
    with pytest.raises(Unsuitable, match="is no schedule for 4 blocks and 65 tokens, 1 of them special"):
        reduced(classifier(), keep=None, left=(65, 20, 20, 20))
    with pytest.raises(
        ValidationError, match="give exactly one of `keep`, `remove`, `left`; here is none of them"
    ):
        compress.MergeTokens()
    with pytest.raises(ValidationError, match="`at` goes with `keep`"):
        compress.MergeTokens(remove=3, at=(1,))


def test_remove_takes_the_same_number_before_each_block():
    assert reduced(classifier(), keep=None, remove=9).steps[-1].record["left"] == [65, 56, 47, 38]
    assert reduced(classifier(), keep=None, remove=40).steps[-1].record["left"] == [65, 33, 17, 9]


def test_counts_are_multiples():
    left = reduced(classifier(), multiple=8).steps[-1].record["left"]
    assert all(count % 8 == 0 for count in left[1:])
