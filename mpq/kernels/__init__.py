"""What runs natively on a device: formats for each kind of product, and the device's name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, cast

import torch

from mpq.devices import check_device
from mpq.errors import MpqError
from mpq.formats.scheme import with_fitted
from mpq.kernels import int8_attention, int8_linear, rows
from mpq.kernels.compiler import features, generation

Kind: TypeAlias = Literal["linear", "experts", "bgemm"]

# weights alone in integers: kernels/weight_only.py
# BF16 runs on every CPU, fast where there is AMX or AVX512-BF16; INT8 through oneDNN or a kernel of ours (kernels/cpu.py)
# experts on a CPU are linears one after the other
_CPU: dict[Kind, tuple[str, ...]] = {
    "linear": ("fp32", "bf16", "int8", *with_fitted("w8a16", "w4a16", "w4a16_g32")),
    "experts": ("fp32", "bf16", "int8"),
    "bgemm": ("fp32", "bf16"),
}
# the compute capability from which a GPU has matrix instructions for a format (CUDA programming guide, arithmetic throughput);
# E5M2 stands for activations beside E4M3 weights, which attention has none of (kernels/cuda.py); blocks: kernels/scaled.py
_CUDA: dict[Kind, dict[str, tuple[int, int]]] = {
    "linear": {
        "fp32": (0, 0),
        "fp16": (7, 0),
        "bf16": (8, 0),
        "fp8_e4m3": (8, 9),
        "fp8_e5m2": (8, 9),
        "int8": (8, 0),
        "fp8_block": (8, 9),
        "mxfp8": (10, 0),
        **dict.fromkeys(with_fitted("mxfp4", "nvfp4"), (10, 0)),
    },
    "experts": {"fp8_e4m3": (8, 9), "int8": (8, 0), "fp8_block": (8, 9)},  # kernels/grouped.py
    "bgemm": {"fp32": (0, 0), "fp16": (7, 0), "bf16": (8, 0), "fp8_e4m3": (8, 9)},
}
_B200_ALONE = with_fitted("mxfp4")  # torch's product of them asks for compute capability 10
# the CPU features that decide how fast BF16 and INT8 are, by torch's names
_FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_ne_convert", "avx_vnni")


def native_formats(device: str = "cpu", kind: Kind = "linear") -> tuple[str, ...]:
    """The formats in which `device` (cpu, cuda, cuda:0, ...) has a kernel for linears, for experts or for attention's BGEMMs."""
    if device == "cpu":
        return (
            (*_CPU[kind], "int8") if kind == "bgemm" and int8_attention.available() else _CPU[kind]
        )
    if device.split(":")[0] != "cuda" or not torch.cuda.is_available():
        return ()
    capability = torch.cuda.get_device_capability(device)
    here = capability[0] == 10
    return tuple(
        name
        for name, since in _CUDA[kind].items()
        if capability >= since and (here or name not in _B200_ALONE)
    )


def check_native(formats: Iterable[str], device: str = "cpu", kind: Kind = "linear") -> None:
    """Raise MpqError, naming the formats that `device` can run, unless it is there and can run all of `formats`."""
    check_device(device)
    native = native_formats(device, kind)
    foreign = sorted(set(formats) - set(native))
    if foreign:
        can = f"it can run {', '.join(native)}" if native else "it has no kernel for them"
        raise MpqError(
            f"{device} has no native {kind} in {', '.join(foreign)}: {can}. Emulate the plan, or leave these out."
        )


def runs_natively(
    formats: Mapping[str, str], kinds: Mapping[str, str], base: str, device: str = "cpu"
) -> bool:
    """Whether `device` has a kernel for every op (op → format, op → kind) that is not left in base."""
    lowered = {op: f for op, f in formats.items() if f != base}
    return all(
        f in native_formats(device, cast(Kind, kinds[op]))
        for op, f in lowered.items()
        if kinds[op] != "other"
    )


def native_kernels(device: str) -> Any:
    """The module with the kernels of a kind of device, `cpu` or `cuda`. Loaded when asked for: CUDA's needs Triton, which comes
    with torch where there is CUDA, and nowhere else."""
    return importlib.import_module(f"mpq.kernels.{device}")


def device_name(device: str = "cpu", threads: int | None = None) -> str:
    """The device's model, as timing tables carry it: `AMD EPYC family 25 model 17 (avx512_bf16, avx512_vnni), 1 thread`, `NVIDIA H200`.

    `threads` are those that a CPU's kernels use, torch's own number if left out. A CPU on which kernels of ours could not be compiled or loaded is another one: `…, without rows, int8_attention`.
    """
    check_device(device)
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    has = features()
    shown = [name for name in _FEATURES if has.get(name)]
    if lacking := _not_loaded():  # what runs in their place is slower
        shown.append(f"without {', '.join(lacking)}")
    name = f"{has.get('cpu_name') or 'CPU'}{generation()}"  # a hypervisor calls all generations the same
    count = threads or torch.get_num_threads()
    told = f"{count} thread{'s' if count > 1 else ''}"
    return f"{name} ({', '.join(shown) or 'no bf16 or int8 instructions'}), {told}"


def _not_loaded() -> list[str]:
    """The C++ kernels that this CPU's INT8 would run on and that did not load here, whatever the reason."""
    has, ours = features(), {"rows": isinstance(rows.passes(), rows.NativePasses)}
    if has.get("avx512_vnni"):
        ours["int8_attention"] = int8_attention.available()
    if has.get("avx2") and not native_kernels("cpu").has_quantized_linear():
        ours["int8_linear"] = int8_linear.available()
    return [name for name, loaded in ours.items() if not loaded]
