"""A card's clock, power and temperature now, as its driver tells them through nvidia-ml-py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h), in words a user can act on.
THROTTLE_REASONS = {
    0x02: "application clock setting",
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
    0x100: "display clock setting",
}


@dataclass(frozen=True)
class Telemetry:
    """One moment of the card; None where its driver does not say."""

    clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None
    throttle: tuple[str, ...] | None  # why the clock is held down; empty if nothing holds it


@lru_cache(maxsize=1)
def _nvml() -> Any:
    """nvidia-ml-py, initialised; None without the package or without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or NVMLError, a class that only the package has
        return None
    return pynvml


def telemetry(index: int) -> Telemetry | None:
    """Clock, power, temperature, throttle reasons of CUDA device ``index`` now; None without nvidia-ml-py or driver."""
    nvml = _nvml()
    if nvml is None:
        return None

    def ask(question: str, *args: Any) -> Any:
        try:
            return getattr(nvml, question)(*args)
        except Exception:  # NVMLError: this card or driver does not say
            return None

    # NVML counts cards that CUDA_VISIBLE_DEVICES hides; the UUID is what both sides agree on.
    handle = ask("nvmlDeviceGetHandleByUUID", f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    if handle is None:
        return None
    milliwatts, limit = ask("nvmlDeviceGetPowerUsage", handle), ask("nvmlDeviceGetEnforcedPowerLimit", handle)
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # the name that older drivers know
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return Telemetry(
        clock_mhz=ask("nvmlDeviceGetClockInfo", handle, 1),  # NVML_CLOCK_SM
        memory_clock_mhz=ask("nvmlDeviceGetClockInfo", handle, 2),  # NVML_CLOCK_MEM
        power_w=None if milliwatts is None else milliwatts / 1e3,
        power_limit_w=None if limit is None else limit / 1e3,
        temperature_c=ask("nvmlDeviceGetTemperature", handle, 0),  # NVML_TEMPERATURE_GPU
        throttle=None if reasons is None else tuple(text for bit, text in THROTTLE_REASONS.items() if reasons & bit),
    )
