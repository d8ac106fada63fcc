"""Hand-written Triton kernels that train GPT-2 on one consumer GPU. Importing this touches no GPU and no triton."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "GPT": "fastgpt.model",
    "ModelConfig": "fastgpt.config",
    "FusedAdamW": "fastgpt.optim.adamw",
    "patch": "fastgpt.patching",
    "unpatch": "fastgpt.patching",
}
__all__ = ["GPT", "FusedAdamW", "ModelConfig", "__version__", "patch", "unpatch"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
