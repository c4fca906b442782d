"""Devices: whether torch has one, and how a module and its inputs come together on it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

from compress.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]


def require_device(name: str) -> None:
    """Raise `UsageError` if torch cannot compute on the device `name`, such as "cpu", "cuda" or "cuda:1"."""
    import torch

    remedy = f"Give another: torch {torch.__version__} has {', '.join(_devices())} here."
    try:
        torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"`{name}` is no device of torch.", remedy) from error
    try:
        torch.zeros(1, device=name).cpu()
    except (AssertionError, ImportError, RuntimeError) as error:  # each kind of device says so in its own way
        cause = str(error).strip().partition("\n")[0].rstrip(".!")
        raise UsageError(f"torch cannot compute on the device `{name}`: {cause}.", remedy) from error


def _devices() -> list[str]:
    """The devices that torch can compute on, one accelerator a name."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", *(f"{found.type}:{number}" for number in range(torch.accelerator.device_count()) if found)]


def device_of(module: nn.Module) -> torch.device | None:
    """Where the tensors of `module` are, by the first of them; None if it has none."""
    tensors = (tensor for some in (module.parameters(), module.buffers()) for tensor in some)
    return next((tensor.device for tensor in tensors), None)


@contextmanager
def on_device(module: nn.Module, device: str | torch.device) -> Iterator[nn.Module]:
    """`module` on `device` inside the block, and back where it was after it."""
    home = device_of(module)
    try:
        yield module.to(device)
    finally:
        if home is not None:
            module.to(home)


def moved(inputs: Batch, device: str | torch.device | None) -> dict[str, Tensor]:
    """`inputs` on `device`, where they are if it is None. Flags among them, which are no tensors, stay as they are."""
    import torch

    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


class Moved(Sequence[Batch]):
    """Batches on `device`: each comes there when it is asked for, and the others stay where they are.

    What has no length is put in a list. Places are those of `batches`, where these have any. The arguments called
    `without` stay behind.
    """

    def __init__(self, batches: Iterable[Batch], device: str, without: Collection[str] = ()) -> None:
        self.batches: Any = batches if isinstance(batches, Sized) else list(batches)
        self.device, self.without = device, without

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._moved, self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        found = self.batches[index]
        if isinstance(index, slice):
            return Moved(found, self.device, self.without)
        return self._moved(found)

    def _moved(self, batch: Batch) -> Batch:
        return moved({name: batch[name] for name in batch if name not in self.without}, self.device)


def kept(batches: Iterable[Batch]) -> Sequence[Batch]:
    """`batches` with places: a sequence as it is, which may make each batch when asked; all others in a list."""
    if isinstance(batches, Moved) and not isinstance(batches.batches, Sequence):
        return Moved(list(batches.batches), batches.device, batches.without)
    return batches if isinstance(batches, Sequence) else list(batches)
