"""The versions and the processor that a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "modelpress",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
)
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "bf16",
    "i8mm",
)
"""Those that decide which integer and half kernels a runtime takes."""


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a run gives."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> dict[str, str | list[str]]:
    """The CPU's name and those of its flags that decide which kernels run."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    name = values.get("model name") or platform.processor() or platform.machine()
    return {"name": name, "flags": [flag for flag in CPU_FLAGS if flag in flags]}
