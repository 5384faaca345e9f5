"""What of a run's spec depends on the machine: formats, batches and lengths that fit it and the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mpq.devices import memory_limit
from mpq.errors import MpqError, first_line
from mpq.formats.format import get_format
from mpq.formats.scheme import get_scheme

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_SPARE = 0.8  # of a memory, what a run may take: others live there too
# bytes per token, layer and hidden feature that a backward pass keeps of the forward, in 2-byte elements
# (Korthikanti et al. 2022, arXiv 2205.05198, eq. 1: 34, attention's scores left out)
_KEPT = 34
_CPU_RATE = 1e11  # multiply-adds per second, of a few cores: for the order of magnitude alone
_PATIENCE_S = 600  # what calibrating may take on a CPU


@dataclass(frozen=True)
class Machine:
    """The device of a run: its memory in bytes, and what its linears and attention run natively."""

    device: str
    memory: int
    native: tuple[str, ...]

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"


@dataclass(frozen=True)
class Shape:
    """What of a model decides how much fits: parameters, the format of its weights, and its sizes."""

    parameters: int
    dtype: str
    layers: int
    hidden: int
    vocabulary: int
    positions: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights in its base format."""
        return int(self.parameters * get_format(self.dtype).bytes)


@dataclass(frozen=True)
class Fit:
    """The choices of a spec. `note` says in one sentence what does not fit, empty where all does."""

    base: str
    timed: tuple[str, ...]
    samples: int
    length: int
    batch: int
    checkpoint_activations: bool
    prefill: tuple[int, int]
    perplexity: tuple[float, ...]  # its relative rise that plans are bounded by
    note: str = ""


def machine_here(device: str) -> Machine:
    """What is known of a device of this machine."""
    import torch

    from mpq.kernels import native_formats

    memory = memory_limit() if device == "cpu" else torch.cuda.mem_get_info(device)[1]
    return Machine(device, memory, native_formats(device))


def shape_of(config: Any) -> Shape:
    """What a configuration says of a model, weights neither read nor allocated."""
    from mpq.models.graph import build_on_meta

    text = config.get_text_config()
    try:
        parameters = sum(p.numel() for p in build_on_meta(config).parameters())
    except Exception as error:  # each architecture's code says it in its own way
        raise MpqError(
            f"The architecture {config.model_type} cannot be built from its config.json ({first_line(error)})."
        ) from None
    needed = ("num_hidden_layers", "hidden_size", "vocab_size")
    if lacking := [name for name in needed if not isinstance(getattr(text, name, None), int)]:
        raise MpqError(
            f"The architecture {config.model_type} does not say its {lacking[0]} in config.json, which batches are fitted to: write the spec by hand (docs/spec.md)."
        )
    positions = getattr(text, "max_position_embeddings", None)
    dtype = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "bfloat16")
    return Shape(
        parameters=parameters,
        dtype=_DTYPES.get(dtype.removeprefix("torch."), "bf16"),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        positions=positions if isinstance(positions, int) and positions > 1 else 4096,
    )


def fit(shape: Shape, machine: Machine) -> Fit:
    """The spec's choices for a model of this shape on this machine."""
    base = shape.dtype
    if machine.is_gpu and base not in machine.native:  # BF16 on a GPU that has none
        base = "fp16" if "fp16" in machine.native else "fp32"
    length = min(512 if machine.is_gpu else 256, shape.positions)
    free = machine.memory * _SPARE - shape.weight_bytes
    width = get_format(base).bytes / 2
    kept = shape.layers * shape.hidden * _KEPT * width + 3 * 4 * shape.vocabulary  # logits in FP32
    room = free / (kept * length)
    samples = 128 if machine.is_gpu else 64
    if not machine.is_gpu:  # forward and backward are three products a weight and token
        affordable = _PATIENCE_S * _CPU_RATE / (3 * shape.parameters * length)
        samples = _power_of_two(affordable, 8, 64)
    note = ""
    if free < 0:
        note = (
            f"the model's weights take {_size(shape.weight_bytes)} in {base} and {machine.device} has "
            f"{_size(machine.memory)}: they are spread over what else there is and disk, and read again in every pass"
        )
    large = shape.parameters > 1e9 and not machine.is_gpu
    return Fit(
        base=base,
        timed=_timed(machine.native, base),
        samples=samples,
        length=length,
        batch=_power_of_two(room, 1, 8),
        checkpoint_activations=room < 1,
        prefill=(1 if large else 4, length),
        perplexity=(0.0002, 0.001, 0.005) if base == "fp32" else (0.002, 0.005, 0.01),
        note=note,
    )


def _timed(native: Iterable[str], base: str) -> tuple[str, ...]:
    """The native formats that may be faster than base in a prefill: narrower ones, of two that are equally fast one: FP16
    only without BF16, and INT8 only without FP8."""
    alike = [f for f in native if get_scheme(f).alike]
    narrower = [f for f in alike if get_format(f).bits < get_format(base).bits]
    rivals = {other for f, other in (("bf16", "fp16"), ("fp8_e4m3", "int8")) if f in narrower}
    return tuple(f for f in narrower if f not in {"fp8_e5m2", *rivals})


def _power_of_two(value: float, least: int, most: int) -> int:
    """The largest power of two that is no larger, within bounds."""
    power = least
    while power * 2 <= min(value, most):
        power *= 2
    return power


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
