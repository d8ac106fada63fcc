"""The process that compiles for bench.audit: one that interprets kernels, or has a GPU to run them on, cannot.

Takes its job as one argument, prints JSON: ``{"triton": version, "cases": [...], "rows": [...], "errors": {case: message}}``.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import Any

import torch
import triton

from bench import ops
from bench.compiler import audit_step, cubin
from bench.compiler.capture import CapturedLaunch, capture_launches
from bench.ops import table_cases
from bench.ops.common import Case


def select(only: str | None, shard: tuple[int, int] | None, arch: int) -> list[Case]:
    """The shipped steps, and of all other cases every N-th from the K-th on (``shard``; None: no others). With ``only``, a
    regular expression: every case whose name it is found in instead."""
    shipped = list(audit_step.shipped_steps())
    rest = [*audit_step.other_steps(), *ops.cases(), *table_cases(arch)]
    if only is not None:
        return [case for case in shipped + rest if re.search(only, case[0])]
    return shipped + (rest[shard[0] - 1 :: shard[1]] if shard else [])


def compile_cases(cases: list[Case], arch: int, sms: int) -> tuple[list[cubin.Row], dict[str, str]]:
    """The rows of every case, and what the compiler says of those that do not compile."""
    launches: list[CapturedLaunch] = []
    errors: dict[str, str] = {}
    for name, case in cases:
        try:
            with capture_launches(arch, sms, case=name) as captured:
                case()
        except RuntimeError as error:
            errors[name] = str(error)
        launches += captured
    return cubin.rows(launches), errors


def main(argv: list[str]) -> None:
    job: dict[str, Any] = json.loads(argv[0])
    torch.set_num_threads(1)
    k, n = job["part"]
    cases = select(job["only"], job["shard"], job["arch"])[k - 1 :: n]
    rows, errors = compile_cases(cases, job["arch"], job["sms"])
    names = [name for name, _ in cases]
    result = {"triton": triton.__version__, "cases": names, "rows": [asdict(row) for row in rows], "errors": errors}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
