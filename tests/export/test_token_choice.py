"""Graphs of models that choose tokens: engines of every method, and a proof that knows that choices flip."""

import copy

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import compress
import export
from compress.errors import Unproved
from export import proof
from export.proof import prove
from export.tensorrt_source import written_call

SHAPES = {"batch": (1, 4, 8)}


def model(method):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
    )
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    plain = compress.Model(ViTForImageClassification(config).eval(), pixels, "image-classification")
    passes = [compress.MergeTokens(keep=0.7, method=method)]
    return compress.apply(plain, passes).model


def target(precision):
    return export.TensorRT(precision=precision, compute_capability=["8.9"], shapes=SHAPES)


@pytest.mark.parametrize("method", ["transform", "cluster"])
def test_an_engine_of_every_method_is_proved_in_float16(method, tmp_path):
    artifact = target("float16").write(model(method), tmp_path)
    assert artifact.parity.cosine > 0.999
    assert (tmp_path / "model.engine").stat().st_size > 0


def test_an_integer_engine_computes_its_plan_in_float(tmp_path):
    plain = model("transform")
    quantized = compress.apply(plain, [compress.Quantize()], calibration=[plain.example]).model
    artifact = target("int8").write(quantized, tmp_path)
    assert artifact.parity.cosine > 0.999
    products = dict(artifact.facts)["products"]
    assert products["int8"] == 6 * 4
    assert products["float16"] >= 3 * 2, "what compares tokens, and what merges them"


def test_a_flipped_choice_is_no_error_and_a_wrong_graph_is_one(tmp_path, monkeypatch):
    """Among so many pictures there are two merges of one that cost the same but for the last bits of float16."""
    tokens = model("tome")
    target("float16").write(tokens, tmp_path)
    pixels = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    graph, cases = tmp_path / "onnx" / "model.onnx", ({"pixel_values": pixels},)
    found = prove(graph, tokens.module, cases, "symmetric", "float16", written_call)
    assert 0.02 < found.parity.relative < 0.1
    wrong = copy.deepcopy(tokens.module)
    with torch.no_grad():
        wrong.classifier.weight[0] *= 1.5
    with pytest.raises(Unproved, match="of the largest value off its module"):
        prove(graph, wrong, cases, "symmetric", "float16", written_call)
    monkeypatch.setattr(proof, "NOISE_FACTOR", 0.0)
    with pytest.raises(Unproved, match="allowed is 0.02"):
        prove(graph, tokens.module, cases, "symmetric", "float16", written_call)
