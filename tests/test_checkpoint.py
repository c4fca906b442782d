"""Checkpoints: the same outputs back, bit for bit, and clear words for folders that are none."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from compress.checkpoint import load, open_model, save
from compress.compare import forward
from compress.errors import ModelError, OutputError
from compress.model import Model, load_model
from tests.zoo import build


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama", "t5", "whisper", "vit", "resnet", "clip", "gemma3"]
)
def test_a_checkpoint_gives_the_outputs_back_bit_for_bit(name, tmp_path):
    model = build(name)
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert type(back.module) is type(model.module)
    assert back.task == model.task
    assert not back.module.training
    wanted, given = forward(model.module, model.example), forward(back.module, back.example)
    assert wanted.keys() == given.keys()
    assert all(torch.equal(wanted[key], given[key]) for key in wanted)


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path):
    model = build("gpt2")
    save(model, tmp_path / "model")
    aliases = json.loads((tmp_path / "model" / "compress.json").read_text())["aliases"]
    assert aliases == {"lm_head.weight": "transformer.wte.weight"}
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118, it is no mapping
    module = load(tmp_path / "model").module
    assert module.lm_head.weight is module.transformer.wte.weight


def test_types_of_tensors_are_kept(tmp_path):
    source = build("bert")
    module = copy.deepcopy(source.module).to(torch.bfloat16)
    save(Model(module, source.example, source.task), tmp_path / "model")
    back = load(tmp_path / "model").module
    assert {tensor.dtype for tensor in back.parameters()} == {torch.bfloat16}


def test_a_module_of_ones_own_needs_its_skeleton(tmp_path):
    class Own(torch.nn.Linear):
        pass

    model = Model(Own(3, 2).eval(), {"input": torch.randn(2, 3)}, "feature-extraction")
    save(model, tmp_path / "model")
    with pytest.raises(ModelError, match="holds a Own, which transformers does not have") as caught:
        load(tmp_path / "model")
    assert "skeleton=module" in caught.value.remedy
    back = load(tmp_path / "model", skeleton=Own(3, 2))
    assert torch.equal(back.module.weight, model.module.weight)


def test_an_existing_folder_is_refused(tmp_path):
    save(build("bert"), tmp_path / "model")
    with pytest.raises(OutputError, match="exists and is not empty"):
        save(build("bert"), tmp_path / "model")
    save(build("vit"), tmp_path / "model", force=True)
    assert load(tmp_path / "model").example.keys() == build("vit").example.keys()


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="is not a modelpress checkpoint: it has no compress.json"):
        load(tmp_path)


def test_a_checkpoint_is_not_a_plain_model(tmp_path):
    save(build("bert"), tmp_path / "model")
    with pytest.raises(ModelError, match="is a checkpoint written by modelpress"):
        load_model(tmp_path / "model")
    assert open_model(tmp_path / "model").task == build("bert").task


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "compress.json").write_text("{"), "compress.json is not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is not whole"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "is not whole"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage, message):
    save(build("bert"), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"), [({"schema": 99}, "has schema 99"), ({"steps": [0]}, "`gone`")]
)
def test_a_checkpoint_of_another_version(tmp_path, change, message):
    save(build("bert"), tmp_path / "model")
    file = tmp_path / "model" / "compress.json"
    step = {
        "name": "gone", "settings": {}, "effect": "exact", "changes": [], "skips": [], "record": {},
        "parity": {"max_abs": 0, "relative": 0, "cosine": 1},
        "bytes_before": 0, "bytes_after": 0, "seconds": 0, "resumed": False,
    }  # fmt: skip
    change = {"steps": [step]} if "steps" in change else change
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "model")
