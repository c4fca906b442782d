"""Running an exported folder: as the model was called, and token by token with the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import export
import tests.tiny as tiny
from compress.errors import ModelError, Unsuitable, UsageError
from compress.model import Model
from compress.target import Artifact
from export.runners import OnnxRunner, timed_call

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def decoder() -> Model:
    return tiny.llama(num_key_value_heads=2, head_dim=10)


@pytest.fixture(scope="module")
def written(decoder: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export.Onnx().write(decoder, tmp_path_factory.mktemp("onnx") / "llama")


@pytest.fixture(scope="module")
def run(written: Artifact) -> OnnxRunner:
    return OnnxRunner(written.folder, threads=1)


def prompt(batch: int = 3, length: int = 6) -> torch.Tensor:
    return torch.randint(
        3, tiny.BODY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1)
    )


def greedy(decoder: Model, tokens: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    return decoder.module.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False)


def test_one_graph_serves_every_step(written: Artifact):
    assert written.parity.relative < 1e-5
    shapes = {spec.name: spec.shape for spec in written.inputs}
    assert shapes["input_ids"] == ("batch", "sequence")
    keys = next(name for name in shapes if name.startswith("input.") and name.endswith("layers.0.keys"))
    assert shapes[keys] == ("batch", 2, "past", 10)
    assert sum(file.name.endswith(".data") for file in written.files) == 1


def test_it_returns_what_the_model_returns(run: OnnxRunner, decoder: Model):
    output, reference = run(**decoder.example), decoder.module(**decoder.example)
    assert type(output) is type(reference)
    kept = decoder.example["attention_mask"].bool()
    torch.testing.assert_close(output.logits[kept], reference.logits[kept], rtol=1e-4, atol=1e-5)


def test_arrays_do_as_well_as_tensors(run: OnnxRunner):
    tokens = prompt()
    assert torch.equal(run(input_ids=tokens.numpy()).logits, run(input_ids=tokens).logits)


def test_the_cache_continues_a_text(run: OnnxRunner, decoder: Model):
    tokens = prompt(2, 9)
    first = run(input_ids=tokens[:, :5])
    second = run(input_ids=tokens[:, 5:], past_key_values=run.cache_of(first))
    torch.testing.assert_close(second.logits, decoder.module(tokens).logits[:, 5:], rtol=1e-4, atol=1e-5)


def test_greedy_text_is_that_of_transformers(run: OnnxRunner, decoder: Model):
    tokens = prompt()
    expected = greedy(decoder, tokens, torch.ones_like(tokens), 12)
    assert torch.equal(run.generate(tokens, max_new_tokens=12), expected)


def test_prompts_of_unequal_length_are_padded_on_the_left(run: OnnxRunner, decoder: Model):
    tokens = prompt()
    mask = torch.ones_like(tokens)
    tokens[1, :3], mask[1, :3] = 0, 0
    expected = greedy(decoder, tokens, mask, 8)
    assert torch.equal(run.generate(tokens, 8, attention_mask=mask), expected)


def test_rows_that_ended_are_filled_up(run: OnnxRunner, decoder: Model, monkeypatch: pytest.MonkeyPatch):
    tokens = prompt()
    free = greedy(decoder, tokens, torch.ones_like(tokens), 6)
    end = int(free[0, tokens.shape[1] + 1])
    monkeypatch.setattr(decoder.module.generation_config, "eos_token_id", end)
    monkeypatch.setattr(run.exported.generation_config, "eos_token_id", end)
    expected = greedy(decoder, tokens, torch.ones_like(tokens), 6)
    assert (expected[0] == 0).any()
    assert torch.equal(run.generate(tokens, 6), expected)


def test_a_missing_input_is_named(run: OnnxRunner):
    with pytest.raises(UsageError, match="The graph's input `input_ids` is missing"):
        run(attention_mask=torch.ones(1, 3))


class Scaled(nn.Module):
    """A model of two inputs and no cache."""

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": torch.sigmoid(x) * factor}


def test_a_model_without_a_cache(tmp_path: Path):
    example = {"x": torch.randn(3, 4), "factor": torch.rand(3, 4)}
    artifact = export.Onnx().write(Model(Scaled(), example, "feature-extraction"), tmp_path / "scaled")
    run = export.load(artifact.folder)
    torch.testing.assert_close(run(**example), Scaled()(**example))
    with pytest.raises(Unsuitable, match="no key-value cache"):
        run.generate(prompt(), 3)
    with pytest.raises(UsageError, match="The graph takes factor, which is not among the inputs given: x"):
        run(x=example["x"])
    save_file(example, tmp_path / "inputs.safetensors")
    call = timed_call(str(artifact.folder), str(tmp_path / "inputs.safetensors"), threads=1)
    assert torch.equal(call()["scaled"], run(**example)["scaled"])


def test_a_torn_file_is_refused(written: Artifact, tmp_path: Path):
    for name in ("export.json", "config.json", "artifact.json"):
        (tmp_path / name).write_bytes((written.folder / name).read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"torn")
    (tmp_path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ModelError, match=f"The exported model in {tmp_path} cannot be opened"):
        export.load(tmp_path)
    assert json.loads((tmp_path / "artifact.json").read_text())["target"] == "onnx"
