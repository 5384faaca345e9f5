"""What all tests share: a cache that is not the user's, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

# kept between test runs: C++ takes long to compile
os.environ["MPQ_CACHE"] = str(Path(tempfile.gettempdir()) / f"mpq-tests-{os.getuid()}")

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # read when kernels are defined, so before anything else imports Triton in this process
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _with_index(tensor: Any, scope: Any) -> None:
        """The interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for the bound of a range."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _with_index
