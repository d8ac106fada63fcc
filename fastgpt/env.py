"""Where something ran: device, driver, versions, commit. Every run and every results file carries this, and so should a
bug report.

    python -m fastgpt.env [--json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from fastgpt import command, common
from fastgpt.hardware.device import present
from fastgpt.hardware.environment import environment
from fastgpt.hardware.requirements import unused_gpu


@dataclass(frozen=True)
class EnvConfig:
    """Print what a bug report needs: device, driver, versions, commit."""

    json: bool = False
    """Print one JSON object."""


def main(args: list[str]) -> int:
    asked = command.parse(EnvConfig, args, "fastgpt.env")
    found = environment(torch.device(present())) | {"unused GPU": unused_gpu()}
    if asked.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {'n/a' if value is None else value}")
    return 0


if __name__ == "__main__":
    common.run(main)
