"""Run an exported ONNX folder on ONNX Runtime: called as the model was, or to generate text with its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers.exporters import ExportedModel
from transformers.exporters.utils import onnx_inputs

from compress.errors import ModelError, Unsuitable, UsageError
from compress.outputs import flatten_outputs

COMPONENT = "model"
"""The exporter's name for the one graph of a folder."""
GRAPH = "model.onnx"
"""The file of that graph."""

Value = Tensor | np.ndarray


class OnnxRunner:
    """One graph in one ONNX Runtime session on the CPU.

    Called with the forward keyword arguments of the model (tensors or arrays), it returns what the model
    returns, with tensors. A graph with a key-value cache starts with an empty one unless it is given
    `past_key_values`; its `attention_mask` and `position_ids` are derived where they are missing.
    """

    def __init__(self, folder: str | Path, threads: int | None = None, graph: str = GRAPH) -> None:
        """Open the model in `folder`, on `threads` threads (None: as many as ONNX Runtime finds cores).

        `graph` names another file with the same inputs and outputs to run instead, as it is written.

        Raises `ModelError` if the files are missing or ONNX Runtime cannot read them.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            exported = ExportedModel.from_pretrained(
                Path(folder), device="cpu", local_files_only=True, session_options=options
            )
        except Exception as error:
            raise ModelError(
                f"The exported model in {folder} cannot be opened: {str(error).strip().splitlines()[0]}",
                "Export it again.",
            ) from error
        self.exported = exported
        self.graph: Any = exported.runners[COMPONENT]
        if graph != GRAPH:
            self.graph.session = as_written(Path(folder) / graph)
        self.inputs = {spec.name: spec for spec in self.graph.session.get_inputs()}

    @property
    def cached(self) -> bool:
        """Whether the graph takes and gives a key-value cache."""
        return any(name.startswith("input.") for name in self.inputs)

    def __call__(self, past_key_values: Any = None, **inputs: Value) -> Any:
        """Run the graph. Raises `UsageError` where an input is missing; inputs the graph does not take are dropped."""
        tensors = {name: _tensor(value) for name, value in inputs.items() if value is not None}
        if self.cached:
            tensors = self._with_cache(tensors, past_key_values)
        self._require(tensors)
        return self.graph(**tensors)

    def generate(self, input_ids: Value, max_new_tokens: int, attention_mask: Value | None = None) -> Tensor:
        """Greedy decoding: `input_ids` (batch, length) followed by up to `max_new_tokens` new tokens a row.

        Stops where every row has met an end-of-sequence token of the model's generation config; rows that end
        earlier are filled with the pad token. Prompts of unequal length are padded on the left, and told by
        `attention_mask`. Raises `Unsuitable` for a graph without a cache.
        """
        if not self.cached:
            raise Unsuitable(
                "This graph has no key-value cache, so it cannot generate text.",
                "Export a model that was loaded with task text-generation.",
            )
        tokens = _tensor(input_ids)
        mask = torch.ones_like(tokens) if attention_mask is None else _tensor(attention_mask)
        ends, pad = self._special_tokens()
        done = torch.zeros(len(tokens), dtype=torch.bool)
        step, cache = tokens, None
        for _ in range(max_new_tokens):
            output = self(input_ids=step, attention_mask=mask, past_key_values=cache)
            chosen = output.logits[:, -1].argmax(-1).masked_fill(done, pad)
            step, cache = chosen[:, None].to(tokens.dtype), self.cache_of(output)
            tokens, mask = torch.cat([tokens, step], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            done |= torch.isin(chosen, ends)
            if done.all():
                break
        return tokens

    def cache_of(self, output: Any) -> Any:
        """The cache among what a run has given, for the `past_key_values` of the next one."""
        return getattr(output, self._cache_argument())

    def _special_tokens(self) -> tuple[Tensor, int]:
        """The tokens that end a text, and the one that fills up after it."""
        config = self.exported.generation_config or self.exported.config
        ends = getattr(config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        pad = getattr(config, "pad_token_id", None)
        return torch.tensor(ends, dtype=torch.long), pad if pad is not None else (ends[0] if ends else 0)

    def _with_cache(self, inputs: dict[str, Tensor], past: Any) -> dict[str, Any]:
        """`inputs` with a cache, and what can be derived from its length: the mask and the positions."""
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None:
            raise UsageError(
                "The graph's input `input_ids` is missing.", f"It takes {', '.join(self.inputs)}."
            )
        batch, length = tokens.shape[:2]
        state = self._empty_cache(batch) if past is None else {self._cache_argument(): past}
        seen = self._length_of(state)
        mask = inputs.get("attention_mask", torch.ones(batch, seen + length, dtype=torch.long))
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -length:]
        return {"attention_mask": mask, "position_ids": positions, **inputs, **state}

    def _cache_argument(self) -> str:
        """What the model calls its cache: transformers has called it `past_key_values` and `cache`."""
        return next(name.split(".")[1] for name in self.inputs if name.startswith("input."))

    def _length_of(self, state: dict[str, Any]) -> int:
        """Tokens in a cache, read from its tensors: the counter of a rebuilt cache may be the one of the trace."""
        leaves = onnx_inputs(list(self.inputs), state)
        lengths = (
            leaves[name].shape[axis]
            for name in leaves
            for axis, size in enumerate(self.inputs[name].shape)
            if str(size).endswith("past")
        )
        return max(lengths, default=0)

    def _empty_cache(self, batch: int) -> dict[str, Tensor]:
        """A state of length 0 by input name; state without a length (of a convolution, a recurrence) starts at 0."""
        state = {}
        for name, spec in self.inputs.items():
            if name.startswith("input."):
                sizes = [
                    size if isinstance(size, int) else batch if size == "batch" else 0 for size in spec.shape
                ]
                state[name.removeprefix("input.")] = torch.zeros(sizes, dtype=_DTYPES[spec.type])
        return state

    def _require(self, inputs: Mapping[str, Any]) -> None:
        given = {name.split(".")[0] for name in inputs}
        missing = [name for name in self.inputs if name.removeprefix("input.").split(".")[0] not in given]
        if missing:
            raise UsageError(
                f"The graph takes {', '.join(missing)}, which is not among the inputs given: {', '.join(given)}.",
                f"It takes {', '.join(self.inputs)}.",
            )


_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def _tensor(value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))


def as_written(onnx: Path) -> onnxruntime.InferenceSession:
    """A session that computes a graph op by op, with no integer kernels in place of Q/DQ."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])


def calls(onnx: Path) -> Sequence[Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """The ways to run the graph in the file `onnx` of an exported folder: as a whole, and with its cache in two
    steps.
    """
    runner = OnnxRunner(onnx.parent, graph=onnx.name)
    whole = partial(_whole, runner)
    return (whole, partial(_in_two_steps, runner)) if runner.cached else (whole,)


def _whole(runner: OnnxRunner, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return flatten_outputs(runner(**inputs))


def _in_two_steps(runner: OnnxRunner, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tokens but the last, and then the last with the cache of the others."""
    tokens = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(tokens))
    first = runner(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1])
    last = runner(input_ids=tokens[:, -1:], attention_mask=mask, past_key_values=runner.cache_of(first))
    parts = flatten_outputs(first), flatten_outputs(last)
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def timed_call(folder: str, inputs: str, threads: int) -> Callable[[], object]:
    """The call to time: the artifact in `folder` on the tensors in the safetensors file `inputs`."""
    from safetensors.torch import load_file

    runner = OnnxRunner(folder, threads)
    tensors = load_file(inputs)
    return lambda: runner(**tensors)
