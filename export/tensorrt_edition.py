"""The two editions of TensorRT: one Python interface under two module names, and the compute capabilities
of GPUs.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Literal

from compress.errors import MissingPackage, UsageError, WrongDevice

Edition = Literal["rtx", "datacenter"]

MODULES: dict[Edition, str] = {"rtx": "tensorrt_rtx", "datacenter": "tensorrt"}
"""What to import. The extra of this project that installs it has the module's name, with a dash."""


def import_edition(edition: Edition) -> ModuleType:
    """The edition's Python module. Raises `MissingPackage` with the pip command."""
    name = MODULES[edition]
    extra = name.replace("_", "-")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(
            f"The {edition} edition of TensorRT needs the Python module `{name}`: {error}.",
            f'Install it with: pip install "modelpress[{extra}]"',
        ) from error


def offered_capabilities(trt: Any) -> dict[str, Any]:
    """The compute capabilities that this TensorRT-RTX builds for: "8.6" and its enum value, in rising
    order.
    """
    numbered = {
        int(name.removeprefix("SM")): value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    return {f"{number // 10}.{number % 10}": numbered[number] for number in sorted(numbered)}


def require_offered(trt: Any, wanted: tuple[str, ...]) -> None:
    """Raise `UsageError` for a compute capability that the installed version does not build for."""
    offered = offered_capabilities(trt)
    for capability in wanted:
        if capability not in offered:
            raise UsageError(
                f"TensorRT-RTX {trt.__version__} builds no engines for compute capability {capability}.",
                f"It offers {', '.join(offered)}.",
            )


def gpu_capability() -> str | None:
    """The compute capability of this machine's current GPU, such as "8.9"; None without a usable GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def require_gpu(needed: tuple[str, ...]) -> None:
    """Raise `WrongDevice` if this machine has no GPU of one of the compute capabilities `needed`."""
    found = gpu_capability()
    if found not in needed:
        has = "no usable GPU" if found is None else f"a GPU of compute capability {found}"
        raise WrongDevice(
            f"This engine runs on GPUs of compute capability {', '.join(needed)}; this machine has {has}.",
            "Run it where such a GPU is, or build it again with the compute capability of yours.",
        )
