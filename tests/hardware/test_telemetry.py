"""What a driver tells, and what it does not."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fastgpt.hardware import telemetry


@pytest.fixture
def nvml(monkeypatch):
    """nvidia-ml-py with one card, whose driver knows neither the enforced limit nor the new name of the reasons."""

    def refuse(*_):
        raise RuntimeError("not supported")

    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    module = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetPowerUsage=lambda handle: 187_500,
        nvmlDeviceGetEnforcedPowerLimit=refuse,
        nvmlDeviceGetCurrentClocksEventReasons=refuse,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x24,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 2610, 2: 10501}[kind],
        nvmlDeviceGetTemperature=lambda handle, sensor: 71,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    telemetry._nvml.cache_clear()
    yield module
    telemetry._nvml.cache_clear()


def test_telemetry_reads_the_driver(nvml):
    now = telemetry.telemetry(0)
    assert (now.clock_mhz, now.memory_clock_mhz, now.power_w, now.temperature_c) == (2610, 10501, 187.5, 71)
    assert now.power_limit_w is None
    assert now.throttle == ("power limit", "temperature (software)")


def test_telemetry_finds_the_card_by_uuid(nvml):
    seen = []
    nvml.nvmlDeviceGetPowerUsage = lambda handle: seen.append(handle) or 1000
    telemetry.telemetry(0)
    assert seen == ["GPU-1234"]  # CUDA's device 0 under CUDA_VISIBLE_DEVICES=1 is not NVML's


def test_telemetry_without_a_driver_is_none(nvml):
    def no_driver():
        raise RuntimeError("NVML Shared Library Not Found")

    nvml.nvmlInit = no_driver
    assert telemetry.telemetry(0) is None


def test_telemetry_without_the_package_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    telemetry._nvml.cache_clear()
    assert telemetry.telemetry(0) is None
    telemetry._nvml.cache_clear()
