"""Device, driver, versions and commit, as results files and bug reports name them."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastgpt import __version__
from fastgpt.hardware.device import device_name, interprets
from fastgpt.hardware.requirements import output

ROOT = Path(__file__).parents[2]


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit, time: plain values. ``kernels``: how Triton's kernels run in this process."""
    on_cpu = "interpreted" if interprets() else "replaced by PyTorch"
    return {
        "device": device_name(device),
        **_device(device),
        "kernels": "compiled" if device.type == "cuda" else on_cpu,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "fastgpt": __version__,
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    from fastgpt.hardware.telemetry import telemetry

    props = torch.cuda.get_device_properties(device)
    moment = telemetry(device.index or 0)
    return {
        "arch": f"sm_{props.major}{props.minor}",
        "sms": props.multi_processor_count,
        "memory_gib": round(props.total_memory / 2**30, 2),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None,
        "telemetry": None if moment is None else asdict(moment),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for name in (package, f"{package}-windows"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def _commit() -> str | None:
    """The commit, with "+" behind it if the checkout differs from it; None outside a checkout, as in an environment that
    lies in somebody else's."""
    if not (ROOT / "pyproject.toml").exists():
        return None
    commit = output("git", "rev-parse", "--short=12", "HEAD", cwd=ROOT)
    return (
        commit + ("+" if output("git", "status", "--porcelain", "--", "fastgpt", "bench", cwd=ROOT) else "")
        if commit
        else None
    )
