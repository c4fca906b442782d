"""Fewer tokens in real architectures: what goes, what is given back, what is declined, and the way to ONNX."""

import copy
import re

import pytest
import torch
import transformers as tf
from pydantic import ValidationError

import compress
import export
from compress.errors import DataError, Unsuitable
from compress.layers.tokens import How, install, is_reduced, remove, watched
from compress.outputs import forward
from compress.passes.token_layout import site_of

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
        (tf.BeitModel, tf.BeitConfig(**EYES, use_relative_position_bias=True), 1),
        (tf.ViTMAEModel, tf.ViTMAEConfig(**EYES, mask_ratio=0.0), 1),
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


def test_hidden_states_that_are_read_have_every_position():
    """transformers records them behind each block: what is given back is what it sees, and the blocks do not."""
    model = made(tf.ViTModel, tf.ViTConfig(**EYES, output_hidden_states=True), PIXELS, "feature-extraction")
    outcome = reduced(model, keep=None, left=(65, 50, 40, 40))
    assert outcome.steps[-1].record["restored"] == [True] * 4
    given = forward(outcome.model.module, PIXELS)
    for name, value in forward(model.module, PIXELS).items():
        assert given[name].shape == value.shape
    assert torch.equal(given["hidden_states.1"], forward(model.module, PIXELS)["hidden_states.1"])
    assert len(given["hidden_states.3"][0].unique(dim=0)) == 40
    assert outcome.model.graph.macs["layers.3"] < 0.7 * model.graph.macs["layers.3"]


def depth_model():
    backbone = tf.Dinov2Config(**EYES, out_indices=[2, 4], reshape_hidden_states=False)
    config = tf.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=32,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    return made(tf.DepthAnythingForDepthEstimation, config, PIXELS, "depth-estimation")


DENSE = {
    "segmentation": lambda: made(
        tf.DPTForSemanticSegmentation,
        tf.DPTConfig(
            **EYES,
            num_labels=5,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=16,
            use_auxiliary_head=False,
        ),
        PIXELS,
        "image-segmentation",
    ),
    "depth": depth_model,
}


