"""Where a model's weights lie: on its device, or where they do not fit there, spread over GPUs, memory and disk.

The spreading is accelerate's (its `infer_auto_device_map`, through Transformers' `from_pretrained`): a hook around each
module's forward brings the module's weights, from memory or through a memory map of the safetensors file, and lets go of
them afterwards. Outside its forward such a weight is a `meta` tensor without values. What runs in a module's place
therefore goes beneath that hook (`with_forward`), and reads the weight when it is called.

On a CPU all weights stay on disk then: a mapped page takes no memory that the system could not have back, and what fits
stays in its page cache.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mpq.caches import private_folder
from mpq.devices import free_memory
from mpq.errors import MpqError

log = logging.getLogger("mpq")
# of the memory that is free: weights, and in an evaluation as much again of them rounded
_OF_MEMORY = 0.5
_OF_GPU = 0.8  # the rest is for activations


@dataclass(frozen=True)
class Spread:
    """That a model's weights are not all on its device: what `from_pretrained` is to be told, and why, in words."""

    options: dict[str, Any]
    why: str


def spread_of(needed: int, device: str, memory: int | None = None) -> Spread | None:
    """How to load weights of `needed` bytes that do not fit the device; None where they do.

    `memory` bytes may be taken on a CPU, by default what is free. The first GPU shares with all others that torch sees,
    another one (`cuda:N`) has memory and disk behind it alone.
    """
    if device == "cpu":
        room = free_memory() if memory is None else memory
        if needed <= _OF_MEMORY * room:
            return None
        why = f"{_size(room)} of memory may be taken: they stay on disk and are read layer by layer"
        return Spread({"device_map": {"": "disk"}}, f"{_size(needed)} of weights, {why}")
    of_gpus = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    own = torch.device(device).index or 0
    if needed <= _OF_GPU * of_gpus[own]:
        return None
    used = of_gpus if own == 0 else {own: of_gpus[own]}
    rest = int(_OF_MEMORY * (free_memory() if memory is None else memory))
    room_of: dict[int | str, int] = {i: int(_OF_GPU * free) for i, free in used.items()}
    why = (
        f"{_size(of_gpus[own])} are free on {device}: they are spread over {len(used)} "
        f"GPU{'s' if len(used) > 1 else ''}, memory and disk"
    )
    options = {"device_map": "auto", "max_memory": {**room_of, "cpu": rest}}
    return Spread(options, f"{_size(needed)} of weights, {why}")


@contextmanager
def offload_folder() -> Iterator[tuple[str, Callable[[nn.Module], None]]]:
    """A folder for weights that a model has in another form than its files, such as experts stacked into one tensor.

    Yields it and what hands it to a model, with which it goes; else it goes on leaving. It lies in this user's cache, not
    in the temporary folder, which may be memory. Folders of processes that have died are taken away first.
    """
    parent = private_folder("offloaded")
    for left in parent.iterdir():
        if (pid := left.name.partition("-")[0]).isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(dir=parent, prefix=f"{os.getpid()}-")
    kept = False

    def keep(model: nn.Module) -> None:
        nonlocal kept
        kept = True
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)

    try:
        yield folder, keep
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def check_accelerate(why: str) -> None:
    """Raise MpqError where accelerate, which spreads models, is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise MpqError(
            f"The model is larger than its device ({why}), for which mpq needs accelerate: pip install accelerate."
        ) from None


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the model's weights to `dtype`; those that are elsewhere arrive in it, since hooks cast to what a module has.

    Buffers stay as they are: rotary frequencies in 16 bits would turn the tokens after the first some hundred elsewhere.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def device_of(model: nn.Module) -> torch.device:
    """The device that the model takes its tokens on: that of its weights, or the main one that they are brought to."""
    if hooks := _hooks(model):
        return torch.device(hooks[-1].execution_device)
    return next(model.parameters()).device


def comes_and_goes(module: nn.Module) -> bool:
    """Whether the module has its weights during its forward alone."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def is_spread(model: nn.Module) -> bool:
    """Whether some of the model's weights come and go."""
    return bool(_hooks(model)) and any(comes_and_goes(module) for module in model.modules())


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, `forward` stands for the module's own, beneath a hook that brings its weights."""
    of, place = module.__dict__, "_old_forward" if _hooks(module) else "forward"
    before = of.get(place)
    of[place] = forward
    try:
        yield
    finally:
        if before is None:
            del of[place]
        else:
            of[place] = before


@contextmanager
def holding(module: nn.Module, own: dict[str, nn.Parameter]) -> Iterator[None]:
    """Within, the module has these parameters: a backward pass asks for them after its forward has let them go."""
    before = {name: module._parameters[name] for name in own}
    module._parameters.update(own)
    try:
        yield
    finally:
        module._parameters.update(before)


def _hooks(module: nn.Module) -> Sequence[Any]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def bytes_of(files: Sequence[Path], dtype: torch.dtype) -> int:
    """Bytes that the files' tensors take in `dtype`; none is read. Of damaged files 0: loading says what is wrong with them."""
    elements = 0
    try:
        for file in files:
            with safe_open(str(file), framework="pt") as tensors:
                shapes = (tensors.get_slice(k).get_shape() for k in tensors.keys())  # noqa: SIM118
                elements += sum(torch.Size(shape).numel() for shape in shapes)
    except SafetensorError:
        return 0
    return elements * dtype.itemsize


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
