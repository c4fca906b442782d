"""A device beside the CPU, in the CPU's memory, for machines that have no other: `second`.

Importing this module gives torch the device. Its tensors are torch's own, of the backend that torch keeps for others,
and kernels run on the CPU's view of the same memory. As on a GPU, an operation on tensors of both devices is an error,
but for copies, scalars and indices. A process that has computed gradients before cannot have the device any more, so
tests run `tests.on_second_device` in one of its own. It has no autocast, and `torch.save` cannot write its tensors.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "second"
CPU, OTHER = 1, 12
"""How DLPack numbers devices."""
INDEXED = ("aten::index", "aten::_index_put_impl_")
"""Operations whose second argument may be on the CPU."""

ran: Counter[str] = Counter()
"""How often each operation ran on the device."""


class _Header(ctypes.Structure):
    """The beginning of DLPack's `DLTensor`."""

    _fields_ = (("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2))


def _relabelled(tensor: torch.Tensor, device: int) -> torch.Tensor:
    """A tensor on `device` over the memory of `tensor`."""
    capsule = torch.utils.dlpack.to_dlpack(tensor.detach())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    _Header.from_address(pointer(capsule, b"dltensor")).device[0] = device
    return torch.utils.dlpack.from_dlpack(capsule)


def _is_here(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return _relabelled(value, CPU) if _is_here(value) else value


def _require_one_device(name: str, args: tuple[Any, ...]) -> None:
    name = name.partition(".")[0]
    values = pytree.tree_leaves((args[:1], args[2:]) if name in INDEXED else args)
    others = [one for one in values if isinstance(one, torch.Tensor) and not _is_here(one) and one.dim()]
    if others and any(map(_is_here, values)) and name != "aten::_copy_from":
        raise RuntimeError(f"{name}: tensors on {NAME} and on {others[0].device}")


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operation of the device on the CPU's view of its tensors."""
    values, form = pytree.tree_flatten((args, kwargs))
    _require_one_device(op.name(), (*args, *kwargs.values()))
    ran[op.name()] += 1
    views = [_on_cpu(one) for one in values]
    args_there, kwargs_there = pytree.tree_unflatten(views, form)
    if op.name() == "aten::_copy_from":
        args_there[1].copy_(args_there[0])
        return args[1]
    out = kwargs.get("out")
    if isinstance(out, torch.Tensor) and not out.numel():  # a view cannot grow
        out.data = _relabelled(
            op(*args_there, **{**kwargs_there, "out": out.new_empty(0, device="cpu")}), OTHER
        )
        return out
    given = {id(view): value for view, value in zip(views, values, strict=True)}
    made = op(*args_there, **kwargs_there)
    return pytree.tree_map(lambda one: _back(one, given, kwargs.get("device")), made)


def _back(made: Any, given: dict[int, Any], device: Any) -> Any:
    if id(made) in given:
        return given[id(made)]
    stays = device is not None and torch.device(device).type != NAME
    return made if stays or not isinstance(made, torch.Tensor) else _relabelled(made, OTHER)


def _convolution_backward(grad: torch.Tensor, *args: Any) -> Any:
    return _compute(torch.ops.aten.convolution_backward.default, grad, args[0], args[1], None, *args[2:])


class _Module(backend_registration._DummyBackendModule):
    """What `torch.second` has to have."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
        """Its random numbers are the CPU's."""


_deepcopy = torch.Tensor.__deepcopy__


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """A deep copy, of a tensor on the device without one of its memory, which nobody has allocated."""
    if not _is_here(tensor):
        return _deepcopy(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))


def _register() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_compute, "PrivateUse1")
    convolution = torch.ops.aten.convolution.default
    aten.impl("convolution_overrideable", lambda *args: _compute(convolution, *args), "PrivateUse1")
    aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    for key in ("CPU", "PrivateUse1"):  # a parameter that moves stays the same object, as on a GPU
        aten.impl("_has_compatible_shallow_copy_type", lambda _, __: True, key)
    return [every, aten]


_LIBRARIES = _register()
torch.Tensor.__deepcopy__ = _copied  # type: ignore[method-assign]
