"""Compiles the cases of an audit for one card, in processes of their own, and judges every kernel: what bench.audit prints."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.hardware.environment import ROOT

SCHEMA_VERSION = 1
DEFAULT_GPU = {"sm_80": "a100", "sm_86": "rtx3070", "sm_89": "rtx4070", "sm_90": "h100", "sm_120": "rtx5070"}
"""The card whose SMs are counted, by architecture."""


@dataclass(frozen=True)
class Audit:
    """``rows``: plain dicts, the fields of cubin.Row and ``waves``, ``last_wave`` and ``problems``. In a step there is
    one per binary and grid; of the other cases, one per binary that no step launches."""

    gpu: cards.Gpu
    triton: str
    """The version that compiled."""
    cases: list[str]
    rows: list[dict[str, Any]]
    errors: dict[str, str]
    """Cases that do not compile, with the compiler's message."""

    @property
    def failures(self) -> list[str]:
        """A sentence for each thing that the gate does not let through."""
        found = [f"{case}: {message}" for case, message in self.errors.items()]
        for row in self.rows:
            found += [f"{row['kernel']} {row['dtype']} ({row['case']}) {row['config']}: {p}" for p in row["problems"]]
        return found

    def to_json(self) -> dict[str, Any]:
        card = {"arch": self.gpu.arch, "gpu": self.gpu.name, "sms": self.gpu.sm_count}
        about = {"schema_version": SCHEMA_VERSION, **card, "triton": self.triton, "cases": self.cases}
        return {**about, "rows": self.rows, "errors": self.errors, "failures": self.failures}


def target(arch: str | None, gpu: str | None) -> cards.Gpu:
    """The card to audit for: ``gpu`` by name, or the usual one of ``arch``. They must agree if both are given."""
    if arch is not None and arch not in DEFAULT_GPU:
        raise UserError(f"arch is {arch!r}: it must be one of {', '.join(DEFAULT_GPU)}")
    name = gpu or DEFAULT_GPU[arch or "sm_89"]
    card = cards.card(name)
    if card.arch not in DEFAULT_GPU:
        raise UserError(f"gpu is {gpu!r} ({card.arch}): kernels are compiled for {', '.join(DEFAULT_GPU)}")
    if arch not in (None, card.arch):
        raise UserError(
            f"gpu is {gpu!r}, whose arch is {card.arch}, not {arch!r}: leave out --arch, or name another card"
        )
    return card


def in_child(
    module: str, job: dict[str, Any], started: Callable[[subprocess.Popen], Any] | None = None
) -> dict[str, Any]:
    """The JSON that bench.compiler.``module`` prints last for this job, in a process that compiles: this one may interpret.
    ``started`` is given the process. Raises RuntimeError if it ends in an error."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"bench.compiler.{module}", json.dumps(job)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if started:
        started(process)
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"bench.compiler.{module} ended with code {process.returncode}:\n{errors[-2000:]}")
    return json.loads(output.splitlines()[-1])


def run(card: cards.Gpu, *, only: str | None = None, shard: tuple[int, int] | None = (1, 1), jobs: int = 1) -> Audit:
    """Compile in ``jobs`` processes; ``only`` and ``shard`` as in audit_child.select."""
    try:
        re.compile(only or "")
    except re.error as error:
        raise UserError(f"only is {only!r}, which is not a regular expression: {error}") from None
    job = {"arch": int(card.arch[3:]), "sms": card.sm_count, "only": only, "shard": shard}
    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda part: in_child("audit_child", job | {"part": (part, jobs)}), range(1, jobs + 1)))
    cases = [case for part in parts for case in part["cases"]]
    if not cases:
        raise UserError(
            f"only is {only!r}, and no case has that in its name: 'step', 'attention' or 'adamw' would match"
        )
    rows = [judge(row, card) for row in _merge([row for part in parts for row in part["rows"]])]
    errors = {case: message for part in parts for case, message in part["errors"].items()}
    return Audit(card, parts[0]["triton"], sorted(cases), rows, errors)


def _merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps first, whole; then, of the other cases, each binary that has not come yet."""
    steps = [row for row in rows if row["case"].startswith("step ")]
    seen = {row["key"]: row for row in steps}
    others = [row for row in rows if row["key"] not in seen and seen.setdefault(row["key"], row) is row]
    return steps + others


def judge(row: dict[str, Any], card: cards.Gpu) -> dict[str, Any]:
    """The row with its waves on this card and what is wrong with it.

    ``waves``: blocks of the grid over blocks that the card holds at once; ``last_wave``: how full the last one is, 1 if the
    grid divides evenly. None where the grid is not a real step's, or where no block fits.
    """
    problems = []
    if row["stack"] or row["spill_loads"] or row["spill_stores"]:
        problems.append(
            f"spills {row['stack']} bytes a thread, {row['spill_loads']} loads, {row['spill_stores']} stores"
        )
    limit = card.chip.shared_per_block
    if row["shared"] > limit:
        problems.append(f"takes {row['shared']:,} bytes of shared memory, over the limit of {limit:,}")
    elif not row["blocks_per_sm"]:
        problems.append(f"does not fit an SM: {row['limiter']}")
    if row["tensor_dots"] and not row["tensor_core"]:
        problems.append(f"has {row['tensor_dots']} matrix products and no tensor-core instruction")
    waves = last = None
    if row["case"].startswith("step ") and row["blocks_per_sm"]:
        blocks, held = math.prod(row["grid"]), card.sm_count * row["blocks_per_sm"]
        waves, last = blocks / held, (blocks % held or held) / held
    return {**row, "waves": waves, "last_wave": last, "problems": problems}
