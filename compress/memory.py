"""Give memory that is free back to the operating system."""

from __future__ import annotations

import ctypes
import gc
import os


def give_back() -> None:
    """Collect unreachable objects, and return the allocator's free pages: to be called before other processes need
    memory.

    glibc keeps what was freed between blocks still in use, which after a trace and an export is more than the
    model. Other C libraries have no such call, and give back on their own or not at all.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
