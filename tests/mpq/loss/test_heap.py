"""Memory that a pass has freed."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from mpq.loss.heap import give_back_large_tensors


def test_large_tensors_are_given_back() -> None:
    """Where the C library can do it, a tensor of 16 MiB that is freed is no longer this process's memory, though one of its size
    was freed before and another lives behind it."""
    if not give_back_large_tensors():
        pytest.skip("not glibc")
    torch.ones(2**22).sum()
    freed, behind = torch.ones(2**22), torch.ones(2**22)
    before = _resident()
    del freed
    assert before - _resident() > 2**23
    assert behind[0] == 1


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
