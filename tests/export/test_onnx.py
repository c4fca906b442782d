"""The ONNX target: what it writes, that it is dynamic, lowered and proved, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import export
import tests.tiny as tiny
import tests.zoo as zoo
from compress.artifacts import read_artifact
from compress.compare import flatten_outputs, forward, parity
from compress.errors import ModelError, Unproved, Unsuitable
from compress.layers.quantized import Activation, QuantizedLinear
from compress.model import Model
from compress.passes.base import Context
from compress.passes.quantize import Quantize
from compress.target import Artifact
from export import proof
from export.lowering import cpu
from export.lowering.constants import array, constant

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bert() -> Model:
    """A model whose biases, zero in a new one, add something."""
    model = tiny.bert()
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def written(bert: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The written model. On the way: the module is what it was before."""
    before = {name: value.clone() for name, value in bert.module.state_dict().items()}
    config, reference = bert.module.config.to_dict(), forward(bert.module, bert.example)
    artifact = export.Onnx().write(bert, tmp_path_factory.mktemp("onnx") / "bert")
    assert bert.module.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in bert.module.state_dict().items())
    assert parity(reference, forward(bert.module, bert.example)).max_abs == 0
    return artifact


@pytest.fixture(scope="module")
def quantized(bert: Model) -> Model:
    own = replace(bert, module=copy.deepcopy(bert.module))
    result = Quantize(attention=True).apply(own, Context(calibration=[bert.example]))
    return replace(own, module=result.module)


@pytest.fixture(scope="module")
def lowered(quantized: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export.Onnx().write(quantized, tmp_path_factory.mktemp("onnx") / "int8")


def ops(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(artifact.folder / "model.onnx").graph)


def test_a_float_graph_is_proved(written: Artifact):
    assert written.parity.relative < 1e-5
    assert written.parity.cosine > 0.99999
    assert written.facts["proof"]["noise"] is None


def test_the_folder_is_self_sufficient(written: Artifact, bert: Model):
    names = {file.name for file in written.files}
    assert {"model.onnx", "model.onnx.data", "export.json", "config.json", "tokenizer.json"} <= names
    assert all((written.folder / file.name).stat().st_size == file.bytes for file in written.files)


def test_the_artifact_reads_back_from_its_folder(written: Artifact, tmp_path: Path):
    assert read_artifact(written.folder) == written
    moved = written.folder.rename(tmp_path / "moved")
    assert read_artifact(moved) == replace(written, folder=moved)
    moved.rename(written.folder)


def test_sizes_are_named(written: Artifact):
    assert {spec.name: spec.shape for spec in written.inputs} == {
        "input_ids": ("batch", "sequence"),
        "token_type_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
    }
    assert {spec.name: spec.shape for spec in written.outputs} == {
        "last_hidden_state": ("batch", "sequence", 32),
        "pooler_output": ("batch", 32),
    }


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (5, 30)])
def test_sizes_are_dynamic(written: Artifact, bert: Model, batch: int, length: int):
    inputs = {name: value[:1, :1].repeat(batch, length) for name, value in bert.example.items()}
    outputs = flatten_outputs(export.load(written.folder)(**inputs))
    assert parity(forward(bert.module, inputs), outputs).relative < 1e-5


def test_residuals_are_summed_in_a_float_graph_too(written: Artifact):
    assert written.facts["rewrites"]["sum_residuals"] == 5
    assert ops(written)["Sum"] == 5


@pytest.mark.parametrize(
    "build", [tiny.vit, lambda: tiny.bert_classifier({0: "no", 1: "yes"})], ids=["vit", "bert"]
)
def test_a_classifier_computes_what_it_reads(build: Callable[[], Model], tmp_path: Path):
    artifact = export.Onnx().write(build(), tmp_path / "classifier")
    last = [
        node for node in ir.load(tmp_path / "classifier" / "model.onnx").graph if node.op_type == "Attention"
    ][-1]
    assert last.inputs[0].shape[1] == 1
    assert artifact.facts["rewrites"]["select_early"] >= 10
    assert artifact.parity.relative < 1e-5


def test_a_mask_for_pictures_is_not_in_the_file(tmp_path: Path):
    artifact = export.Onnx().write(tiny.vit(), tmp_path / "vit")
    found = ops(artifact)
    assert found["Attention"] == 2
    assert found["Where"] == found["Not"] == found["ReduceSum"] == 0


def test_no_path_of_this_machine_is_in_the_file(written: Artifact):
    assert str(Path(nn.__file__).parent).encode() not in (written.folder / "model.onnx").read_bytes()


def test_a_quantized_graph_computes_in_integers(lowered: Artifact):
    layers, linears, attention, pooler = 2, 6, 2, 1
    found = ops(lowered)
    assert found["MatMulIntegerToFloat"] == layers * (linears + attention) + pooler
    assert found["DequantizeLinear"] == found["MatMul"] == 0
    # One rounding for query, key and value together, three for the other linears, four in each attention.
    assert found["QuantizeLinear"] == layers * (4 + 4) + pooler
    assert lowered.facts["rewrites"]["fold_product_scales"] == layers


def test_float_attentions_between_integer_products_take_whole_rows(bert: Model, tmp_path: Path):
    own = replace(bert, module=copy.deepcopy(bert.module))
    result = Quantize().apply(own, Context(calibration=[bert.example]))
    artifact = export.Onnx().write(replace(own, module=result.module), tmp_path / "int8")
    found = ops(artifact)
    assert (found["Attention"], found["Where"], found["Transpose"]) == (2, 2, 0)
    assert artifact.facts["rewrites"]["quantize_early"] == 2  # the zeros of queries without keys
    assert artifact.facts["proof"]["without_rounding"]["relative"] < 1e-5


