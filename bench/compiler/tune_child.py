"""The process that compiles for bench.tune: one that interprets kernels, or has a GPU to run them on, cannot.

Takes its job as one argument, ``{"arch": 89, "family": name}``, and prints JSON:
``{"default": config, "facts": [Facts as plain values], "compiler": "triton 3.7.1"}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton

from bench.compiler import ranking
from bench.compiler.capture import capture_launches, unique
from bench.ops import families
from bench.ops.common import Family
from fastgpt.kernels import tuning

LAUNCHED_ONLY = ("programs_per_sm", "splits")
"""Keys of a config that change the grid and no binary."""


def compile_config(family: Family, config: dict[str, int], arch: int) -> ranking.Facts:
    binaries: list[Any] = []
    for case in family.cases:
        try:
            with tuning.forced({family.kernel: config}), capture_launches(arch) as launches:
                case()
        except RuntimeError as error:
            return ranking.Facts(config, f"does not compile: {str(error)[:200]}")
        own = [launch for launch in unique(launches) if launch.kernel == family.function]
        binaries += [launch.compiled for launch in own]
    return ranking.facts(config, binaries, arch)


def default_of(family: Family, arch: int) -> dict[str, int]:
    """The config that the kernel's file falls back to; where that is cuBLAS, the tiles that it would fall back to."""
    if tuning.has_library(family.kernel):
        from fastgpt.kernels.matmul import default_tiles

        return default_tiles(family.kernel.split(".")[1], 8192, 768, 768, family.dtype)
    choices: list[tuning.Choice] = []
    with capture_launches(arch), tuning.heard(choices.append):
        family.cases[0]()
    return next(choice.default for choice in choices if choice.key.kernel == family.kernel)


def compile_family(family: Family, arch: int) -> dict[str, Any]:
    done: dict[tuple, ranking.Facts] = {}
    found = []
    for config in family.configs():
        compiled_in = tuple(sorted(item for item in config.items() if item[0] not in LAUNCHED_ONLY))
        if compiled_in not in done:
            done[compiled_in] = compile_config(family, config, arch)
        found.append({**done[compiled_in].to_json(), "config": config})
    return {"default": default_of(family, arch), "compiler": f"triton {triton.__version__}", "facts": found}


def main(argv: list[str]) -> None:
    job = json.loads(argv[0])
    torch.set_num_threads(1)
    family = next(family for family in families() if family.name == job["family"])
    print(json.dumps(compile_family(family, job["arch"])))


if __name__ == "__main__":
    main(sys.argv[1:])
