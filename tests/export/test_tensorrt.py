"""TensorRT-RTX engines of tiny models, built without a GPU, and what is asserted before one is built."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir
import pytest
import torch
from pydantic import ValidationError

import compress
import export
from compress.artifacts import read_artifact
from compress.errors import MissingPackage, Unproved, Unsuitable, UsageError
from compress.model import Model
from compress.target import Artifact
from export.lowering.tensorrt_int8 import lower_tensorrt
from export.lowering.unrounded import remove_rounding
from export.proof import prove
from export.tensorrt_edition import offered_capabilities
from export.tensorrt_engine import build, dynamic_dimensions, parse, profile_of, require_shapes
from export.tensorrt_network import products, require_int8
from export.tensorrt_source import written_call
from tests import tiny

CAPABILITIES = ("7.5", "8.6", "8.9", "12.0")
TEXT = {"batch": (1, 2, 4), "sequence": (8, 16, 32)}
IMAGES = {"batch": (1, 2, 4)}
QUANTIZED = 7
"""Linear layers of a BERT of one layer: six, and the pooler's."""
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def rtx(precision: str, shapes: dict = TEXT, **changes) -> export.TensorRT:
    settings = {"precision": precision, "compute_capability": CAPABILITIES, "shapes": shapes, **changes}
    return export.TensorRT(**settings)


def quantized(model: Model) -> Model:
    return compress.apply(model, [compress.Quantize()], calibration=[model.example]).model


@dataclass(frozen=True)
class Case:
    """A model, its engine, and the sizes that the engine takes."""

    model: Model
    artifact: Artifact
    shapes: dict


