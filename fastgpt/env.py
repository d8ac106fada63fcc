"""Where something ran: device, driver, versions, commit. Every run and every results file carries this, and so should a
bug report.

    python -m fastgpt.env [--json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fastgpt import command, common


@dataclass(frozen=True)
class EnvConfig:
    """Print what a bug report needs: device, driver, versions, commit."""

    json: bool = False
    """Print one JSON object."""


def _train_uses(kind: str) -> str:
    """What computes a run here, if no flag says otherwise."""
    from fastgpt.hardware.requirements import no_triton

    if (missing := no_triton(kind)) is not None:
        return f"plain PyTorch on the {kind} ({missing.partition(': ')[0]})"
    return "Triton kernels on the GPU" if kind == "cuda" else "Triton kernels in the interpreter, on the CPU: slow"


def main(args: list[str]) -> int:
    asked = command.parse(EnvConfig, args, "fastgpt.env")
    import torch  # which takes seconds: no help page needs it

    from fastgpt.hardware.device import present
    from fastgpt.hardware.environment import environment
    from fastgpt.hardware.requirements import unused_gpu

    kind = present()
    found = environment(torch.device(kind))
    del found["kernels"]  # of this process, which runs none
    found |= {"unused GPU": unused_gpu(), "train uses": _train_uses(kind)}
    if asked.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {'none' if value is None else value}")
    return 0


if __name__ == "__main__":
    common.run(main)
