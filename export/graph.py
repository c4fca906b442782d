"""From a model to its ONNX graph, through transformers' exporter: one graph, dynamic in every size that may vary."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.configs import using_cache
from compress.errors import ModelpressError, Unsuitable
from compress.plain import plain_copy
from export.dimensions import is_cache, name_dimensions

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn
    from transformers.exporters import ExportedModel

    from compress.layers.quantized import Scheme
    from compress.model import Inputs, Model


def generates(model: Model) -> bool:
    """Whether `model` writes text token by token, so that its graph needs a key-value cache."""
    return model.task == "text-generation" and hasattr(model.module, "generate")


def export_graph(model: Model, *, opset: int, scheme: Scheme, cache: bool = False) -> ExportedModel:
    """Trace `model` into one `onnx_ir` graph (`.program`), with what a runner needs to call it
    (`.components`).

    Weights are the module's own tensors, not copies, but for those that it computes from others: they are written
    as what they are computed to. Sizes that differ between calls are named: `batch`, `sequence`, and so on (see
    `name_dimensions`). Quantized layers are lowered to `scheme`.

    With `cache` the graph takes the key-value cache and any number of new tokens: an empty cache makes it the
    first step, one new token the following ones, so the weights are stored once. Without it no cache is
    returned.

    Raises `Unsuitable` with the first line of the cause if the model cannot be traced or translated.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    from compress.layers.quantized import lowered

    settings = OnnxConfig(dynamic=True, opset_version=opset)
    model = replace(model, module=plain_copy(model.module))
    try:
        with quiet(), bits_kept(), lowered(model.module, scheme), using_cache(model.module, cache):
            module, inputs = _traced_call(model, cache)
            exported = OnnxExporter().export(module, inputs, config=settings)
    except ModelpressError:
        raise  # an interruption, for one, says nothing about the model
    except Exception as error:
        raise _untraceable(model, error) from error
    _fix_numbers_in_cache(exported.program.graph, inputs)
    name_dimensions(exported.program.graph)
    return exported


def _fix_numbers_in_cache(graph: ir.Graph, inputs: dict[str, Any]) -> None:
    """Make single numbers among the cache inputs, such as a window's length, constants: they never change."""
    import onnx_ir as ir
    from transformers.exporters.utils import onnx_inputs

    numbers = [
        value for value in graph.inputs if is_cache(value) and value.shape is not None and not value.shape
    ]
    found = onnx_inputs([str(value.name) for value in numbers], inputs)
    for value in numbers:
        value.const_value = ir.tensor(found[str(value.name)].numpy(), name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)


def _traced_call(model: Model, cache: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The module and the forward arguments to trace: the example, or a decoding step of two tokens after it."""
    import torch
    from transformers.exporters.utils import decompose_for_generation

    if not cache:
        return model.module, with_padding(model.example)
    module: Any = model.module
    inputs = with_padding({"attention_mask": torch.ones_like(model.example["input_ids"]), **model.example})
    return decompose_for_generation(module, inputs, multi_token_decode=True)["decode"]


def with_padding(inputs: Inputs) -> dict[str, Any]:
    """`inputs` with a mask that masks something, the last token of the first row, if it is all ones.

    Models leave a mask of ones out, so a graph traced with one would ignore it, and a proof would not notice.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.shape[1] < 2 or not mask.bool().all():
        return dict(inputs)
    mask = mask.clone()
    mask[0, -1] = 0
    return {**inputs, "attention_mask": mask}


def _untraceable(model: Model, error: Exception) -> Unsuitable:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first_line = (str(cause).strip() or repr(cause)).splitlines()[0]
    return Unsuitable(
        f"{type(model.module).__name__} cannot be exported to ONNX: {type(cause).__name__}: {first_line}",
        f"The example holds {', '.join(model.example)}. Check that the module runs on it, that its forward keeps to "
        "tensors (no `.item()`, no Python branches on values), and that every operation has an ONNX translation.",
    )


@contextlib.contextmanager
def bits_kept() -> Iterator[None]:
    """Inside the block the exporter's optimizer leaves packed bits packed (see `compress.numerics.bit_masks`).

    Where they are few it would spread them to bytes, eight times as large. A runtime does that when it opens the file.
    """
    import onnxscript.optimizer

    optimize = onnxscript.optimizer.optimize_ir

    def patched(model: ir.Model, *args: Any, **kwargs: Any) -> Any:
        own = kwargs.pop("should_fold", None)

        def should_fold(node: ir.Node) -> bool | None:
            if node.op_type == "BitwiseAnd":
                return False
            return None if own is None else own(node)

        return optimize(model, *args, should_fold=should_fold, **kwargs)

    onnxscript.optimizer.optimize_ir = patched
    try:
        yield
    finally:
        onnxscript.optimizer.optimize_ir = optimize


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and warnings off the terminal; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
