"""What an NVIDIA GPU was doing when something was measured on it: clocks, temperature, power, and what held its clocks back.

Read through NVML (nvidia-ml-py, which torch for CUDA does not bring), else asked of nvidia-smi, which every driver brings. Readings only:
no setting of the card is touched.
"""

from __future__ import annotations

import functools
import subprocess
from typing import Any

import torch

# NVML's bits of nvmlClocksEventReasons: https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
REASONS = {
    0x1: "idle",
    0x2: "clocks set",
    0x4: "power cap",
    0x8: "slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


def gpu_state(device: torch.device | str) -> dict[str, Any]:
    """sm_clock_mhz, memory_clock_mhz, temperature_c, power_w and throttled (reasons, `none` without any) of a CUDA device at
    this moment; empty for other devices and where neither NVML nor nvidia-smi answers."""
    device = torch.device(device)
    if device.type != "cuda":
        return {}
    if (found := _handle(device)) is None:
        return _asked(device)
    nvml, handle = found
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return {
            "sm_clock_mhz": int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "throttled": _reasons(reasons),
        }
    except nvml.NVMLError:
        return {}


def _asked(device: torch.device) -> dict[str, Any]:
    """The same from nvidia-smi."""
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        asked = [f"--id={uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        told = subprocess.run(
            ["nvidia-smi", *asked], capture_output=True, text=True, timeout=10, check=True
        )
        parts = (part.strip() for part in told.stdout.strip().split(","))
        sm, memory, temperature, power, reasons = parts
        return {
            "sm_clock_mhz": int(sm),
            "memory_clock_mhz": int(memory),
            "temperature_c": int(temperature),
            "power_w": float(power),
            "throttled": _reasons(int(reasons, 16)),
        }
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def _reasons(bits: int) -> str:
    return ", ".join(name for bit, name in REASONS.items() if bits & bit) or "none"


@functools.cache
def _handle(device: torch.device) -> tuple[Any, Any] | None:
    """NVML and its handle of the device, by UUID: NVML counts cards that CUDA_VISIBLE_DEVICES hides."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    except pynvml.NVMLError:
        return None
