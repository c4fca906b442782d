"""Every installed pass keeps the contract, on every kind of model that it serves."""

import copy
from dataclasses import replace

import pytest
import torch

from compress.model import Model
from compress.passes.base import Context, Pass
from compress.passes.factorize import Factorize
from compress.pipeline import run
from compress.recipe import available, find
from compress.testing import check_pass
from tests.zoo import build

CASES = {
    "distill": ["bert", "gpt2", "llama", "vit", "t5"],
    "drop_layers": ["bert", "gpt2", "llama", "vit"],
    "expand_depth": ["bert", "gpt2", "llama", "vit"],
    "fold_batch_norm": ["resnet", "cvt", "mobilevit", "dinov2", "convnext", "opt"],
    "fuse_layers": ["bert", "gpt2", "llama", "vit"],
    "factorize": ["bert", "gpt2", "llama", "vit", "t5"],
    "group_queries": ["bert", "gpt2", "llama", "phi3", "gpt-neox", "bloom", "qwen3", "t5", "opt"],
    "merge_tokens": ["bert", "vit"],
    "progressive_batch_norm": ["bert", "gpt2", "llama", "vit", "swin"],
    "multi_branch": ["bert", "gpt2", "vit", "resnet"],
    "simplify_attention": ["vit", "dinov2"],
    "gate_attention": ["bert", "gpt2", "llama", "vit"],
    "clip_softmax": ["bert"],
    "train_ranks": ["bert", "gpt2", "vit"],
    "factorize_sparse": ["bert", "gpt2", "vit", "t5"],
    "slice_ranks": ["bert", "gpt2", "t5"],
    "sparsify": ["bert", "gpt2", "llama", "vit", "resnet", "t5"],
    "smooth": ["llama", "gpt2", "vit", "qwen3"],
    "quantize": ["bert", "gpt2", "llama", "vit", "resnet", "t5", "whisper"],
}

SETTINGS = {
    "distill": {"steps": 8, "learning_rate": 1e-4},
    "drop_layers": {"remove": 1},
    "expand_depth": {"depth": 4, "unhealed": True},
    "group_queries": {"kv_heads": 1, "unhealed": True},
    "merge_tokens": {"remove": 3},
    "multi_branch": {"steps": 8, "learning_rate": 1e-5},
    "simplify_attention": {"steps": 8, "learning_rate": 1e-5},
    "gate_attention": {"steps": 4, "learning_rate": 1e-3, "penalty": 1.0},
    "clip_softmax": {"steps": 4, "learning_rate": 1e-3, "penalty": 1.0, "alpha": 0.1},
    "fuse_layers": {"remove": 1, "steps": 4, "learning_rate": 1e-3},
    "progressive_batch_norm": {"steps": 8, "learning_rate": 1e-3},
    "train_ranks": {"steps": 16, "multiple": 1},
    "factorize_sparse": {"steps": 16, "keep": 0.6},
    "slice_ranks": {"keep": 0.3, "multiple": 1},
}
"""Where there are no defaults, or they would take long."""


def served(name: str, kind: str) -> Model:
    """A model of `kind` in the form that the pass `name` finds something to do in."""
    model = build(kind)
    if name != "slice_ranks":
        return model
    factored = run(
        model, [Factorize(keep=0.8, ranks="uniform", multiple=1)], Context(calibration=[model.example])
    ).model
    return replace(factored, history=())


def shaken(model: Model) -> Model:
    """A teacher that answers a little differently."""
    module = copy.deepcopy(model.module)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return replace(model, module=module)


def test_every_installed_pass_has_a_case():
    assert set(CASES) == set(available("compress.passes"))


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, models in CASES.items() for model in models]
)
def test_the_contract(name, model):
    settings = find("compress.passes", name)(**SETTINGS.get(name, {}))
    assert isinstance(settings, Pass)
    source = served(name, model)
    # Without calibration data a pass that needs it must decline in its own words.
    unsuitable = source if settings.needs != "nothing" else None
    context = Context(calibration=[source.example], training=[source.example], teacher=shaken(source))
    outcome = check_pass(settings, source, context, unsuitable)
    assert outcome.steps[0].changes
