"""Run an engine on the GPU that it was built for: the same calls for both editions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers.utils import ModelOutput

from compress.errors import Unproved, UsageError
from export.tensorrt_edition import import_edition, require_gpu
from export.tensorrt_engine import new_log
from export.tensorrt_record import ENGINE, read_record


class Engine:
    """An engine on the current GPU. Called with forward keyword arguments, it gives the outputs on the CPU,
    by name.
    """

    def __init__(self, folder: Path) -> None:
        """Open the engine in `folder`.

        Raises `WrongDevice` without a GPU of its compute capability, and `Unproved` if the runtime refuses it.
        """
        record = read_record(folder)
        require_gpu(tuple(record["compute_capability"]))
        self.trt = import_edition(record["edition"])
        self.log = new_log(self.trt)
        self.runtime = self.trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if self.engine is None:
            raise Unproved(
                f"TensorRT {self.trt.__version__} refuses {folder / ENGINE}: {'; '.join(self.log.errors)}.",
                f"It was built by version {record['version']}: install that one, or export the engine again.",
            )
        self.context = self.engine.create_execution_context()

    def __call__(self, **inputs: torch.Tensor) -> ModelOutput:
        """Run on tensors of any device. Raises `UsageError` for a shape outside the engine's profile."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            held = {name: self._bind_input(name, inputs) for name in self._names("INPUT")}
            outputs = {name: self._bind_output(name) for name in self._names("OUTPUT")}
            if not self.context.execute_async_v3(stream.cuda_stream):
                raise Unproved(
                    f"The engine failed: {'; '.join(self.log.errors)}.", "Check the GPU's free memory."
                )
        stream.synchronize()
        del held
        return ModelOutput({name: value.cpu() for name, value in outputs.items()})

    def _names(self, mode: str) -> list[str]:
        names = (self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors))
        return [name for name in names if self.engine.get_tensor_mode(name).name == mode]

    def _bind_input(self, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if name not in inputs:
            raise UsageError(
                f"The engine's input `{name}` is missing.", f"It takes {', '.join(self._names('INPUT'))}."
            )
        tensor = inputs[name].to("cuda", self._dtype(name)).contiguous()
        if not self.context.set_input_shape(name, tuple(tensor.shape)):
            low, _, high = (tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, 0))
            raise UsageError(
                f"`{name}` has the shape {tuple(tensor.shape)}; the engine takes {low} to {high}."
            )
        self.context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _bind_output(self, name: str) -> torch.Tensor:
        shape = tuple(self.context.get_tensor_shape(name))
        tensor = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        self.context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _dtype(self, name: str) -> torch.dtype:
        array = np.empty(0, self.trt.nptype(self.engine.get_tensor_dtype(name)))
        return torch.from_numpy(array).dtype
