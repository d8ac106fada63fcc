"""The checks: each module of this folder registers its own with ``fastgpt.doctor.findings.check``."""

from __future__ import annotations

import importlib
import pkgutil


def load() -> None:
    """Import every module of this folder, so that its checks are registered."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
