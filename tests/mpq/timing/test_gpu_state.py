"""What is recorded of a GPU beside each measurement."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mpq.timing import gpu_state as module
from mpq.timing.gpu_state import gpu_state


class NVMLError(Exception):
    """NVML's error."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NVML's bindings, told of one card: this is what they would answer, no GPU is asked."""
    answers = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByUUID": "card",
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x24,
        "nvmlDeviceGetClockInfo": 1980,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetPowerUsage": 512_300,
    }
    bindings = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        **{name: (lambda *args, answer=answer: answer) for name, answer in answers.items()},
    )
    monkeypatch.setitem(sys.modules, "pynvml", bindings)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2")
    )
    module._handle.cache_clear()
    yield bindings
    module._handle.cache_clear()


def test_the_state_of_a_card(nvml: Any) -> None:
    """Clocks in MHz, degrees, watts, and the reasons behind the bits; an error of NVML's gives nothing."""
    assert gpu_state("cuda:0") == {
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 1980,
        "temperature_c": 61,
        "power_w": 512.3,
        "throttled": "power cap, thermal (software)",
    }
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0
    assert gpu_state("cuda:0")["throttled"] == "none"

    def lost(handle: object) -> None:
        raise NVMLError("GPU is lost")

    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lost
    assert gpu_state("cuda:0") == {}


def test_without_the_bindings_nvidia_smi_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A CPU has no such state; without NVML's bindings nvidia-smi tells it, one that fails or is not there tells nothing."""
    assert gpu_state("cpu") == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2")
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    module._handle.cache_clear()
    assert gpu_state("cuda:0") == {}
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\n[ "$1" = --id=GPU-1-2 ] && echo "1980, 2619, 61, 512.30, 0x0000000000000024"\n'
    )
    smi.chmod(0o755)
    assert gpu_state("cuda:0") == {
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "temperature_c": 61,
        "power_w": 512.3,
        "throttled": "power cap, thermal (software)",
    }
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_state("cuda:0") == {}
    module._handle.cache_clear()
