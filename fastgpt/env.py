"""Where something ran: device, driver, versions, commit. Every run and every results file carries this, and so should a
bug report.

    python -m fastgpt.env [--json]
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastgpt import __version__, command, common, hardware
from fastgpt.device import interprets, present

ROOT = Path(__file__).parents[1]


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit, time: plain values. ``kernels``: how Triton's kernels run in this process."""
    on_cpu = "interpreted" if interprets() else "replaced by PyTorch"
    return {
        "device": hardware.device_name(device),
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
    props = torch.cuda.get_device_properties(device)
    moment = hardware.telemetry(device.index or 0)
    return {
        "arch": f"sm_{props.major}{props.minor}",
        "sms": props.multi_processor_count,
        "memory_gib": round(props.total_memory / 2**30, 2),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None,
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
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    return (
        commit + ("+" if _output("git", "status", "--porcelain", "--", "fastgpt", "bench") else "") if commit else None
    )


def _output(*command: str) -> str:
    """What a command prints; "" if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True)
class EnvConfig:
    """Print what a bug report needs: device, driver, versions, commit."""

    json: bool = False
    """Print one JSON object."""


def main(args: list[str]) -> int:
    asked = command.parse(EnvConfig, args, "fastgpt.env")
    found = environment(torch.device(present()))
    if asked.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {'n/a' if value is None else value}")
    return 0


if __name__ == "__main__":
    common.run(main)
