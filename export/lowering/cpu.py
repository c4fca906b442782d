"""All rewrites for ONNX Runtime on a CPU, in order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from export.lowering.attention_layout import flatten_attentions
from export.lowering.carried_addends import carry_addends
from export.lowering.gemm import split_quantized_gemms
from export.lowering.integer_matmul import use_integer_matmuls
from export.lowering.product_scale import fold_product_scales
from export.lowering.quantize_early import quantize_early
from export.lowering.residual_sum import sum_residuals
from export.lowering.select_early import select_early
from export.lowering.shared_weights import share_constants
from export.lowering.uniform import drop_uniform
from export.lowering.weight_layout import transpose_weights


def lower_standard(model: ir.Model) -> dict[str, int]:
    """The rewrites that stay within the ONNX standard, in place. Returns how often each one was applied."""
    common.ClearMetadataAndDocStringPass()(model)  # names of functions and paths on the exporting machine
    shared = share_constants(model)
    common.CommonSubexpressionEliminationPass()(model)
    return {
        "share_constants": shared,
        "drop_uniform": drop_uniform(model),
        "split_quantized_gemms": split_quantized_gemms(model),
        "transpose_weights": transpose_weights(model),
        "fold_product_scales": fold_product_scales(model),
    }


def lower_cpu(model: ir.Model) -> dict[str, int]:
    """All rewrites for ONNX Runtime's CPU kernels, in place. Returns how often each one was applied."""
    return {
        **lower_standard(model),
        "flatten_attentions": flatten_attentions(model),
        "carry_addends": carry_addends(model),
        "select_early": select_early(model),
        "quantize_early": quantize_early(model),
        "use_integer_matmuls": use_integer_matmuls(model),
        "sum_residuals": sum_residuals(model),
    }
