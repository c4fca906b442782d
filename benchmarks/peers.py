"""How each peer makes its artifact of a sentence encoder, with the settings that its own guide recommends.

A builder takes the folder it starts from, the calibration texts (the same for all), and the folder to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_LENGTH = 128


def torch_float32(model: Path, _: Sequence[str], into: Path) -> None:
    """The checkpoint as it is."""
    import torch

    _load(model, torch.float32).save_pretrained(into)


def torch_bfloat16(model: Path, _: Sequence[str], into: Path) -> None:
    """The checkpoint with every weight rounded to bfloat16."""
    import torch

    _load(model, torch.bfloat16).save_pretrained(into)


def onnx_float32(model: Path, _: Sequence[str], into: Path) -> None:
    """As `transformers.exporters` writes it, in its default configuration but for dynamic shapes."""
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    module = _load(model, torch.float32)
    OnnxExporter().export(module, _example(model), config=OnnxConfig(dynamic=True)).save_pretrained(into)
    _tokenizer(model).save_pretrained(into)


def onnx_dynamic(base: Path, _: Sequence[str], into: Path) -> None:
    """ONNX Runtime's `quantize_dynamic`: int8 weights per channel, activations quantized as they come."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_without_stale_shapes(base, into), into / "model.onnx", per_channel=True)
    (into / "float.onnx").unlink()


def onnx_static(base: Path, texts: Sequence[str], into: Path) -> None:
    """ONNX Runtime's `quantize_static` with its defaults (int8 x int8, every op), per channel."""
    _quantize_static(base, texts, into, per_channel=True)


def onnx_static_tuned(base: Path, texts: Sequence[str], into: Path) -> None:
    """`quantize_static` as an expert sets it for x86: uint8 x int8, products with constant weights only."""
    from onnxruntime.quantization import QuantType

    _quantize_static(
        base,
        texts,
        into,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
    )


def openvino_float32(model: Path, _: Sequence[str], into: Path) -> None:
    """As `transformers.exporters` writes it for OpenVINO. Bfloat16 is the same file under another hint."""
    import torch
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    module = _load(model, torch.float32)
    OpenVINOExporter().export(module, _example(model), config=OpenVINOConfig(dynamic=True)).save_pretrained(
        into
    )
    _tokenizer(model).save_pretrained(into)


def openvino_int8(base: Path, texts: Sequence[str], into: Path) -> None:
    """NNCF's post-training int8 for transformers (SmoothQuant and bias correction are on by default)."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(base / "openvino_model.xml")
    samples = list(_samples(base, texts))
    quantized = nncf.quantize(
        model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
    )
    ov.save_model(quantized, into / "openvino_model.xml", compress_to_fp16=False)


def _quantize_static(base: Path, texts: Sequence[str], into: Path, **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = _samples(base, texts)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    quantize_static(_without_stale_shapes(base, into), into / "model.onnx", Reader(), **options)
    (into / "float.onnx").unlink()


def _without_stale_shapes(base: Path, into: Path) -> Path:
    """The float32 file of `base`, in one piece, without the recorded shapes of its weights.

    ONNX Runtime's quantizer transposes `Gemm` weights in place, and then the recorded shapes disagree.
    """
    import onnx

    model = onnx.load(base / "model.onnx")
    weights = {weight.name for weight in model.graph.initializer}
    kept = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, into / "float.onnx")
    return into / "float.onnx"


def _samples(folder: Path, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The calibration texts, one by one, as arrays of shape (1, tokens)."""
    tokenizer = _tokenizer(folder)
    for text in texts:
        yield dict(tokenizer([text], truncation=True, max_length=MAX_LENGTH, return_tensors="np"))


def _example(model: Path) -> dict[str, torch.Tensor]:
    """Two texts of different length, so that batch and sequence are dynamic and the mask is used."""
    texts = ["A short sentence.", "Another sentence, which is somewhat longer than the first one."]
    return dict(_tokenizer(model)(texts, padding=True, return_tensors="pt"))


def _load(model: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(model, dtype=dtype).eval()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