@pytest.mark.parametrize("method", ["transform", "cluster"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_heads_read_every_position(name, method):
    model = DENSE[name]()
    outcome = reduced(model, keep=0.97, method=method, at=(1,))
    wanted, given = forward(model.module, PIXELS), forward(outcome.model.module, PIXELS)
    assert {key: value.shape for key, value in given.items()} == {
        key: value.shape for key, value in wanted.items()
    }
    assert any(outcome.steps[-1].record["restored"][:-1])


def test_terms_for_pairs_of_positions_follow_their_tokens():
    """BEiT adds one to the scores: among the tokens left it is that of the places where they were."""
    config = tf.BeitConfig(**EYES, use_relative_position_bias=True)
    model = made(tf.BeitForImageClassification, config, PIXELS, "image-classification")
    with torch.no_grad():
        for layer in model.module.beit.layers:
            table = layer.relative_position_bias.relative_position_bias_table
            table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    outcome = reduced(model, keep=None, left=(65, 40, 40, 40), method="prune", fuse=False)
    module, seen = outcome.model.module, []
    inner = module.beit.layers[2]
    inner.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with watched(module) as maps:
        forward(module, PIXELS)
    owner = maps[0].owner[0]
    places = [int((owner == number).nonzero()[0]) for number in range(40)]
    plain = copy.deepcopy(model.module.beit.layers[2])
    bias = plain.relative_position_bias((8, 8))[:, :, places][..., places]
    plain.relative_position_bias = None
    wanted = plain(seen[0][0][:1], attention_mask=bias)
    torch.testing.assert_close(seen[0][1][:1], wanted, atol=1e-5, rtol=1e-5)


def test_the_vision_tower_of_a_language_model_is_reduced():
    """LLaVA reads the states behind the last block but one: all of its places are given back there."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**EYES),
        text_config=tf.LlamaConfig(**BODY, vocab_size=99),
        image_token_index=98,
        vision_feature_layer=-2,
    )
    ids = torch.randint(1, 90, (2, 70), generator=torch.Generator().manual_seed(0))
    ids[:, 1:65] = 98
    example = {**PIXELS, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = made(tf.LlavaForConditionalGeneration, config, example, "text-generation")
    outcome = reduced(model, keep=0.9, scope={"include": ["model.vision_tower.*"]})
    assert outcome.steps[-1].record["restored"][:2] == [False, False]
    assert outcome.steps[-1].record["restored"][2]
    assert len(outcome.steps[-1].changes) == 3


def test_sampling_hides_or_takes_away_what_was_not_drawn():
    """All that is drawn has room in the capped form, so that both give the class token the same."""
    model = classifier()
    with torch.no_grad():
        for layer in model.module.vit.layers:
            layer.attention.q_proj.weight.mul_(12)
            layer.attention.k_proj.weight.mul_(12)
    exact = reduced(model, keep=None, method="sample", mask=True, at=(1, 2))
    assert exact.steps[-1].record["left"] == [65, 65, 65, 65]
    capped = compress.apply(model, [compress.MergeTokens(method="sample", at=(1, 2))], calibration=[PIXELS])
    left = capped.steps[-1].record["left"]
    assert 1 < left[2] < left[1] < 65
    found = [forward(one.model.module, PIXELS)["logits"] for one in (exact, capped)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    few = reduced(model, keep=None, method="sample", samples=5, mask=True, at=(1,))
    with watched(few.model.module) as maps:
        forward(few.model.module, PIXELS)
    assert maps[0].alive.sum(1).max() <= 6
    with pytest.raises(DataError, match="`merge_tokens` needs calibration data"):
        reduced(model, keep=None, method="sample")


def test_clusters_lie_on_the_grid_and_give_back_what_they_can():
    model = features()
    outcome = reduced(model, keep=0.7, method="cluster", at=(2,))
    clusters = outcome.steps[-1].record["clusters"]
    rows, columns = clusters["centres"]
    assert clusters["grid"] == [8, 8]
    assert outcome.steps[-1].record["left"] == [65, 65, 1 + rows * columns, 1 + rows * columns]
    wanted = forward(model.module, PIXELS)["last_hidden_state"]
    errors = [
        float(
            (
                forward(
                    reduced(model, keep=0.7, method="cluster", at=(2,), temperature=one).model.module, PIXELS
                )["last_hidden_state"]
                - wanted
            ).norm()
        )
        for one in (clusters["temperature"], 1e-6)
    ]
    assert errors[0] < errors[1]


def test_calibration_data_chooses_the_places():
    model = classifier()
    plain = reduced(model, keep=0.6)
    chosen = compress.apply(model, [compress.MergeTokens(keep=0.6)], calibration=[PIXELS])
    wanted = forward(model.module, PIXELS)["logits"]
    errors = [float((forward(one.model.module, PIXELS)["logits"] - wanted).norm()) for one in (chosen, plain)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "tome"},
        {"method": "prune"},
        {"method": "prune", "fuse": False},
        {"method": "sample"},
        {"method": "cluster"},
    ],
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


def test_reducers_that_take_nothing_away_change_no_bit():
    model = features()
    layout = site_of(model, model.graph.stacks[0], compress.MergeTokens(keep=0.5)).layout
    module = copy.deepcopy(model.module)
    install(module, layout, How("transform"))
    wanted = forward(model.module, PIXELS)
    for name, value in forward(module, PIXELS).items():
        assert torch.equal(value, wanted[name])


@pytest.mark.parametrize("settings", [{}, {"by": "gather"}, {"method": "tome"}, {"method": "cluster"}])
def test_the_counted_cost_is_that_of_the_schedule(settings):
    """What the schedule is computed from is what the operations in the graph cost, within half a per cent."""
    model = classifier()
    outcome = reduced(model, **settings)
    said = re.search(r"([\d.]+) % of the model's", outcome.steps[-1].changes[-1].after)
    counted = 100 * outcome.model.graph.macs[""] / model.graph.macs[""]
    assert float(said[1]) == pytest.approx(counted, abs=0.5)


def test_an_encoder_of_sound_is_reduced():
    config = tf.WhisperConfig(
        d_model=32,
        encoder_layers=4,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=99,
        pad_token_id=0,
        num_mel_bins=8,
        max_source_positions=50,
    )
    sound = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
    example = {"input_features": sound, "decoder_input_ids": torch.randint(3, 90, (2, 6))}
    model = made(tf.WhisperForConditionalGeneration, config, example, "automatic-speech-recognition")
    outcome = reduced(model, keep=0.85, scope={"include": ["model.encoder.*"]})
    assert outcome.steps[-1].record["protected"] == 0
    assert outcome.steps[-1].record["restored"] == [False, False, False, True]
    assert outcome.steps[-1].record["left"][-1] < 35


def test_both_ways_to_compute_agree():
    model = features()
    found = [
        forward(reduced(model, keep=None, remove=9, by=by).model.module, PIXELS)["last_hidden_state"]
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


@pytest.mark.parametrize("method", ["transform", "tome", "prune", "sample", "cluster"])
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
            tf.SwinForImageClassification,
            tf.SwinConfig(
                image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4
            ),
            PIXELS,
            "runs over 32 windows of 16 places, and the block over 2 sequences of 256",
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
    for settings, said in (
        ({"keep": 0.5, "method": "tome", "samples": 3}, "`samples` goes with `method: sample`"),
        ({"keep": 0.5, "method": "sample", "mask": True}, "`mask: true` keeps all tokens; take `keep` out"),
        ({"remove": 5, "method": "cluster"}, "`method: cluster` takes `keep`, and one block in `at`"),
    ):
        with pytest.raises(ValidationError, match=said):
            compress.MergeTokens(**settings)
    with pytest.raises(ValidationError, match="`at` goes with `keep`"):
        compress.MergeTokens(remove=3, at=(1,))


def test_remove_takes_the_same_number_before_each_block():
    assert reduced(classifier(), keep=None, remove=9).steps[-1].record["left"] == [65, 56, 47, 38]
    assert reduced(classifier(), keep=None, remove=40).steps[-1].record["left"] == [65, 33, 17, 9]


def test_counts_are_multiples():
    left = reduced(classifier(), multiple=8).steps[-1].record["left"]
    assert all(count % 8 == 0 for count in left[1:])
