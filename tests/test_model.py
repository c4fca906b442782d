"""Loading models: what comes with them, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import ModelError, UsageError
from compress.model import TASKS, load_model, task_of
from tests.zoo import build


@pytest.fixture
def folder(tmp_path):
    build("bert").module.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_folder_gives_module_example_and_task(folder):
    model = load_model(folder)
    assert not model.module.training
    assert model.task == task_of(build("bert").module)
    assert model.source == str(folder)
    ids, mask = model.example["input_ids"], model.example["attention_mask"]
    assert ids.shape == mask.shape == (2, 16)
    assert mask.sum(1).tolist() == [16, 12]
    assert torch.isfinite(model.module(**model.example)[0]).all()


@pytest.mark.parametrize("name", ["vit", "gpt2", "t5", "whisper", "clip"])
def test_the_example_of_any_kind_of_model_runs(name, tmp_path):
    source = build(name)
    source.module.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model.module) is type(source.module)
    with torch.no_grad():
        model.module(**model.example)
    assert {len(value) for value in model.example.values()} == {2}


def test_the_example_is_always_the_same(folder):
    one, other = load_model(folder).example, load_model(folder).example
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_task_names_a_class_of_transformers():
    assert all(hasattr(transformers, auto) for auto in TASKS.values())


def test_an_unknown_task_lists_the_tasks(folder):
    with pytest.raises(UsageError, match="There is no task `embedding`") as caught:
        load_model(folder, task="embedding")
    assert "feature-extraction" in caught.value.remedy


def test_a_missing_folder(tmp_path):
    with pytest.raises(ModelError, match="The model folder .*nowhere does not exist"):
        load_model(tmp_path / "nowhere")


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        load_model(tmp_path)


def test_a_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json is not valid JSON"):
        load_model(folder)


def test_a_truncated_weight_file(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded from the folder"):
        load_model(folder)


def test_weights_that_would_be_random_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["BertForSequenceClassification"]})
    )
    with pytest.raises(ModelError, match="which would be random: classifier.bias"):
        load_model(folder)


def test_weights_that_are_not_finite_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name][0, :2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"2 values that are not finite in `.*query\.weight`"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder):
    torch.save(build("bert").module.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded from the folder") as caught:
        load_model(folder)
    assert "safetensors" in caught.value.remedy


def test_a_new_value_has_no_cached_graph():
    model = build("bert")
    assert model.graph is model.graph
    assert replace(model, task="fill-mask").graph is not model.graph
