"""A model as a value: the module, example inputs, the task, and the passes that made it what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.devices import moved, on_device
from compress.errors import ModelError, UsageError
from compress.report import Step

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.graph import Graph

Inputs = Mapping[str, "torch.Tensor"]
DType = Literal["float32", "float16", "bfloat16"]

TASKS = {
    "feature-extraction": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "depth-estimation": "AutoModelForDepthEstimation",
    "object-detection": "AutoModelForObjectDetection",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "audio-classification": "AutoModelForAudioClassification",
}
"""Tasks by the names that the Hub gives them, and the transformers class that loads a model for each."""


@dataclass(frozen=True)
class Model:
    """A module in evaluation mode, and what is needed to trace, save and export it.

    `example` holds forward keyword arguments with a batch of at least 2. `processor` is the tokenizer, image
    processor or feature extractor, if there is one. A new value has no cached graph.
    """

    module: nn.Module
    example: Inputs
    task: str
    history: tuple[Step, ...] = ()
    source: str = ""
    processor: Any = field(default=None, compare=False)

    @cached_property
    def graph(self) -> Graph:
        """The discovered structure, traced on first use. Raises `Unsuitable` if the module cannot be traced."""
        from compress.graph import trace

        return trace(self.module, self.example)

    @contextmanager
    def on(self, device: str) -> Iterator[Model]:
        """This model with its module and its example on `device`; after the block the module is back where it was."""
        with on_device(self.module, device):
            there = replace(self, example=moved(self.example, device))
            _share_graph(self, there)
            yield there
            _share_graph(there, self)


def _share_graph(known: Model, other: Model) -> None:
    """Tell `other`, the same model elsewhere, what was found out about the structure, if anything was."""
    if "graph" in vars(known):
        vars(other)["graph"] = known.graph


def load_model(
    name: str | Path,
    task: str | None = None,
    *,
    dtype: DType = "float32",
    example: Inputs | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a transformers model from a folder or the Hub, in evaluation mode, with its processor and an example.

    Without `task` the class that the configuration names is loaded. A folder is read without network access, weights
    only from safetensors. Raises `ModelError` for a missing or corrupt folder, for weights that are missing (they
    would be random) or not finite, and `UsageError` for an unknown task.
    """
    name = str(name)
    require_folder(name)
    if task is not None and task not in TASKS:
        raise UsageError(f"There is no task `{task}`.", f"Tasks are: {', '.join(TASKS)}.")
    with load_errors(name):
        config, loader = model_class(name, task, trust_remote_code)
        module, loading = loader.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=Path(name).is_dir(),
            trust_remote_code=trust_remote_code,
        )
    _require_weights(name, module, loading)
    processor = load_processor(name, trust_remote_code)
    module.eval()
    if example is None:
        from compress.example import example_inputs

        example = example_inputs(module, processor)
    return Model(module, example, task or task_of(module), source=name, processor=processor)


def task_of(module: nn.Module) -> str:
    """The task whose transformers class loads `module`'s class; "feature-extraction" if there is none."""
    import transformers

    for task, auto in TASKS.items():
        if auto == "AutoModel":
            continue
        # By the configuration: going through all values of the mapping would import every model there is.
        found = getattr(transformers, auto)._model_mapping.get(type(getattr(module, "config", None)), None)
        if type(module) in (found if isinstance(found, tuple | list) else (found,)):
            return task
    return "feature-extraction"


def model_class(name: str, task: str | None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        name, local_files_only=Path(name).is_dir(), trust_remote_code=trust_remote_code
    )
    if task is not None:
        return config, getattr(transformers, TASKS[task])
    architecture = (config.architectures or [""])[0]
    return config, getattr(transformers, architecture, transformers.AutoModel)


def require_folder(name: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        if (folder / "compress.json").exists():
            raise ModelError(
                f"{name} is a checkpoint written by modelpress, not a plain transformers model.",
                "Load it with compress.load.",
            )
        if not (folder / "config.json").exists():
            raise ModelError(
                f"The model folder {name} has no config.json.",
                "Name the folder that save_pretrained wrote: config.json beside model.safetensors.",
            )
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"The file {folder / 'config.json'} is not valid JSON: {error}.", "Fetch the model again."
            ) from error
    elif folder.exists():
        raise ModelError(f"{name} is a file, not a model folder.", "Name the folder that holds config.json.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"The model folder {name} does not exist.", "Check the path.")


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise for an unusable model into `ModelError`."""
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "from the folder" if Path(name).is_dir() else "from the Hub (there is no such folder here)"
        raise ModelError(
            f"The model {name} cannot be loaded {where}: {first}",
            "Check that the folder holds a whole model with safetensors weights, as save_pretrained writes it."
            if Path(name).is_dir()
            else "Name a local folder, or check the name and the network.",
        ) from error


def _require_weights(name: str, module: nn.Module, loading: Mapping[str, Any]) -> None:
    import torch

    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"The model {name} has no weights for {len(missing)} tensors of {type(module).__name__}, "
            f"which would be random: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}.",
            "Choose the task that the model was trained for.",
        )
    for tensor_name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"The model {name} has {bad} values that are not finite in `{tensor_name}`, of {tensor.numel()}.",
                "The weights are broken; fetch the model again, or load an earlier checkpoint.",
            )


def load_processor(name: str, trust_remote_code: bool) -> Any:
    """The tokenizer, image processor or feature extractor that comes with the model, or None."""
    import transformers

    local = Path(name).is_dir()
    for auto, files in (
        ("AutoProcessor", ("processor_config.json",)),
        ("AutoTokenizer", ("tokenizer.json", "tokenizer_config.json", "vocab.txt")),
        ("AutoImageProcessor", ("preprocessor_config.json",)),
    ):
        if not local or any((Path(name) / file).exists() for file in files):
            loader = getattr(transformers, auto)
            try:
                return loader.from_pretrained(
                    name, local_files_only=local, trust_remote_code=trust_remote_code
                )
            except (OSError, ValueError):
                # The next kind may be the right one: preprocessor_config.json belongs to images and to audio.
                continue
    return None
