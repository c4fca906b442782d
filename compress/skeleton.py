"""A model without its weights: modules whose parameters take no memory, filled from the files part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError
from compress.model import load_errors, model_class, require_folder
from compress.stored import Stored, stored_in

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Skeleton:
    """A module in evaluation mode whose parameters are hollow, and where the files of `stored` hold their values.

    `names` maps the name of each parameter and buffer that the files hold to the name that it has there, and `aliases`
    each further name of a shared parameter to the first one: parts are filled alone, and share nothing then.
    """

    module: nn.Module
    stored: Stored
    names: Mapping[str, str]
    aliases: Mapping[str, str]

    def fill(self, path: str, recurse: bool = True) -> None:
        """Read the tensors of the part at `path` in float32, or of its own alone if not `recurse`.

        Raises `ModelError` for values that are not finite.
        """
        part = self.module.get_submodule(path)
        inside = [name for name, _ in _tensors(part, path, recurse) if name in self.names]
        read = self.stored.read({self.names[name] for name in inside})
        for name in read:
            read[name] = _finite(read[name], name, self.stored.folder)
        for name in inside:
            _put(self.module, name, read[self.names[name]])

    def empty(self, path: str, recurse: bool = True) -> None:
        """Give the memory of the parameters of the part at `path` back."""
        hollow(self.module.get_submodule(path), recurse)

    def kinds(self, path: str) -> dict[str, torch.dtype]:
        """The float types in which the files hold the tensors of the part at `path`, by name."""
        import torch

        types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        named = _tensors(self.module.get_submodule(path), path, recurse=True)
        kinds = {name: self.stored.entries[self.names[name]].kind for name, _ in named if name in self.names}
        return {name: types[kind] for name, kind in kinds.items() if kind in types}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the module in the files."""
        return sum(self.stored.entries[name].bytes for name in set(self.names.values()))


def open_skeleton(name: str | Path, task: str | None) -> Skeleton:
    """The model in the folder `name` without its weights; see `load_model` for `task`.

    Raises `ModelError` for a missing or broken folder, and for tensors that the model has and the files have not.
    """
    import torch

    name = str(name)
    require_folder(name)
    if not Path(name).is_dir():
        raise ModelError(
            f"{name} is no folder here, and weights are streamed from files.",
            "Fetch the model first (`hf download NAME --local-dir FOLDER`), and name that folder.",
        )
    with load_errors(name):
        config, loader = model_class(name, task)
        build = getattr(loader, "from_config", None) or loader._from_config
        with _no_weights():
            module = build(config, dtype=torch.float32)
    module.tie_weights()
    hollow(module)
    stored = stored_in(Path(name))
    other = _aliases(module)
    return Skeleton(module.eval(), stored, _named(module, stored, other), other)


@contextmanager
def _no_weights() -> Iterator[None]:
    """Modules made inside have parameters on the meta device, of random values never drawn, and real buffers."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def hollow(module: nn.Module, recurse: bool = True) -> None:
    """Replace the parameters of `module` by zeros of the same shape that share one value: they take no memory.

    They are on the CPU, so that `torch.export` traces the module as it would trace the filled one. Ties stay.
    """
    import torch
    from torch import nn

    known: dict[int, nn.Parameter] = {}
    for part in module.modules() if recurse else (module,):
        for name, old in part._parameters.items():
            if old is None:
                continue
            if id(old) not in known:
                zeros = torch.zeros((), dtype=old.dtype).expand(old.shape)
                known[id(old)] = nn.Parameter(zeros, requires_grad=False)
            part._parameters[name] = known[id(old)]


def _aliases(module: nn.Module) -> dict[str, str]:
    """For each further name of a shared parameter of `module` the name that comes first."""
    first: dict[int, str] = {}
    found = {}
    for name, one in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(one), name) != name:
            found[name] = first[id(one)]
    return found


def _named(module: Any, stored: Stored, other: Mapping[str, str]) -> dict[str, str]:
    """Where the files hold each tensor, by the names that transformers reads the files with; a tied one may lie under
    any of its names.
    """
    state = module.state_dict()
    found = {name: key for key, name in _renamed(module, stored, state) if name in state}
    kept = {other.get(name, name): key for name, key in found.items()}
    found |= {name: kept[other.get(name, name)] for name in state if other.get(name, name) in kept}
    missing = [name for name, _ in module.named_parameters() if name not in found]
    if missing:
        raise ModelError(
            f"The files of {stored.folder} hold no weights for {len(missing)} tensors of {type(module).__name__}: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}.",
            "Choose the task that the model was trained for. Weights that transformers computes from others when it "
            "loads them cannot be streamed: load the model whole.",
        )
    return found


def _renamed(module: Any, stored: Stored, state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each tensor of the files, and the name that it has in the module; those that are first computed with left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(module)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    for key in sorted(stored.entries):
        name, converted = rename_source_key(key, renamings, converters, module.base_model_prefix, dict(state))
        if converted is None:
            yield key, name


def _tensors(part: nn.Module, path: str, recurse: bool) -> Iterable[tuple[str, torch.Tensor]]:
    yield from part.named_parameters(prefix=path, recurse=recurse, remove_duplicate=False)
    yield from part.named_buffers(prefix=path, recurse=recurse, remove_duplicate=False)


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    from torch import nn

    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    if leaf in part._parameters:
        part._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        part._buffers[leaf] = value


def _finite(value: torch.Tensor, name: str, folder: Path) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    low, high = value.aminmax() if value.numel() else (value.sum(), value.sum())
    if not (low.isfinite() and high.isfinite()):
        raise ModelError(
            f"The model {folder} has values that are not finite in `{name}`.",
            "The weights are broken; fetch the model again, or load an earlier checkpoint.",
        )
    return value.float()
