"""C++ beside a module, compiled once with the machine's own compiler into a temporary folder of the user's."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

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
        by.encode(),
        *(f.encode() for f in _FLAGS),
        torch.__config__.show().encode(),
        repr(sorted(features().items())).encode(),
    )
    folder = Path(tempfile.gettempdir()) / f"mpq-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to someone else")
    library = folder / f"{source.stem}-{hashlib.sha256(b'/'.join(made_with)).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as new:
            command = [by, *_FLAGS, str(source), "-o", new.name]
            told = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if told.returncode:
                os.unlink(new.name)
                why = (told.stderr.strip() or "no message").splitlines()[0]
                raise OSError(f"{by} cannot compile {source.name}: {why}")
        os.replace(new.name, library)
    return ctypes.CDLL(str(library))


def find_compiler() -> str:
    """The C++ compiler of this machine; empty where there is none."""
    return os.environ.get("CXX") or next(
        (c for c in ("g++", "clang++", "c++") if shutil.which(c)), ""
    )


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
