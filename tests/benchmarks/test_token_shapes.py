"""The bench of token reduction at larger shapes, with small ones: its rows, its parts, and what it writes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from benchmarks import token_shapes
from benchmarks.exported import Run
from benchmarks.random_pictures import structured
from benchmarks.token_parts import Block, Reduction, cut_off, fewer, flow_of
from compress.progress import SILENT
from compress.timing import Spread

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
}
COUNT = 65


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shapes, "DEIT_S", SMALL)
    monkeypatch.setattr(token_shapes, "VIT_B", SMALL)
    monkeypatch.setattr(token_shapes, "BATCH", 3)


def reduced(method: str) -> compress.Model:
    return token_shapes._reduced(token_shapes._classifier(), method=method, keep=0.6)


def test_the_classifier_beside_one_that_does_no_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shapes, "METHODS", ("tome",))
    whole, tome, cut = token_shapes.classifier(run)
    assert [row["variant"] for row in (whole, tome, cut)] == ["uncompressed", "tome", token_shapes.CUT]
    assert (whole["MACs left, %"], whole["ms"]) == (100, pytest.approx(1500))
    assert 50 < cut["MACs left, %"] < tome["MACs left, %"] <= 60
    assert tome["speed"] == Spread(2, 2, 2)


def test_tokens_cut_off_are_the_last() -> None:
    model = cut_off(reduced("transform"))
    seen: dict[str, torch.Tensor] = {}
    block = model.module.get_submodule(flow_of(model).layout.blocks[1])
    block.layernorm_before.register_forward_pre_hook(lambda _, args: seen.update(second=args[0]))
    first = model.module.get_submodule(flow_of(model).layout.blocks[0])
    first.register_forward_hook(lambda _, __, output: seen.update(first=output))
    model.module(**model.example)
    left = flow_of(model).layout.left[1]
    assert seen["second"].shape == (2, left, 32)
    assert torch.equal(seen["second"], seen["first"][:, :left])


@pytest.mark.parametrize("method", ["transform", "tome", "prune"])
def test_one_reduction_is_that_of_the_model(method: str) -> None:
    """Sizes of one, and the states that the second block is given: what the model itself hands to that block."""
    model = reduced(method)
    flow, number = flow_of(model), 1
    torch.manual_seed(1)
    hidden = torch.randn(2, COUNT, 32)
    part = Reduction(flow, heads=2, width=32)
    given, size, bias = part(hidden, torch.ones(2, COUNT))
    assert given is not None
    assert size is not None
    assert bias is not None
    left = fewer(flow)
    assert (given.shape, size.shape, bias.shape) == ((2, left, 32), (2, left), (2, 1, 1, left))
    torch.testing.assert_close(size.sum(1), torch.full((2,), float(COUNT)))
    if method != "prune":
        torch.testing.assert_close((given * size[..., None]).sum(1), hidden.sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bias[:, 0, 0], size.log())
    heads = hidden.unflatten(2, (2, 16)).transpose(1, 2)
    flow.count, flow.wants = COUNT, True
    flow.attend(heads, heads, heads, None, 0.25)
    assert torch.allclose(flow.reduce(hidden, left, number), given, atol=1e-5)
    with pytest.raises(ValueError, match=r"States are \(9, 32\), with 9 sizes, not \(65, 32\)"):
        part(hidden[:, :9], torch.ones(2, 9))


def test_reducers_in_per_cent_of_a_block(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shapes, "METHODS", ("tome", "prune"))
    tome, prune = token_shapes.reducers(run)
    assert (tome["reducer"], prune["reducer"]) == ("tome", "prune")
    assert str(tome["tokens"]).startswith("65 to ")
    assert tome["ms"] == pytest.approx(750)
    assert tome["% of a block"] == Spread(50, 50, 50)
    assert prune["% of a block"].median == pytest.approx(100 / 3)


def test_a_block_is_that_of_the_model() -> None:
    model = token_shapes._classifier()
    path = flow_of(reduced("tome")).layout.blocks[2]
    hidden = torch.randn(2, COUNT, 32)
    assert torch.equal(Block(model.module, path)(hidden), model.module.get_submodule(path)(hidden))


def test_dense_models_by_their_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shapes, "DENSE", ((0.7, 1),))
    monkeypatch.setattr(token_shapes, "DENSE_METHODS", ("cluster", "tome"))
    whole, cluster, tome = token_shapes.dense(run)
    assert whole["variant"] == "uncompressed"
    assert whole["error"] < 1e-5
    assert cluster["variant"] == "cluster, keep 0.7, before 1"
    assert tome["variant"] == "tome, keep 0.7, before 1 and 2"
    for row in (cluster, tome):
        assert 0.001 < row["error"] < 0.5
        assert 50 < row["MACs left, %"] <= 70
    assert tome["speed"].median == pytest.approx(3)


def test_pictures_are_smooth_and_not_white() -> None:
    pictures = structured(2, 96, seed=3)
    assert pictures.shape == (2, 3, 96, 96)
    assert torch.allclose(pictures.std((1, 2, 3)), torch.ones(2), atol=1e-4)
    step = (pictures[..., 1:] - pictures[..., :-1]).std()
    assert 0.01 < step < 0.2
    assert not torch.equal(pictures, structured(2, 96, seed=4))


def test_what_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(run: Run) -> list[token_shapes.Row]:
        assert replace(run, scratch=tmp_path, observer=SILENT) == Run(tmp_path, 3, 5, 2, SILENT)
        return [{"variant": "one", "ms": 12.3456, "speed": Spread(1.5, 1.4, 1.61)}]

    monkeypatch.setattr(token_shapes, "TABLES", {"A table": table})
    monkeypatch.setattr(token_shapes, "hush", lambda: None)
    out = tmp_path / "new" / "shapes.json"
    monkeypatch.setattr(sys, "argv", ["token_shapes", "--rounds", "3", "--out", str(out)])
    assert token_shapes.main() == 0
    assert capsys.readouterr().out == (
        "\n### A table\n\n| variant | ms | speed |\n| --- | ---: | ---: |\n| one | 12.35 | 1.50 (1.40 to 1.61) |\n"
    )
    written = json.loads(out.read_text())
    assert written["tables"]["A table"][0]["speed"] == {"median": 1.5, "low": 1.4, "high": 1.61}
    assert (written["rounds"], written["calls"], written["threads"]) == (3, 5, 2)
    assert written["machine"]["versions"]["torch"] == torch.__version__
