"""Memory that a pass has freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

# blocks of 16 MiB, touched: one that teaches glibc the size, one to be freed below one that lives
_PROGRAM = """
import ctypes, resource
from mpq.loss.heap import give_back_large_tensors

libc, size = ctypes.CDLL(None), 2**24
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def block():
    place = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(place, 1, size)
    return place

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

known = give_back_large_tensors() if GIVEN else True
libc.free(block())
freed, behind = block(), block()
before = resident()
libc.free(freed)
print(known, before - resident() > size // 2)
"""


@pytest.mark.parametrize("given", [True, False])
def test_large_tensors_are_given_back(given: bool) -> None:
    """What is freed below something that lives is no longer this process's memory; without it glibc keeps it."""
    program = _PROGRAM.replace("GIVEN", str(given))
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    known, back = out.stdout.split()
    if known != "True":
        pytest.skip("not glibc")
    assert back == str(given)
