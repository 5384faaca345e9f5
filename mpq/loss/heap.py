"""What a pass's freed tensors leave behind: without this, glibc keeps them as holes of its heap.

A tensor of up to 32 MiB lies on glibc's heap as soon as one of its size was freed, and a heap gives back its end alone. A
backward pass that forms gradients slice by slice, between activations that live until their turn comes, so held up to half
as much again as the tensors that lived (docs/log.md).
"""

from __future__ import annotations

import ctypes
import functools
import sys

LARGE = 2**20  # bytes from which on an allocation is pages of its own, given back when it is freed
_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h


@functools.cache
def give_back_large_tensors() -> bool:
    """Have this process's memory from LARGE bytes on given back as soon as it is freed, from now on; whether that could be had:
    glibc alone can."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_MMAP_THRESHOLD, LARGE) == 1
