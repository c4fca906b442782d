"""Save a compressed model, and load it back with the same outputs, bit for bit.

A checkpoint is a folder: `config.json` and the processor's files as transformers writes them, `model.safetensors`
with every tensor once (or several such files and their index, as a streamed run writes them), `example.safetensors`,
and `compress.json`: the class, the task, names that share a tensor, package versions, and every pass with its settings
and the record from which its structure is rebuilt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError, RecipeError
from compress.folders import new_folder
from compress.model import DType, Model, load_model, load_processor
from compress.recipe import find
from compress.report import Change, Parity, Skip, Step
from compress.stored import SINGLE, weight_files
from compress.versions import package_versions

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = 1


def save(model: Model, folder: str | Path, force: bool = False) -> Path:
    """Write `model` as a checkpoint folder. Raises `OutputError` if `folder` is taken and `force` is not given."""
    with new_folder(Path(folder), force) as partial:
        write_checkpoint(model, partial)
    return Path(folder)


def write_checkpoint(model: Model, folder: Path) -> None:
    """Write the files of a checkpoint into an existing folder."""
    from safetensors.torch import save_file

    tensors, aliases = _unique_tensors(model.module.state_dict())
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    write_description(model, folder, aliases)


def write_description(model: Model, folder: Path, aliases: Mapping[str, str]) -> None:
    """Write the files of a checkpoint beside the weights: `aliases` are names of tensors that lie under others."""
    from safetensors.torch import save_file

    save_file(
        {name: value.contiguous() for name, value in model.example.items()}, folder / "example.safetensors"
    )
    if hasattr(model.module, "config"):
        model.module.config.save_pretrained(folder)
    if getattr(model.module, "can_generate", lambda: False)():
        model.module.generation_config.save_pretrained(folder)
    if model.processor is not None:
        model.processor.save_pretrained(folder)
    record = {
        "schema": SCHEMA,
        "class": type(model.module).__name__,
        "task": model.task,
        "source": model.source,
        "aliases": dict(aliases),
        "versions": package_versions(),
        "steps": [asdict(step) for step in model.history],
    }
    (folder / "compress.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load(folder: str | Path, skeleton: nn.Module | None = None) -> Model:
    """Load a checkpoint that `save` wrote.

    `skeleton` is the uncompressed module, for a model whose class transformers does not have; it is edited in place.
    Raises `ModelError` for a missing, foreign or corrupt folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    record = _read_record(folder)
    try:
        tensors = {name: value for file in weight_files(folder) for name, value in load_file(file).items()}
        example = load_file(folder / "example.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The checkpoint {folder} is not whole: {error}.", "Write it again.") from error
    steps = tuple(_step(values) for values in record["steps"])
    module = _rebuild(_skeleton(folder, record) if skeleton is None else skeleton, steps)
    _fill(module, tensors, record["aliases"], folder)
    return Model(
        module.eval(), example, record["task"], steps, record["source"], load_processor(str(folder), False)
    )


def open_model(name: str | Path, task: str | None = None, dtype: DType = "float32") -> Model:
    """Load a checkpoint or a plain transformers model, whichever `name` is."""
    if (Path(name) / "compress.json").exists():
        return load(name)
    return load_model(name, task, dtype=dtype)


def _unique_tensors(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor once, contiguous, and for each further name of one the name that it is stored under."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
        else:
            seen[identity] = name
            tensors[name] = tensor.contiguous()
    return tensors, aliases


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / "compress.json"
    if not file.exists():
        raise ModelError(
            f"{folder} is not a modelpress checkpoint: it has no compress.json.",
            "Plain transformers models are loaded with compress.load_model.",
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"The file {file} is not valid JSON: {error}.", "Write the checkpoint again."
        ) from error
    if record["schema"] > SCHEMA:
        raise ModelError(
            f"The checkpoint {folder} has schema {record['schema']}; this version reads up to {SCHEMA}.",
            "Update modelpress.",
        )
    return record


def _step(values: dict[str, Any]) -> Step:
    nested = {
        "changes": tuple(Change(**change) for change in values["changes"]),
        "skips": tuple(Skip(**skip) for skip in values["skips"]),
        "parity": Parity(**values["parity"]),
    }
    return Step(**(values | nested))


def _skeleton(folder: Path, record: dict[str, Any]) -> nn.Module:
    import transformers

    owner = getattr(transformers, record["class"], None)
    if owner is None:
        raise ModelError(
            f"The checkpoint {folder} holds a {record['class']}, which transformers does not have.",
            "Build the uncompressed module and pass it: compress.load(folder, skeleton=module).",
        )
    return owner(owner.config_class.from_pretrained(folder))


def _rebuild(module: nn.Module, steps: tuple[Step, ...]) -> nn.Module:
    for step in steps:
        try:
            settings = find("compress.passes", step.name).model_validate(step.settings)
        except RecipeError as error:
            raise ModelError(
                f"The checkpoint needs the pass `{step.name}`, which is not installed.", error.remedy
            ) from error
        module = settings.restore(module, step.record)
    return module


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor], aliases: dict[str, str], folder: Path) -> None:
    state = tensors | {name: tensors[kept] for name, kept in aliases.items()}
    try:
        # Assigned, not copied: integer and half tensors keep their types whatever the skeleton's are.
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(
            f"The checkpoint {folder} does not fit its own structure: {str(error).splitlines()[1].strip()}",
            "It was edited, written by another version, or made from another model than the given one; write it again.",
        ) from error
    for name, kept in aliases.items():
        owner, _, leaf = name.rpartition(".")
        keeper, _, kept_leaf = kept.rpartition(".")
        setattr(module.get_submodule(owner), leaf, getattr(module.get_submodule(keeper), kept_leaf))
