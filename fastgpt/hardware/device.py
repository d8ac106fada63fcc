"""Where a run computes, decided before triton is imported (its interpreter is chosen by the environment at import)."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from fastgpt.common import UserError
from fastgpt.hardware import requirements


def pick(device: str, kernels: str, plain: str = "--kernels eager", compiled: bool = False) -> torch.device:
    """The torch device for ``--device`` (auto, cpu or cuda). With triton kernels on a CPU this switches Triton's
    interpreter on for the whole process. ``plain``: the flag that does without triton, "" where a command has none.
    ``compiled``: under torch.compile, which builds such a launcher, too.

    Raises UserError if CUDA or triton is asked for and absent, if torch does not see the NVIDIA card that is here, and if the
    card or the compiler is none that Triton's kernels can run with.
    """
    if device != "cpu" and (unused := requirements.unused_gpu()) is not None:
        raise UserError(f"{unused}; --device cpu does without the card")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is 'cuda' but torch {torch.__version__} sees no CUDA GPU: use --device cpu or auto")
    if device == "auto":
        device = present()
    if kernels == "triton":
        missing = requirements.no_kernels(device, plain)
        if missing is not None:
            raise UserError(f"kernels is 'triton' but {missing}")
    elif compiled and device == "cuda" and (missing := requirements.no_compiler("leave out --compile")) is not None:
        raise UserError(f"compile is on but {missing}")
    if compiled and device == "cpu" and (missing := requirements.no_cpp_compiler()) is not None:
        raise UserError(f"compile is on but {missing}")
    if device == "cpu" and kernels == "triton" and not interprets():
        # fastgpt.kernels looks at the environment once, when it is imported; later, PyTorch would compute in silence.
        if "triton" in sys.modules or "fastgpt.kernels.runtime" in sys.modules:
            raise UserError("the kernels are already imported: set TRITON_INTERPRET=1 to run them on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"
    return torch.device(device)


def interprets() -> bool:
    """Whether this process runs Triton's kernels in its CPU interpreter: what triton itself reads when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def present() -> str:
    """ "cuda" if there is a CUDA GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device | str) -> str:
    """torch's name of a CUDA device; the CPU's model name for the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
