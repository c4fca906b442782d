"""Batch norms, layer scales and factors of attentions go into the weights beside them; the function stays."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import export
from compress.checkpoint import load, save
from compress.compare import forward
from compress.errors import NothingToDo, Unsuitable
from compress.model import Model
from compress.passes.base import Context, Result
from compress.passes.fold_batch_norm import FoldBatchNorm
from compress.passes.quantize import Quantize
from compress.pipeline import run
from compress.scope import Scope
from tests.normed import batch_norms, build, shake

Found = dict[str, Tensor]

MODELS: dict[str, tuple[int, dict[str, int]]] = {
    "resnet": (25, {"folded": 25}),
    "regnet": (23, {"folded": 23}),
    "efficientnet": (31, {"folded": 31}),
    "mobilenet_v2": (52, {"folded": 52}),
    "detr": (17, {"folded": 17}),
    "mobilevit": (32, {"folded": 32}),
    "cvt": (18, {"folded": 18, "scale folded": 6}),
    "levit": (40, {"folded": 40, "scale folded": 8}),
    "swiftformer": (
        15,
        {"folded": 15, "layer_scale folded": 5, "layer_scale_1 folded": 4, "layer_scale_2 folded": 4},
    ),
    "poolformer": (0, {"layer_scale_2 folded": 9}),
    "convnext": (0, {"layer_scale_parameter folded": 9}),
    "dinov2": (0, {"folded": 6}),
    "beit": (0, {"lambda_1 folded": 3, "lambda_2 folded": 3}),
    "opt": (0, {"scaling folded": 3}),
}
"""The batch norms of each model, and what is folded."""

STAY = {
    "mobilevit": (9, "none of its attributes is 2"),
    "poolformer": (9, "it reads sub of `poolformer.encoder.block.0.0.pooling`"),
}
"""How much is left, and the first reason."""


def typed(model: Model, kind: torch.dtype = torch.float64) -> Model:
    """`model` in another float type, in place."""
    example = {name: one.to(kind) if one.is_floating_point() else one for name, one in model.example.items()}
    return replace(model, module=model.module.to(kind), example=example)


def fold(model: Model, **settings) -> Result:
    """What the pass makes of a copy."""
    copied = replace(model, module=copy.deepcopy(model.module))
    return FoldBatchNorm(**settings).apply(copied, Context())


def distance(found: Found, expected: Found) -> float:
    """The largest difference, as a share of the largest value of its output."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).abs().max() / one.abs().max()) for name, one in expected.items())


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_unchanged_and_no_batch_norm_is_left(name: str) -> None:
    norms, folded = MODELS[name]
    model = typed(build(name))
    expected = forward(model.module, model.example)
    result = fold(model)
    assert Counter(change.what for change in result.changes) == folded
    assert len(result.skips) == STAY.get(name, (0, ""))[0]
    assert all(skip.why.startswith(STAY[name][1]) for skip in result.skips[:1])
    assert (len(batch_norms(model.module)), batch_norms(result.module)) == (norms, [])
    assert distance(forward(result.module, model.example), expected) < 1e-10
    # The line above could not fail if the outputs did not depend on what has gone.
    without = FoldBatchNorm().restore(model.module, result.record)
    assert distance(forward(without, model.example), expected) > 0.1


@pytest.mark.parametrize("name", ["resnet", "levit", "convnext"])
def test_a_checkpoint_gives_the_model_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    folded = run(model, [FoldBatchNorm()]).model
    save(folded, tmp_path / "model")
    back = load(tmp_path / "model")
    assert batch_norms(back.module) == []
    expected = forward(folded.module, model.example)
    assert all(torch.equal(one, expected[key]) for key, one in forward(back.module, model.example).items())
    assert distance(expected, forward(model.module, model.example)) < 1e-5


class OneInput(nn.Module):
    """`parts` in a row, whose input is called `x`."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


def in_a_row(*parts: nn.Module, sizes: tuple[int, ...] = (2, 4, 6, 6)) -> Model:
    """A model of `parts` in float64. Named as "parts.0", "parts.1" and so on."""
    torch.manual_seed(0)
    module = OneInput(*parts).eval()
    shake(module)
    return typed(Model(module, {"x": torch.randn(sizes)}, "feature-extraction"))


def batch_norm(shifted: bool = True) -> nn.BatchNorm2d:
    """A batch norm of four features; without a shift it keeps zeros."""
    return nn.BatchNorm2d(4) if shifted else Still(4)


class Still(nn.BatchNorm2d):
    """A batch norm that multiplies, and shifts by nothing, whatever its bias."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_var is not None
        return nn.functional.batch_norm(
            input, torch.zeros_like(self.running_var), self.running_var, self.weight
        )


