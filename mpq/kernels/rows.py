"""The passes around INT8's product: rows to codes and scales, the product back to its size. C++ (rows.cpp) or torch.

    quantize (T, K) -> codes u8 (T, K), scale FP32 (T, 1)      x ~ (codes - 128) * scale, a scale for each row
    rescale  y (T, C), scale (T, 1), bias (C) or None -> y * scale + bias, in y's memory

The C++ is compiled once with the machine's own compiler, into a temporary folder of the user's. Where there is none, torch's
own operations do the same in six sweeps instead of one each.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ZERO_POINT = 128
_TINY = torch.finfo(torch.float32).tiny
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Passes(Protocol):
    """Both passes; x and y are contiguous, FP32 or BF16."""

    def quantize(self, x: Tensor, perturb: float) -> tuple[Tensor, Tensor]: ...

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor: ...


class TorchPasses:
    """The passes in torch's operations."""

    def quantize(self, x: Tensor, perturb: float) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows."""
        values = x.float()
        scale = values.abs().amax(-1, keepdim=True) / 127.0
        scale = torch.where(scale > _TINY, scale, 1.0) * perturb
        return ((values / scale).round_().clamp_(-127, 127) + ZERO_POINT).to(torch.uint8), scale

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The product's rows times their scales, plus the bias."""
        scaled = y.float() * scale
        return y.copy_(scaled if bias is None else scaled + bias)


class NativePasses:
    """The passes in C++, from the library at `path`."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for suffix in _SUFFIX.values():
            getattr(self._library, f"quantize_{suffix}").argtypes = [pointer, size, size, ctypes.c_float, pointer, pointer]
            getattr(self._library, f"rescale_{suffix}").argtypes = [pointer, size, size, pointer, pointer]

    def quantize(self, x: Tensor, perturb: float) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows."""
        rows, k = x.shape
        codes, scale = torch.empty(rows, k, dtype=torch.uint8), torch.empty(rows, 1)
        function = getattr(self._library, f"quantize_{_SUFFIX[x.dtype]}")
        function(x.data_ptr(), rows, k, perturb, codes.data_ptr(), scale.data_ptr())
        return codes, scale

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The product's rows times their scales, plus the bias (FP32)."""
        function = getattr(self._library, f"rescale_{_SUFFIX[y.dtype]}")
        function(y.data_ptr(), *y.shape, scale.data_ptr(), None if bias is None else bias.data_ptr())
        return y


@functools.cache
def passes() -> Passes:
    """The fastest passes that this machine has; the slower ones are said in the log."""
    try:
        return NativePasses(_compiled())
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("INT8's activations are quantized by torch, and slowly, since C++ cannot be compiled here: %s", error)
        return TorchPasses()


def _compiled() -> Path:
    """The library, compiled unless it is there already. Raises OSError or CalledProcessError."""
    source = Path(__file__).with_name("rows.cpp")
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")
    if not compiler:
        raise OSError("no C++ compiler (g++, clang++ or $CXX)")
    # -march=native: the library of one machine is not the next one's, even under a home folder that they share
    made_with = (source.read_bytes(), compiler.encode(), *(f.encode() for f in _FLAGS), torch.__config__.show().encode(), *_cpu())
    folder = Path(tempfile.gettempdir()) / f"mpq-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to someone else")
    library = folder / f"rows-{hashlib.sha256(b'/'.join(made_with)).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as new:
            subprocess.run([compiler, *_FLAGS, str(source), "-o", new.name], check=True, capture_output=True, timeout=120)
        os.replace(new.name, library)
    return library


def _cpu() -> list[bytes]:
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [repr(sorted(features.items())).encode()]
