"""Compression passes, the runner that proves them, and recipes.

import compress, export

model = compress.load_model("path-or-name", task="feature-extraction")
outcome = compress.apply(model, "bert-int8-cpu")
compress.save(outcome.model, "build/minilm")
artifact = export.Onnx(runtime="cpu").write(outcome.model, "build/minilm-onnx")
"""

from compress.build import apply, build
from compress.checkpoint import load, open_model, save
from compress.errors import ModelpressError
from compress.model import Model, load_model
from compress.passes.base import Context, Pass, Result
from compress.passes.clip_softmax import ClipSoftmax
from compress.passes.distill import Distill
from compress.passes.drop_layers import DropLayers
from compress.passes.expand_depth import ExpandDepth
from compress.passes.factorize import Factorize
from compress.passes.factorize_sparse import FactorizeSparse
from compress.passes.fold_batch_norm import FoldBatchNorm
from compress.passes.fuse_layers import FuseLayers
from compress.passes.gate_attention import GateAttention
from compress.passes.group_queries import GroupQueries
from compress.passes.merge_tokens import MergeTokens
from compress.passes.multi_branch import MultiBranch
from compress.passes.progressive_batch_norm import ProgressiveBatchNorm
from compress.passes.quantize import Quantize
from compress.passes.simplify_attention import SimplifyAttention
from compress.passes.slice_ranks import SliceRanks
from compress.passes.smooth import Smooth
from compress.passes.sparsify import Sparsify
from compress.passes.train_ranks import TrainRanks
from compress.pipeline import Outcome, run
from compress.recipe import Recipe, load_recipe
from compress.report import Caution, Change, Parity, Skip, Step
from compress.scope import Scope
from compress.showing import show_tokens
from compress.streaming import stream
from compress.target import Artifact, Target

__all__ = [
    "Artifact",
    "Caution",
    "Change",
    "ClipSoftmax",
    "Context",
    "Distill",
    "DropLayers",
    "ExpandDepth",
    "Factorize",
    "FactorizeSparse",
    "FoldBatchNorm",
    "FuseLayers",
    "GateAttention",
    "GroupQueries",
    "MergeTokens",
    "Model",
    "ModelpressError",
    "MultiBranch",
    "Outcome",
    "Parity",
    "Pass",
    "ProgressiveBatchNorm",
    "Quantize",
    "Recipe",
    "Result",
    "Scope",
    "SimplifyAttention",
    "Skip",
    "SliceRanks",
    "Smooth",
    "Sparsify",
    "Step",
    "Target",
    "TrainRanks",
    "apply",
    "build",
    "load",
    "load_model",
    "load_recipe",
    "open_model",
    "run",
    "save",
    "show_tokens",
    "stream",
]
