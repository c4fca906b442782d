"""Streamed runs: the same result as in memory, a checkpoint like any other, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import compress
from compress import blockwise, processes
from compress.compare import forward
from compress.errors import DataError, ModelError, OutputError, RecipeError, Unsuitable
from compress.model import Model, load_model
from compress.stored import INDEX, stored_in
from tests import tiny
from tests.test_processes import TWO

SETTINGS = {"method": "svd_llm", "ranks": "uniform", "multiple": 1}


def gpt2() -> Model:
    sizes = {
        "vocab_size": tiny.BODY["vocab_size"],
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 130,
    }
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    return tiny._model(
        tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **ends)), "text-generation", tiny.tokenizer(False)
    )


def llama() -> Model:
    model = tiny.llama(num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=True)
    model.module.tie_weights()
    return model


def gemma() -> Model:
    """Blocks that differ in the mask and the positions they are given."""
    config = tf.Gemma3TextConfig(
        **tiny.BODY | {"num_hidden_layers": 3}, head_dim=8, num_key_value_heads=2, sliding_window=4
    )
    return tiny._model(tf.Gemma3ForCausalLM(config), "text-generation", tiny.tokenizer(False))


MODELS = {
    "llama": (llama, {}),
    "gemma": (gemma, {}),
    "gpt2": (gpt2, {}),
    "bert": (tiny.bert, {"include": ["encoder.*"]}),
    "vit": (tiny.vit, {"include": ["vit.layers.*"]}),
}


def batches(model: Model, count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def varied(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "input_ids":
            return torch.randint(5, 40, value.shape, generator=generator)
        return torch.randn(value.shape, generator=generator) if value.is_floating_point() else value

    return [{name: varied(name, value) for name, value in model.example.items()} for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.saved(make(), root / name) for name, (make, _) in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_run_gives_what_a_run_in_memory_gives(name, folders, tmp_path):
    whole = load_model(folders[name])
    settings = compress.Factorize(**SETTINGS, scope=MODELS[name][1])
    expected = compress.apply(whole, [settings], calibration=batches(whole))
    step = compress.stream(folders[name], settings, tmp_path / "out", calibration=batches(whole))
    made = compress.load(tmp_path / "out")
    assert made.history == (step,)
    assert step.record == expected.steps[0].record
    assert step.changes == expected.steps[0].changes
    assert abs(step.parity.relative - expected.steps[0].parity.relative) < 1e-5
    assert step.bytes_after < step.bytes_before
    reference, outputs = forward(expected.model.module, whole.example), forward(made.module, whole.example)
    for key, value in reference.items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "asvd"])
def test_other_local_methods(method, folders, tmp_path):
    whole = load_model(folders["llama"])
    settings = compress.Factorize(**SETTINGS | {"method": method})
    data = None if method == "svd" else batches(whole)
    step = compress.stream(folders["llama"], settings, tmp_path / "out", calibration=data)
    assert len(step.changes) == 3 * 7


def test_padding_is_left_out(folders, tmp_path):
    """A padded batch calibrates as the same without padding does."""
    ids = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    given = {
        "whole": {"input_ids": ids, "attention_mask": mask},
        "padded": {
            "input_ids": torch.cat([ids, torch.full_like(ids, 7)], 1),
            "attention_mask": torch.cat([mask, 0 * mask], 1),
        },
    }
    settings = compress.Factorize(**SETTINGS, scope={"include": ["encoder.*"]})
    made = []
    for name, batch in given.items():
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        compress.stream(folders["bert"], settings, tmp_path / name, calibration=[batch])
        made.append(compress.load(tmp_path / name).module.encoder.layer[1].output.dense.weight)
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays(tmp_path):
    """Computed in float32, stored in the type of the files; shards are read as one file is."""
    model = llama()
    model.module.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(set(json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"].values())) > 2
    step = compress.stream(
        tmp_path / "model", compress.Factorize(**SETTINGS), tmp_path / "out", calibration=batches(model)
    )
    made = compress.load(tmp_path / "out")
    assert {value.dtype for value in made.module.state_dict().values()} == {torch.bfloat16}
    assert made.module.config.dtype == torch.bfloat16
    assert made.module.lm_head.weight is made.module.model.embed_tokens.weight
    source = stored_in(tmp_path / "model")
    assert step.bytes_before == sum(entry.bytes for entry in source.entries.values())
    kept = source.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert torch.equal(made.module.model.embed_tokens.weight, kept)


RECIPE = """
summary: a test
model: {task: text-generation}
data:
  calibration: {text: text.txt, max_length: 16, samples: 8}
passes:
  - {use: factorize, method: svd_llm, ranks: uniform, multiple: 1}
