"""Which of several processes this one is, where a launcher (`torchrun`, `accelerate launch`) started more than one.

Every process runs the same passes on the same data, and gets the same result; training is shared between them. Only
the main process writes. The launcher says who is who in the environment, by the names that PyTorch reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "LOCAL_", "FSDP_", "PARALLELISM_")
NAMES = ("RANK", "WORLD_SIZE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


def rank() -> int:
    """The number of this process, from 0; the main one is 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def own_device(name: str) -> str:
    """The device `name` for this process: of several processes on a machine, each has an accelerator of its own."""
    kind = name.partition(":")[0]
    return name if count() == 1 or kind == "cpu" else f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"


def shared(value: T) -> T:
    """The main process's `value`, in all of them. Every process must call it, and waits until all have done so."""
    if count() == 1:
        return value
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    dist.barrier()
    return box[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order. Every process must call it."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group()
    box: list[Any] = [None] * count()
    dist.all_gather_object(box, value)
    return box


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what a launcher put there: for a child process that is no part of the group."""
    return {
        name: value
        for name, value in environment.items()
        if name not in NAMES and not name.startswith(PREFIXES)
    }
