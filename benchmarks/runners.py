"""Load one built variant in the runtime it was made for. A runner imports nothing but that runtime.

A runner takes the variant's folder and the number of threads (and options of its own), and returns a function
from input arrays, by name, to the last hidden state (batch, sequence, features) in float32. The next call may
overwrite the array that it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[Mapping[str, np.ndarray]], np.ndarray]

OUTPUT = "last_hidden_state"


def timed(
    runner: str, folder: str, options: Mapping[str, Any], batch: int, sequence: int, threads: int
) -> Callable[[], np.ndarray]:
    """A call of the loaded variant on `batch` x `sequence` tokens without padding, for `compress.timing`."""
    encode = load(runner, folder, options, threads)
    inputs = token_inputs(batch, sequence)
    return lambda: encode(inputs)


def token_inputs(batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Inputs of a BERT-type encoder: the same random tokens for everyone, all of them attended to."""
    shape = (batch, sequence)
    return {
        "input_ids": np.random.default_rng(0).integers(1000, 20000, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }


def onnxruntime(folder: Path, threads: int) -> Encode:
    """`model.onnx` by ONNX Runtime on the CPU, all graph optimizations on, as by default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run([OUTPUT], dict(inputs))[0]


def openvino(folder: Path, threads: int, precision: str) -> Encode:
    """`openvino_model.xml` by OpenVINO on the CPU. `precision` ("f32" or "bf16") is for what is not int8."""
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", settings).create_infer_request()

    def encode(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        request.infer(dict(inputs), share_inputs=True)
        return request.get_tensor(OUTPUT).data

    return encode


def pytorch(folder: Path, threads: int) -> Encode:
    """The checkpoint by torch, eager, in the precision that it is stored in."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder, dtype="auto").eval()

    def encode(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
            return model(**tensors)[OUTPUT].float().numpy()

    return encode


RUNNERS: dict[str, Callable[..., Encode]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "torch": pytorch,
}


def load(runner: str, folder: str | Path, options: Mapping[str, Any], threads: int) -> Encode:
    """The variant in `folder`, loaded by the runner of that name."""
    return RUNNERS[runner](Path(folder), threads=threads, **options)