PAIRS: dict[str, Callable[[], Model]] = {
    "conv, norm": lambda: in_a_row(nn.Conv2d(4, 4, 3, padding=1), batch_norm()),
    "conv without bias, norm": lambda: in_a_row(nn.Conv2d(4, 4, 3, bias=False), batch_norm()),
    "groups, norm": lambda: in_a_row(nn.Conv2d(4, 4, 3, groups=2), batch_norm()),
    "depthwise, norm": lambda: in_a_row(nn.Conv2d(4, 4, 3, groups=4, padding=1), batch_norm()),
    "transposed, norm": lambda: in_a_row(nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2), batch_norm()),
    "linear, norm": lambda: in_a_row(nn.Linear(3, 4), nn.BatchNorm1d(4), sizes=(5, 3)),
    "conv, norm, norm": lambda: in_a_row(nn.Conv2d(4, 4, 1), batch_norm(), batch_norm()),
    "norm, conv": lambda: in_a_row(nn.ReLU(), batch_norm(), nn.Conv2d(4, 6, 3)),
    "norm, groups": lambda: in_a_row(nn.ReLU(), batch_norm(), nn.Conv2d(4, 6, 3, groups=2, bias=False)),
    "norm, depthwise": lambda: in_a_row(nn.ReLU(), batch_norm(), nn.Conv2d(4, 4, 3, groups=4)),
    "norm, linear": lambda: in_a_row(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False), sizes=(5, 4)),
    "norm, pooling, linear": lambda: in_a_row(
        nn.ReLU(), batch_norm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ),
    "norm, norm, conv": lambda: in_a_row(nn.ReLU(), batch_norm(), batch_norm(), nn.Conv2d(4, 6, 3)),
    "norms without weights, conv": lambda: in_a_row(
        nn.ReLU(), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 6, 3)
    ),
    "norm without shift, padded conv": lambda: in_a_row(
        nn.ReLU(), batch_norm(shifted=False), nn.Conv2d(4, 6, 3, padding=1)
    ),
    "norm without shift, transposed": lambda: in_a_row(
        nn.ReLU(), batch_norm(shifted=False), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    ),
    "conv, padding, norm without shift": lambda: in_a_row(
        nn.Conv2d(4, 4, 1, bias=False), nn.ZeroPad2d(1), batch_norm(shifted=False)
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    model = PAIRS[name]()
    expected = forward(model.module, model.example)
    result = fold(model)
    assert (batch_norms(result.module), result.skips) == ([], ())
    assert distance(forward(result.module, model.example), expected) < 1e-12
    weighted = [
        path for path, part in model.module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    assert all(change.after in [f"in {path}" for path in weighted] for change in result.changes if weighted)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (
            (nn.ReLU(), batch_norm(), nn.Conv2d(4, 6, 3, padding=1)),
            "it reads relu of `parts.0`, and zeros are padded between it and `parts.2`, "
            "and its shift would be missing there",
        ),
        (
            (nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1), batch_norm(), nn.ReLU()),
            "zeros are padded between it and `parts.0`, and its shift would be missing there, "
            "and relu of `parts.3` reads it",
        ),
        (
            (nn.LayerNorm([6]), batch_norm(), nn.GELU()),
            "it reads layer_norm of `parts.0`, and gelu of `parts.2` reads it",
        ),
        (
            (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), batch_norm(), nn.ReLU()),
            "`parts.0` has a weight that is computed from others, and relu of `parts.2` reads it",
        ),
        (
            (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            "it takes its statistics from each batch",
        ),
    ],
    ids=["padding after", "padding before", "no linear map", "computed", "no statistics"],
)
def test_what_stays_is_told(parts: tuple[nn.Module, ...], why: str) -> None:
    model = in_a_row(*copy.deepcopy(parts))
    with pytest.raises(NothingToDo) as raised:
        run(model, [FoldBatchNorm()])
    (norm,) = batch_norms(model.module)
    assert raised.value.fact.endswith(f"It skipped {norm}: {why}.")


