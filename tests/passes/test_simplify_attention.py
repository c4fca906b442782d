"""Softmax gives way to linear attention on a grid of patches, and what has no such grid keeps its softmax."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import compress
import export
from benchmarks.digits import Digits, read_digits
from compress.checkpoint import load, save
from compress.compare import forward
from compress.errors import NothingToDo, Unsuitable
from compress.layers.linear_attention import Grid, LinearAttention
from compress.model import Model
from compress.numerics.linear_attention import cheaper, linear_attention
from compress.passes.base import Context
from compress.passes.linear_sites import Site, find_grid
from compress.passes.merge_tokens import MergeTokens
from compress.passes.quantize import Quantize
from compress.passes.simplify_attention import SimplifyAttention, install, set_blend
from compress.pipeline import run
from compress.scope import Scope
from export.runners import OnnxRunner
from tests import zoo


def heads(
    tokens: int = 17, size: int = 8, kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of two pictures and three heads."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, size, generator=generator) for _ in range(3))
    return query.to(kind), key.to(kind), value.to(kind)


def unused() -> Tensor:
    raise AssertionError("softmax was computed")


def test_both_orders_agree_and_each_is_what_it_says() -> None:
    query, key, value = heads()
    state, pairs = (linear_attention(query, key, value, order) for order in ("state", "pairs"))
    torch.testing.assert_close(state, pairs, rtol=1e-5, atol=1e-5)
    weights = query.relu() @ key.relu().transpose(2, 3)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(state, weights @ value, rtol=1e-5, atol=1e-5)
    chosen = linear_attention(query, key, value)
    assert torch.equal(chosen, state if cheaper(17, 17, 8, 8) == "state" else pairs)


def test_the_cheaper_order() -> None:
    assert cheaper(197, 197, 64, 64) == "state"
    assert cheaper(50, 50, 64, 64) == "pairs"


def test_sums_that_float16_cannot_hold() -> None:
    query, key, value = heads(2000)
    made = linear_attention(*(one.half() for one in (query.abs(), 30 * key.abs(), 30 * value.abs())))
    wanted = linear_attention(query.abs(), 30 * key.abs(), 30 * value.abs())
    assert made.dtype == torch.float16
    torch.testing.assert_close(made.float(), wanted, rtol=2e-3, atol=2e-3)
    assert (
        float((key.abs() * 30).transpose(2, 3).matmul(value.abs() * 30).max())
        > torch.finfo(torch.float16).max
    )


def test_a_query_that_looks_at_nothing_gives_zeros() -> None:
    query, key, value = heads()
    assert not linear_attention(-query.abs(), key, value).any()


def layer(grid: Grid) -> LinearAttention:
    torch.manual_seed(0)
    made = LinearAttention(grid, heads=3, size=8, value_size=8)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.eval()


def test_the_convolution_runs_over_the_patches_of_each_head_alone() -> None:
    made, (query, key, value) = layer(Grid(3, 5, special=2)), heads()
    given = made(query, key, value, unused)
    expected = linear_attention(query, key + made.positions, value).transpose(1, 2)
    torch.testing.assert_close(given[:, :2], expected[:, :2])
    for head in range(3):
        picture = value[:, head, 2:].unflatten(1, (3, 5)).permute(0, 3, 1, 2)
        around = made.local(picture).permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(given[:, 2:, head], expected[:, 2:, head] + around)


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(Unsuitable, match="was trained for 16 tokens, and here are 17"):
        layer(Grid(4, 4, special=0))(*heads(), unused)


def simplified(model: Model, blend: float = 0.0) -> Model:
    """`model` with an untrained linear attention, all of whose parameters are random, in all blocks."""
    module = copy.deepcopy(model.module)
    (stack,) = (one for one in model.graph.stacks if len(one.blocks) == 3)
    sites = [Site(f"{block}.attention", 5, 8, 8) for block in stack.blocks]
    layers = install(module, sites, find_grid(model, stack))
    torch.manual_seed(1)
    for one in layers:
        for parameter in one.parameters():
            nn.init.normal_(parameter, std=0.1)
    set_blend(layers, blend)
    return replace(model, module=module)


def test_with_softmax_alone_the_model_is_what_it_was() -> None:
    model = zoo.build("vit")
    expected, found = (
        forward(one.module, model.example)["logits"] for one in (model, simplified(model, 1.0))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_blend_is_between_both() -> None:
    made, (query, key, value) = layer(Grid(4, 4, special=1)), heads()
    softmax = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    linear = made(query, key, value, unused)
    made.blend = 0.3
    torch.testing.assert_close(made(query, key, value, lambda: softmax), 0.3 * softmax + 0.7 * linear)


def test_softmax_gives_way_over_a_share_of_the_steps() -> None:
    settings = SimplifyAttention(steps=10, decay=0.5)
    assert [settings.blend(step) for step in range(7)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0])
    assert SimplifyAttention(decay=0).blend(0) == 0


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits()


@pytest.fixture(scope="module")
def outcome(digits: Digits) -> compress.Outcome:
    settings = SimplifyAttention(steps=120, learning_rate=2e-3)
    return run(digits.model, [settings], Context(training=digits.batches))


def test_digits_are_read_as_well_without_softmax(digits: Digits, outcome: compress.Outcome) -> None:
    *attentions, trained = outcome.steps[0].changes
    assert len(attentions) == 4
    assert attentions[0].before == "softmax over 17 tokens, 4 heads"
    assert attentions[0].after == (
        "linear, keys by values first, and a depthwise convolution over 4 x 4 patches"
    )
    before, after = (float(text.split()[1]) for text in (trained.before, trained.after))
    assert after < before / 4
    assert digits.accuracy(outcome.model) > digits.accuracy(digits.model) - 0.03


def kinds(folder: Path) -> Counter[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_the_exported_graph_has_no_softmax_and_takes_any_batch(
    digits: Digits, outcome: compress.Outcome, tmp_path: Path
) -> None:
    export.Onnx().write(outcome.model, tmp_path / "onnx")
    found = kinds(tmp_path / "onnx")
    assert not [name for name in found if "Softmax" in name or "Attention" in name]
    assert found["Conv"] == 1 + 4
    session = OnnxRunner(tmp_path / "onnx")
    for count in (1, 5):
        pixels = digits.pixels[:count]
        with torch.no_grad():
            expected = outcome.model.module(pixel_values=pixels).logits
        torch.testing.assert_close(session(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_gives_the_model_back(outcome: compress.Outcome, tmp_path: Path) -> None:
    save(outcome.model, tmp_path / "model")
    back = load(tmp_path / "model")
    expected, found = (forward(one.module, outcome.model.example)["logits"] for one in (outcome.model, back))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", [False, True])
def test_the_linear_maps_can_be_quantized_after_it(
    digits: Digits, outcome: compress.Outcome, attention: bool, tmp_path: Path
) -> None:
    context = Context(calibration=digits.batches[:4])
    quantized = run(outcome.model, [Quantize(attention=attention)], context).model
    assert digits.accuracy(quantized) > digits.accuracy(digits.model) - 0.05
    save(quantized, tmp_path / "model")
    expected, found = (
        forward(one.module, quantized.example)["logits"] for one in (quantized, load(tmp_path / "model"))
    )
    assert torch.equal(found, expected)


def taught(model: Model, **settings) -> compress.Outcome:
    context = Context(calibration=[model.example], training=[model.example])
    settings = {"steps": 6, "learning_rate": 1e-3, **settings}
    return run(model, [SimplifyAttention(**settings)], context)


def replaced(outcome: compress.Outcome) -> list[str]:
    modules = outcome.model.module.named_modules()
    return [path for path, part in modules if isinstance(part, LinearAttention)]


def clip() -> Model:
    return zoo.build("clip")


def registers() -> Model:
    """A class token and four registers, on a grid that is no square."""
    torch.manual_seed(0)
    values = {key: value for key, value in zoo.VISION.items() if key != "intermediate_size"}
    config = tf.Dinov2WithRegistersConfig(**values, mlp_ratio=2, num_register_tokens=4)
    pixels = {"pixel_values": torch.randn(2, 3, 24, 40)}
    return Model(tf.Dinov2WithRegistersModel(config).eval(), pixels, "image-feature-extraction")


GRIDS: dict[str, tuple[Callable[[], Model], Grid, dict]] = {
    "vit": (lambda: zoo.build("vit"), Grid(4, 4, special=1), {}),
    "two special tokens": (lambda: zoo.build("deit"), Grid(4, 4, special=2), {}),
    "registers, no square": (registers, Grid(3, 5, special=5), {}),
    "a tower": (clip, Grid(4, 4, special=1), {"scope": Scope(include=("vision_model.*",)), "loss": "minilm"}),
    "no special token": (
        lambda: zoo.build("siglip"),
        Grid(4, 4, special=0),
        {"scope": Scope(include=("vision_model.*",)), "loss": "minilm"},
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_and_special_tokens_are_found(name: str) -> None:
    make, grid, settings = GRIDS[name]
    model = make()
    (stack,) = (one for one in model.graph.stacks if one.blocks[0] in settings.get("scope", Scope()))
    assert find_grid(model, stack) == grid


def test_chosen_blocks_alone_become_linear() -> None:
    assert replaced(taught(registers(), layers=(1, 2), learning_rate=1e-5)) == [
        f"encoder.layer.{number}.attention.linear_attention" for number in (1, 2)
    ]
    with pytest.raises(Unsuitable, match="names block 3, and `vit.layers` has blocks 0 to 2"):
        taught(zoo.build("vit"), layers=(0, 3))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "it is causal, and a linear attention would have to go token by token"),
        ("modernbert", "queries and keys are rotated by their positions"),
        ("deberta", "a term is added to each score"),
    ],
)
def test_attentions_that_stay_are_named_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(NothingToDo, match=why):
        taught(zoo.build(name))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert", "works on tokens that lie on a grid, and no convolution gives one of"),
        ("clip", "works on one stack of blocks, and there are 2"),
        ("resnet", "has no softmax attention"),
    ],
)
def test_models_without_a_grid_of_patches_are_refused(name: str, why: str) -> None:
    with pytest.raises(Unsuitable, match=why):
        taught(zoo.build(name))


def test_a_mask_is_refused() -> None:
    module = simplified(zoo.build("vit")).module
    states = torch.randn(2, 17, 40)
    mask = torch.zeros(2, 1, 17, 17)
    with pytest.raises(Unsuitable, match="adds a mask or a bias to the scores"):
        module.vit.layers[0].attention(states, attention_mask=mask)


def test_the_order_of_passes() -> None:
    model = zoo.build("vit")
    context = Context(calibration=[model.example], training=[model.example])
    with pytest.raises(Unsuitable, match="those that are left lie on no grid"):
        run(model, [MergeTokens(remove=3), SimplifyAttention()], context)
    with pytest.raises(Unsuitable, match="integer weights cannot learn another attention"):
        run(model, [Quantize(), SimplifyAttention()], context)
