"""Hand-written Triton kernels that train GPT-2 on one consumer GPU. Importing this touches no GPU and no triton."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


def _starts_a_command() -> bool:
    """Whether this is imported because Python was told to run one of our commands."""
    program = "".join(sys.argv[:1])
    if program == "-m":  # so it is while Python looks for the module
        return any(word.split(".")[0] in ("fastgpt", "bench") for word in sys.orig_argv)
    ours = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
    return os.path.basename(program) in ("fastgpt", "fastgpt.exe") or os.path.abspath(program) == ours


def _tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A package that is not installed is one sentence, wherever a command imports it; anything else keeps its traceback."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "fastgpt", "bench", *sys.stdlib_module_names):
        return sys.__excepthook__(kind, error, trace)
    missing = None
    if package == "triton":
        missing = import_module("fastgpt.hardware.requirements").no_triton("cpu", plain="")
    print("error:", missing or f"{package} is not installed: pip install {package}", file=sys.stderr)
    raise SystemExit(2)


if _starts_a_command():
    sys.excepthook = _tell
if _starts_a_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the seconds of imports that follow has nothing to say, and an exception would end in the middle of some module.
    # common.run puts Python's handler back.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

__version__ = "0.1.0"

if TYPE_CHECKING:  # what __getattr__ finds, for editors and type checkers
    from fastgpt.config import ModelConfig
    from fastgpt.model import GPT
    from fastgpt.optim.adamw import FusedAdamW
    from fastgpt.optim.muon import Muon, MuonAdamW
    from fastgpt.patching import patch, unpatch

_PUBLIC = {
    "GPT": "fastgpt.model",
    "ModelConfig": "fastgpt.config",
    "FusedAdamW": "fastgpt.optim.adamw",
    "Muon": "fastgpt.optim.muon",
    "MuonAdamW": "fastgpt.optim.muon",
    "patch": "fastgpt.patching",
    "unpatch": "fastgpt.patching",
}
__all__ = ["GPT", "FusedAdamW", "ModelConfig", "Muon", "MuonAdamW", "__version__", "patch", "unpatch"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
