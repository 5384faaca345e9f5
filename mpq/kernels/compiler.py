"""C++ beside a module, compiled once with the machine's own compiler into a cache folder that only the user can write to."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from mpq.caches import is_private_file, private_folder
from mpq.errors import MpqError

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)


def compiled(source: Path) -> ctypes.CDLL:
    """The library of one C++ file. Raises OSError or subprocess.SubprocessError where it cannot be compiled or loaded."""
    by = find_compiler()
    if not by:
        raise OSError("no C++ compiler (g++, clang++ or $CXX)")
    # -march=native: the library of one machine is not the next one's, even under a home folder that they share
    text = (
        source.read_bytes(),
        *(header.read_bytes() for header in sorted(source.parent.glob("*.h"))),
    )
    made_with = (
        *text,
        *(word.encode() for word in (*by, *_FLAGS)),
        torch.__config__.show().encode(),
        repr(sorted(features().items())).encode(),
    )
    try:
        folder = private_folder("kernels")
    except MpqError as error:
        raise OSError(str(error)) from None
    library = folder / f"{source.stem}-{hashlib.sha256(b'/'.join(made_with)).hexdigest()[:16]}.so"
    if not is_private_file(library):
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            new = Path(aside) / library.name
            command = [*by, *_FLAGS, str(source), "-o", str(new)]
            told = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if told.returncode:
                why = (told.stderr.strip() or "no message").splitlines()[0]
                raise OSError(f"{shlex.join(by)} cannot compile {source.name}: {why}")
            new.chmod(0o700)
            os.replace(new, library)
    return ctypes.CDLL(str(library))


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler of this machine, as words of a command; empty where there is none.

    $CXX is split as a shell splits it, so that `ccache g++` is two words. Raises OSError where its quotes do not close.
    """
    try:
        given = tuple(shlex.split(os.environ.get("CXX") or ""))
    except ValueError as error:
        raise OSError(f"CXX is {os.environ['CXX']!r}, which is no command ({error})") from None
    return given or tuple(c for c in ("g++", "clang++", "c++") if shutil.which(c))[:1]


def features() -> dict[str, Any]:
    """What torch says of this CPU: its instructions by name (avx2, avx512_vnni, …), architecture and cpu_name; empty where it cannot."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


@functools.cache
def generation(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """` family 25 model 1`, as an x86 CPU numbers its generations; empty where Linux does not say."""
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    found = [
        re.search(rf"^{key}\s*:\s*(\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")
    ]
    return "".join(
        f" {word} {m[1]}" for word, m in zip(("family", "model"), found, strict=True) if m
    )