class Reads(nn.Module):
    """A batch norm, and what reads it by `form`."""

    def __init__(self, form: Callable[[Reads, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.unused = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, self.norm(x.relu()))


def reads(form: Callable[[Reads, Tensor], Tensor], **settings) -> tuple[Model, Result]:
    """A model whose norm is read by `form`, and what the pass makes of it."""
    torch.manual_seed(0)
    module = Reads(form).eval()
    shake(module)
    model = typed(Model(module, {"x": torch.randn(2, 4, 5, 5)}, "feature-extraction"))
    return model, fold(model, **settings)


def why(result: Result) -> str:
    """Why `norm` stays, or ""."""
    return next(
        (skip.why.removeprefix("it reads relu, and ") for skip in result.skips if skip.target == "norm"), ""
    )


def test_all_that_reads_takes_it_on() -> None:
    model, result = reads(lambda own, x: own.one(x) * own.other(x))
    assert [change.after for change in result.changes] == ["in one, other"]
    expected = forward(model.module, model.example)
    assert distance(forward(result.module, model.example), expected) < 1e-12


def test_a_norm_that_does_not_run_is_named() -> None:
    _, result = reads(lambda own, x: own.one(x))
    assert [(skip.target, skip.why) for skip in result.skips] == [
        ("unused", "it does not run on the example")
    ]


def test_one_reader_that_cannot_keeps_the_others_as_they_are() -> None:
    model, result = reads(lambda own, x: own.one(x) + x)
    assert why(result) == "add reads it"
    assert torch.equal(result.module.one.weight, model.module.one.weight)


def test_what_is_out_of_scope_takes_nothing_on() -> None:
    def both(own: Reads, x: Tensor) -> Tensor:
        return own.one(x) + own.other(x)

    model, result = reads(both, scope=Scope(exclude=("other",)))
    assert why(result) == "`other` would have to take it on, and is out of scope"
    assert torch.equal(result.module.one.weight, model.module.one.weight)
    assert reads(both, scope=Scope(include=("other",)))[1].changes == ()


def test_tied_weights_stay() -> None:
    model = in_a_row(nn.Conv2d(4, 4, 1), batch_norm())
    model.module.other = nn.Conv2d(4, 4, 1)
    model.module.other.weight = model.module.parts[0].weight
    (skip,) = fold(model).skips
    assert skip.why.startswith("`parts.0.weight` is tied with other.weight, and ")


def test_a_norm_in_two_places_stays() -> None:
    model = in_a_row(nn.Conv2d(4, 4, 1), batch_norm())
    model.module.again = model.module.parts[1]
    (skip,) = fold(model).skips
    assert skip.why.startswith("its module stands in several places, and ")


def test_weights_that_would_overflow_stay() -> None:
    model = in_a_row(nn.Conv2d(4, 4, 1), batch_norm())
    model.module.parts[1].running_var.fill_(1e-12)
    model.module.parts[1].weight.data.fill_(1e4)
    (skip,) = fold(typed(model, torch.float16)).skips
    assert skip.why.startswith("`parts.0` would not stay finite in torch.float16")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind: torch.dtype) -> None:
    model = in_a_row(
        nn.Conv2d(4, 4, 3, bias=False), batch_norm(), nn.ReLU(), batch_norm(), nn.Conv2d(4, 4, 3)
    )
    result = run(typed(model, kind), [FoldBatchNorm()]).model
    assert batch_norms(result.module) == []
    assert {tensor.dtype for tensor in result.module.parameters()} == {kind}


def test_factors_of_attentions_stay_if_asked() -> None:
    result = fold(build("levit"), scale=False)
    assert {change.what for change in result.changes} == {"folded"}
    assert result.record["scales"] == []


def test_a_factor_whose_map_is_out_of_scope_stays() -> None:
    result = fold(build("opt"), scope=Scope(exclude=("*.layers.0.self_attn.q_proj",)))
    assert len(result.changes) == 2
    path = "model.decoder.layers.0.self_attn"
    assert [(skip.target, skip.why) for skip in result.skips] == [
        (path, f"`{path}.q_proj` would have to take it on, and is out of scope")
    ]


def test_a_quantized_model_is_refused() -> None:
    model = in_a_row(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), batch_norm())
    quantized = run(model, [Quantize()], Context(calibration=[model.example])).model
    with pytest.raises(
        Unsuitable, match="quantized already, and its integer weights cannot take on batch norms"
    ):
        run(quantized, [FoldBatchNorm()])


def kinds(model: Model, folder: Path) -> Counter[str]:
    """The operators of the exported graph, with how often each occurs. Writing proves the graph."""
    export.Onnx().write(model, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_no_batch_norm_is_left_in_the_exported_graph(tmp_path: Path) -> None:
    parts = (nn.Conv2d(4, 4, 3), nn.ReLU(), batch_norm(), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten())
    model = in_a_row(*parts, nn.Linear(16, 4), nn.BatchNorm1d(4))
    model = typed(model, torch.float32)
    before = kinds(model, tmp_path / "before")
    after = kinds(run(model, [FoldBatchNorm()]).model, tmp_path / "after")
    assert before["BatchNormalization"] > 0
    assert after["BatchNormalization"] == 0
    assert sum(after.values()) < sum(before.values())
