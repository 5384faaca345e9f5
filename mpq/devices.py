"""Which device a name means, whether it is there, and how much memory: asked before anything is loaded for it."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from mpq.errors import MpqError

_CGROUPS = Path("/sys/fs/cgroup")


def resolve(device: str) -> str:
    """The device that a name means here: `auto` is the first GPU that torch sees, else the CPU; others are themselves."""
    if device != "auto":
        return device
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise MpqError unless `device` is the CPU or a GPU that torch sees, saying what it is and what can be done."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not found:
        raise MpqError(f"Unknown device {device!r}: expected cpu, cuda or cuda:N.")
    if device == "cpu":
        return
    import torch  # takes a second: those who ask for a CPU do not wait for it

    if not torch.cuda.is_available():
        why = (
            "this torch is built for CPUs"
            if torch.version.cuda is None
            else "torch sees no NVIDIA GPU or no driver for it"
        )
        raise MpqError(
            f"There is no {device} here: {why}. Use --device cpu (in a spec: model.device), or a machine and a torch that have one."
        )
    count = torch.cuda.device_count()
    if found[1] and int(found[1]) >= count:
        raise MpqError(
            f"There is no {device} here: torch sees {count} GPU{'s' if count > 1 else ''}, counted from cuda:0."
        )


def found_device(device: str) -> str:
    """`resolve`, checked: the device that a name means here. Raises MpqError where it is not there."""
    meant = resolve(device)
    check_device(meant)
    return meant


def memory_limit() -> int:
    """This machine's memory in bytes, or what a container or a limit of its own lets this process take of it."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has free, within the limits that hold for it.

    Pages of files do not count as taken: the system drops them when memory is short.
    """
    free = [max(0, limit - taken) for limit, taken in _limits()]
    return min([_entry(Path("/proc/meminfo"), "MemAvailable:") * 1024 or memory_limit(), *free])


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, taken) in bytes of each memory limit on this process: its own, and those of its cgroups (version 1 or 2)."""
    for what, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit = resource.getrlimit(what)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, _entry(Path("/proc/self/status"), field) * 1024
    for folder in _cgroups():
        for file, field in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):
            try:
                said = (folder / file).read_text().strip()
            except OSError:
                continue
            if said.isdigit():  # not `max`
                yield int(said), _entry(folder / "memory.stat", field)


def _cgroups() -> Iterator[Path]:
    """The folders of this process's memory cgroup and of those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or "memory" in controllers.split(","):
            root = _CGROUPS / ("memory" if controllers else "")
            own = root / path.strip("/")
            yield from (f for f in (own, *own.parents) if f == root or root in f.parents)


def _entry(file: Path, field: str) -> int:
    """The number after `field` in a file of the system's; 0 where there is none."""
    try:
        lines = (line.split() for line in file.read_text().splitlines())
        return next(int(words[1]) for words in lines if words and words[0] == field)
    except (OSError, StopIteration, ValueError):
        return 0
