"""The checks: each module of this folder registers its own with ``fastgpt.doctor.findings.check``."""

from __future__ import annotations

import importlib
import pkgutil

OF_A_RUN = ("curve", "resume", "speed")
"""Modules whose every check looks at a log or a checkpoint: before a run's first step there is neither."""


def load(*, begun: bool) -> None:
    """Import the modules of this folder, so that their checks are registered; OF_A_RUN only if the run has ``begun``."""
    for module in pkgutil.iter_modules(__path__):
        if begun or module.name not in OF_A_RUN:
            importlib.import_module(f"{__name__}.{module.name}")