def written(model: Model, precision: str, shapes: dict, folder) -> Case:
    return Case(model, rtx(precision, shapes).write(model, folder), shapes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture(scope="module")
def bert_int8(folders):
    model = quantized(tiny.bert(**SMALL))
    return written(model, "int8", TEXT, folders / "bert-int8")


@pytest.fixture(scope="module")
def bert_float16(folders):
    return written(tiny.bert(**SMALL), "float16", TEXT, folders / "bert-float16")


@pytest.fixture(scope="module")
def vit_int8(folders):
    return written(quantized(tiny.vit()), "int8", IMAGES, folders / "vit-int8")


@pytest.fixture(scope="module")
def vit_float16(folders):
    return written(tiny.vit(), "float16", IMAGES, folders / "vit-float16")


@pytest.mark.parametrize("case", ["bert_int8", "bert_float16", "vit_int8", "vit_float16"])
def test_an_engine_builds_for_each_capability_alone(case, request):
    built = request.getfixturevalue(case)
    profile = profile_of(built.artifact.inputs, built.shapes)
    for capability in CAPABILITIES:
        parsed = parse("rtx", built.artifact.folder / "onnx" / "model.onnx")
        assert build(parsed, profile, (capability,)).nbytes > 100_000


def test_one_file_serves_all_capabilities_and_says_so(bert_int8):
    folder = bert_int8.artifact.folder
    record = json.loads((folder / "engine.json").read_text())
    content = (folder / "model.engine").read_bytes()
    assert record["compute_capability"] == list(CAPABILITIES)
    assert record["engine"] == {
        "name": "model.engine",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert (record["edition"], record["precision"]) == ("rtx", "int8")
    assert record["version"] == importlib.import_module("tensorrt_rtx").__version__
    assert record["profile"]["input_ids"] == {"min": [1, 8], "opt": [2, 16], "max": [4, 32]}
    assert record["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    assert record["outputs"][0] == {
        "name": "last_hidden_state",
        "dtype": "float32",
        "shape": ["batch", "sequence", 64],
    }
    source = {file["name"]: file["sha256"] for file in record["source"]["files"]}
    assert (
        source["onnx/model.onnx"] == hashlib.sha256((folder / "onnx" / "model.onnx").read_bytes()).hexdigest()
    )
    assert record["source"]["model"] == "BertModel"


def test_products_of_quantized_layers_take_int8_on_both_inputs(bert_int8, bert_float16):
    assert bert_int8.artifact.facts["products"] == {"int8": QUANTIZED}
    assert bert_float16.artifact.facts["products"] == {"float16": QUANTIZED}
    assert bert_int8.artifact.facts["attentions"] == 1


def test_a_graph_whose_rounding_is_removed_is_refused(bert_int8):
    folder = bert_int8.artifact.folder / "onnx"
    model = ir.load(folder / "model.onnx")
    remove_rounding(model)
    ir.save(model, folder / "float.onnx")
    parsed = parse("rtx", folder / "float.onnx")
    with pytest.raises(
        Unproved, match=r"7 quantized products, .* int8 on both inputs of only 0, of 7"
    ) as caught:
        require_int8(products(parsed.trt, parsed.network), QUANTIZED)
    assert "(float16 x int8)" in str(caught.value)


def test_layers_that_read_one_norm_share_its_rounding(bert_int8):
    graph = onnx.load(bert_int8.artifact.folder / "onnx" / "model.onnx").graph
    rounded = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    # What query, key and value read; the attention's mixture; what the MLP reads; its inside; the pooler's input.
    assert len(rounded) == len(set(rounded)) == 5


def test_zero_points_are_zero_and_weights_int8_by_channel(bert_int8):
    model = ir.load(bert_int8.artifact.folder / "onnx" / "model.onnx")
    weights = 0
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                assert not ir.convenience.get_const_tensor(node.inputs[2]).numpy().any()
            scale = ir.convenience.get_const_tensor(node.inputs[1]).numpy()
            weight = node.inputs[0].const_value
            if weight is not None:
                weights += 1
                assert weight.dtype == ir.DataType.INT8
                assert scale.shape == (weight.shape[node.attributes["axis"].as_int()],)
                assert all(user.op_type == "MatMul" for user, _ in node.outputs[0].uses())
    assert weights == QUANTIZED


def test_an_asymmetric_graph_is_refused():
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y) <float s = {0.5}, uint8 z = {7}> {
            q = QuantizeLinear (x, s, z)
            y = DequantizeLinear (q, s, z)
        }
    """
    with pytest.raises(Unsuitable, match="a zero point other than 0"):
        lower_tensorrt(ir.serde.deserialize_model(onnx.parser.parse_model(text)))


def test_the_graph_is_proved_in_both_float_types(bert_int8, bert_float16):
    unrounded = [proof["without_rounding"] for proof in bert_int8.artifact.source.facts["proofs"]]
    assert all(one["relative"] < bound for one, bound in zip(unrounded, (1e-4, 0.02), strict=True))
    assert bert_int8.artifact.parity.cosine > 0.999
    assert 0 < bert_float16.artifact.parity.relative < 0.01


def test_a_graph_that_computes_something_else_is_not_built(bert_float16):
    other = tiny.bert(**SMALL)
    with torch.no_grad():
        other.module.encoder.layer[0].output.LayerNorm.weight[:8] *= 1.5
    graph = bert_float16.artifact.folder / "onnx" / "model.onnx"
    with pytest.raises(Unproved, match=r"of the largest value off its module; allowed is 0.02"):
        prove(graph, other.module, (other.example,), "symmetric", "float16", written_call)


def test_a_causal_model_with_rotary_embeddings_is_one_graph_without_a_cache(folders):
    model = tiny.llama(num_hidden_layers=1)
    artifact = rtx("float16").write(model, folders / "llama")
    assert [spec.name for spec in artifact.inputs] == list(model.example)
    assert [spec.name for spec in artifact.outputs] == ["logits"]
    assert artifact.parity.relative < 0.02
    graph = ir.load(artifact.folder / "onnx" / "model.onnx").graph
    angles = [node for node in graph if node.op_type in ("Sin", "Cos", "Pow", "ReduceMean")]
    assert angles
    assert {node.outputs[0].dtype for node in angles} == {ir.DataType.FLOAT}


def test_an_engine_without_its_gpu_says_what_it_needs(bert_int8):
    with pytest.raises(Unsuitable, match=r"compute capability 7.5, 8.6, 8.9, 12.0; this machine has"):
        export.load(bert_int8.artifact.folder)


def test_dimensions_must_be_named_exactly(bert_float16):
    dimensions = dynamic_dimensions(bert_float16.artifact.inputs)
    assert dimensions == ("batch", "sequence")
    with pytest.raises(UsageError) as caught:
        require_shapes({"batch": (1, 2, 4), "length": (8, 16, 32)}, dimensions)
    assert "`length` is no dynamic dimension of this model" in str(caught.value)
    assert "`sequence` has no sizes" in str(caught.value)
    assert "{batch: [min, opt, max], sequence: [min, opt, max]}" in caught.value.remedy
    with pytest.raises(UsageError, match="every dimension of this model is fixed"):
        require_shapes({"batch": (1, 2, 4)}, ())


def test_precision_must_fit_the_model(bert_int8, tmp_path):
    with pytest.raises(Unsuitable, match="int8 needs a quantized model"):
        rtx("int8").write(tiny.bert(), tmp_path / "a")
    with pytest.raises(Unsuitable, match="precision: float16 is for models in float"):
        rtx("float16").write(bert_int8.model, tmp_path / "b")


def test_an_unknown_capability_lists_those_offered():
    with pytest.raises(UsageError, match=r"no engines for compute capability 9\.0") as caught:
        rtx("float16", compute_capability=("9.0",)).check(tiny.bert())
    assert caught.value.remedy == "It offers 7.5, 8.0, 8.6, 8.9, 12.0, 12.1."
    assert list(offered_capabilities(importlib.import_module("tensorrt_rtx")))[-1] == "12.1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shapes": {"batch": (4, 2, 8)}}, r"`batch` is \[4, 2, 8\], but must be 1 <= min <= opt <= max"),
        ({"compute_capability": ["sm86"]}, '"sm86" is no compute capability'),
        ({"compute_capability": ["8.6", "8.6"]}, "given twice"),
        ({"compute_capability": []}, "edition rtx needs compute_capability"),
        ({"edition": "datacenter"}, "leave compute_capability out"),
        ({"precision": "int4"}, "'float32', 'float16' or 'int8'"),
        ({"shape": {}}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        export.TensorRT(**{"compute_capability": ["8.6"], **settings})


def test_numbers_are_read_as_capabilities():
    given = {"compute_capability": [8.6, 12.0], "precision": "float16"}
    assert export.TensorRT.model_validate(given).compute_capability == ("8.6", "12.0")


@pytest.mark.parametrize(
    ("target", "module", "command"),
    [
        (rtx("float16"), "tensorrt_rtx", 'pip install "modelpress[tensorrt-rtx]"'),
        (export.TensorRT(edition="datacenter"), "tensorrt", 'pip install "modelpress[tensorrt]"'),
    ],
)
def test_a_missing_package_gives_the_pip_command(target, module, command, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match=f"needs the Python module `{module}`") as caught:
        target.check(tiny.bert())
    assert caught.value.remedy == f"Install it with: {command}"


def test_the_datacenter_edition_needs_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", importlib.import_module("tensorrt_rtx"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unsuitable, match="builds for the GPU of this machine, which has none"):
        export.TensorRT(edition="datacenter").check(tiny.bert())


def test_a_graph_that_the_parser_refuses_names_the_node(tmp_path):
    text = """
        <ir_version: 10, opset_import: ["" : 21, "custom" : 1]>
        g (float[2] x) => (float[2] y) { [odd] y = custom.Odd (x) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "odd.onnx")
    with pytest.raises(Unsuitable, match=r"cannot read the exported graph: Odd at odd: .*Plugin not found"):
        parse("rtx", tmp_path / "odd.onnx")


def test_the_baseline_of_int8_is_float16():
    assert rtx("int8").baseline() == rtx("float16")
    assert rtx("float32").baseline() == rtx("float32")


def test_the_written_model_is_left_as_it_was(bert_int8):
    scheme = {layer.scheme for layer in bert_int8.model.module.modules() if hasattr(layer, "scheme")}
    assert scheme == {"asymmetric"}
    assert replace(bert_int8.artifact, source=None) == replace(
        read_artifact(bert_int8.artifact.folder),
        source=None,
        facts=bert_int8.artifact.facts,
    )