"""


def launched(folder: Path, out: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    environment = processes.alone(os.environ) | {"OMP_NUM_THREADS": "1"}
    command = [
        *launcher,
        "-m",
        "compress",
        "apply",
        "recipe.yaml",
        "--stream",
        "--model",
        "model",
        "--out",
        out,
    ]
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    tiny.saved(llama(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(60)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, launcher in (("one", ()), ("two", TWO)):
        done = launched(tmp_path, name, *launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written to") == 1
    one, two = (compress.load(tmp_path / name) for name in ("one", "two"))
    assert one.history[0].changes == two.history[0].changes
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, two.module.state_dict()[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model",
        "one",
        "recipe.yaml",
        "text.txt",
        "two",
    ]


# Refusals.


def refused(folder: Path, into: Path, settings: compress.Pass | compress.Recipe, **given) -> None:
    try:
        compress.stream(folder, settings, into / "out", **given)
    finally:
        assert not list(into.glob("out*"))


def test_what_needs_the_whole_model(folders, tmp_path):
    with pytest.raises(Unsuitable) as caught:
        refused(folders["llama"], tmp_path, compress.Factorize())
    assert (
        "`method: fisher` needs gradients through the whole model; `ranks: budget` weighs"
        in caught.value.fact
    )
    assert "Set `method: svd_llm` (or asvd, svd) and `ranks: uniform`" in caught.value.remedy
    for settings in ({"update": True}, {"head": True}):
        with pytest.raises(Unsuitable, match=f"`{next(iter(settings))}: true`"):
            refused(folders["llama"], tmp_path, compress.Factorize(**SETTINGS, **settings))
    with pytest.raises(
        Unsuitable, match="`quantize` needs the whole model, and cannot be applied block by block"
    ):
        refused(folders["llama"], tmp_path, compress.Quantize())


def test_without_data(folders, tmp_path):
    with pytest.raises(DataError, match="second moments needs calibration data"):
        refused(folders["llama"], tmp_path, compress.Factorize(**SETTINGS))


def test_nothing_to_do(folders, tmp_path):
    settings = compress.Factorize(**SETTINGS | {"multiple": 64})
    with pytest.raises(Unsuitable, match="found nothing to do"):
        refused(folders["llama"], tmp_path, settings, calibration=batches(llama()))


def test_a_model_of_several_stacks(tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "decoder_start_token_id": 0}
    config = tf.T5Config(vocab_size=tiny.BODY["vocab_size"], **sizes)
    tiny.saved(
        tiny._model(tf.T5ForConditionalGeneration(config), "text2text-generation", tiny.tokenizer(False)),
        tmp_path / "t5",
    )
    with pytest.raises(Unsuitable, match="A streamed run works on one stack of blocks, and there are 2"):
        refused(tmp_path / "t5", tmp_path, compress.Factorize(**SETTINGS))


def test_a_model_without_a_stack(tmp_path):
    tiny.saved(tiny.llama(num_hidden_layers=1), tmp_path / "one")
    with pytest.raises(Unsuitable, match="A streamed run found no stack of repeated blocks"):
        refused(tmp_path / "one", tmp_path, compress.Factorize(**SETTINGS))


def test_a_recipe_of_more_than_one_pass(folders, tmp_path):
    recipe = compress.Recipe.model_validate(
        {
            "summary": "a test",
            "model": {"task": "text-generation"},
            "passes": [{"use": "factorize"}, {"use": "quantize"}],
            "export": [{"use": "onnx"}],
        }
    )
    with pytest.raises(RecipeError, match="this recipe has 2 passes and exports"):
        refused(folders["llama"], tmp_path, recipe)


def test_an_output_that_is_taken(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(OutputError, match="exists and is not empty"):
        compress.stream(
            folders["llama"], compress.Factorize(**SETTINGS), tmp_path / "out", calibration=batches(llama())
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def broken(folder: Path, edit) -> Path:
    model = llama()
    model.module.save_pretrained(folder, max_shard_size="20KB")
    edit(folder)
    return folder


def without_a_tensor(folder: Path) -> None:
    file = next(
        file for file in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in load_file(file)
    )
    save_file({name: value for name, value in load_file(file).items() if name != "model.norm.weight"}, file)


def with_infinity(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
            "is missing, which model.safetensors",
        ),
        (lambda folder: (folder / INDEX).unlink(), "is not whole: it has neither model.safetensors nor"),
        (lambda folder: (folder / INDEX).write_text("{"), "cannot be read: Expecting property name"),
        (lambda folder: os.truncate(sorted(folder.glob("*.safetensors"))[1], 9000), "it has 9000 bytes of"),
        (without_a_tensor, "hold no weights for 1 tensors of LlamaForCausalLM: model.norm.weight"),
        (with_infinity, "has values that are not finite in `model"),
    ],
)
def test_a_folder_that_is_not_whole(edit, said, tmp_path):
    folder = broken(tmp_path / "model", edit)
    with pytest.raises(ModelError, match=said):
        refused(folder, tmp_path, compress.Factorize(**SETTINGS), calibration=batches(llama()))


def test_a_name_that_is_no_folder(tmp_path):
    with pytest.raises(ModelError, match="some/model is no folder here, and weights are streamed from files"):
        refused(Path("some/model"), tmp_path, compress.Factorize(**SETTINGS))


def test_an_interrupted_run_leaves_nothing(folders, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(blockwise, "_copy_rest", stop)
    with pytest.raises(KeyboardInterrupt):
        refused(folders["llama"], tmp_path, compress.Factorize(**SETTINGS), calibration=batches(llama()))