def test_integer_weights_are_small(lowered: Artifact, written: Artifact, bert: Model):
    embeddings = 4 * sum(
        parameter.numel() for name, parameter in bert.module.named_parameters() if "embeddings" in name
    )
    sizes = [(one.folder / "model.onnx.data").stat().st_size - embeddings for one in (lowered, written)]
    assert sizes[0] < 0.45 * sizes[1]  # the pooler and the norms of so small a model weigh a lot


def test_a_quantized_graph_is_proved_twice(lowered: Artifact):
    found = lowered.facts["proof"]
    assert found["without_rounding"]["relative"] < 1e-5
    assert lowered.parity.relative <= proof.ROUNDING_TOLERANCE + 2 * found["noise"]["relative"]


def _scaled(values: np.ndarray) -> np.ndarray:
    return (values * np.float32(1.1)).astype(values.dtype)


def _first(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.concatenate([change(values[:1]), values[1:]])


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (1, np.flipud),
        (2, _scaled),
        (3, _first(_scaled)),
        (4, lambda zero_point: zero_point + np.uint8(1)),
        (6, _first(lambda bias: bias + np.float32(0.1))),
    ],
    ids=["weight", "scale", "scale of a column", "zero point", "bias"],
)
def test_a_product_that_is_off_by_less_than_the_rounding_is_unproved(
    quantized: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, change: Callable
):
    lower = cpu.lower_cpu

    def lower_wrongly(model: ir.Model) -> dict[str, int]:
        rewrites = lower(model)
        products = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
        linear = [node for node in products if len(node.inputs) == 7][-1]  # the last output of an MLP
        wrong = constant(model.graph, "wrong", change(array(linear.inputs[index])))
        linear.replace_input_with(index, wrong)
        return rewrites

    monkeypatch.setattr(cpu, "lower_cpu", lower_wrongly)
    with pytest.raises(Unproved, match=r"both without the rounding to integers; allowed is 0\.0001"):
        export.Onnx().write(quantized, tmp_path / "int8")


def test_the_standard_runtime_keeps_to_the_standard(quantized: Model, tmp_path: Path):
    artifact = export.Onnx(runtime="standard", opset=18).write(quantized, tmp_path / "standard")
    graph = ir.load(artifact.folder / "model.onnx").graph
    assert {node.domain for node in graph} == {""}
    weights = [
        node for node in graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    ]
    assert len(weights) == 2 * 6 + 1
    assert all(use.node.op_type == "MatMul" for node in weights for use in node.outputs[0].uses())


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_models_of_two_parts_are_one_graph(name: str, tmp_path: Path):
    model = zoo.build(name)
    artifact = export.Onnx().write(model, tmp_path / name)
    assert artifact.parity.relative < 1e-5
    if name == "clip":
        assert {spec.name: spec.shape for spec in artifact.outputs}["logits_per_image"] == (
            "pixel_values_batch",
            "batch",
        )
    else:
        assert {spec.name for spec in artifact.outputs} == {"logits", "encoder_last_hidden_state"}


class Small(nn.Module):
    """A linear map that can be made to misbehave."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.linear = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fault == "branch" and x.sum().item() > 0:
            return self.linear(-x)
        return self.linear(x).relu()


def small(fault: str = "") -> Model:
    torch.manual_seed(0)
    return Model(Small(fault).eval(), {"x": torch.randn(3, 8)}, "feature-extraction")


def test_a_plain_module_gives_its_plain_tensor_and_prints_nothing(tmp_path: Path, capfd):
    model = small()
    run = export.load(export.Onnx().write(model, tmp_path / "small").folder)
    assert capfd.readouterr().out == ""
    torch.testing.assert_close(run(x=model.example["x"]), model.module(model.example["x"]))


def test_a_quantized_matrix_product_is_an_integer_product(tmp_path: Path):
    model = small()
    model.module.linear = QuantizedLinear(model.module.linear, Activation(-3.0, 3.0))
    artifact = export.Onnx().write(model, tmp_path / "small")
    assert ops(artifact) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Relu": 1}


def test_an_untraceable_module_is_unsuitable(tmp_path: Path):
    with pytest.raises(Unsuitable, match="Small cannot be exported to ONNX: ") as raised:
        export.Onnx().write(small("branch"), tmp_path / "small")
    assert "The example holds x." in raised.value.remedy
    assert len(raised.value.fact.splitlines()) == 1


def test_a_wrong_rewrite_is_unproved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def break_it(model: ir.Model) -> dict[str, int]:
        relu = next(node for node in model.graph if node.op_type == "Relu")
        relu.op_type = "Abs"
        return {}

    monkeypatch.setattr(cpu, "lower_cpu", break_it)
    with pytest.raises(
        Unproved, match=r"The ONNX graph is [\d.]+ of the largest value off its module; allowed is 0\.0001"
    ):
        export.Onnx().write(small(), tmp_path / "small")
    assert not (tmp_path / "small" / "artifact.json").exists()


def test_a_folder_without_an_artifact_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no artifact\.json"):
        export.load(tmp_path)


def test_a_torn_record_is_refused(tmp_path: Path):
    (tmp_path / "artifact.json").write_text(json.dumps({"target": "onnx"}))
    with pytest.raises(ModelError, match=r"artifact\.json cannot be read: KeyError"):
        export.load(tmp_path)
