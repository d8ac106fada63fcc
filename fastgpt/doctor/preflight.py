"""What can be known before the first step, in well under a second: train.py asks this before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.common import as_typed, styled
from fastgpt.config import Config
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence, Machine, Place
from fastgpt.doctor.findings import COLOURS, Finding, is_code
from fastgpt.doctor.reading.configs_fastgpt import of_sections
from fastgpt.doctor.reading.surroundings import this_machine, tokens_in
from fastgpt.hardware import cards

if TYPE_CHECKING:
    import torch
    from rich.console import Console


SHORT = 50e6
"""Tokens of a run that is over in minutes: no words about compute that could be spent better."""


def preflight(config: Config, device: torch.device, on: Machine | None = None) -> list[Finding]:
    """Findings on a run that is about to start: costliest first, empty when clean. Opens no data and makes no CUDA context
    of its own. ``on``: the machine, if it is not this one."""
    place = Place(str(config.config) if config.config else f"preset {config.preset}" if config.preset else "the flags")
    evidence = Evidence(config=of_sections(config.to_dict(), place), machine=on or this_machine())
    found = diagnose(evidence, cards.present(device), tokens_in(Path(config.data.data))).findings
    short = config.train.max_iters * config.tokens_per_step < SHORT
    return [finding for finding in found if not short or finding.check not in ("few", "evaluation_time")]


def announce(findings: list[Finding], console: Console) -> None:
    """One line when clean, else one per finding and its config line."""
    if not findings:
        clean = "preflight: nothing found (python -m fastgpt.doctor can read the log, too)"
        console.print(styled((as_typed(clean, way=False), "dim")))
        return
    for finding in findings:
        line = next((line for line in finding.advice.split("\n") if is_code(line)), "")
        head = (f"preflight {finding.severity}", COLOURS[finding.severity])
        text = styled(head, f": {finding.title}", (f" -> {line}" if line else "", "dim"))
        console.print(text, soft_wrap=False)
