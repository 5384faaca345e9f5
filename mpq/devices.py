"""Which device a name means and whether it is there: asked before anything is loaded for it."""

from __future__ import annotations

import re

from mpq.errors import MpqError


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
