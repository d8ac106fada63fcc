"""What a GPU or Triton's kernels need and this machine lacks: each in one sentence that names the cause and the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from fastgpt.common import UserError, first_line

OLDEST = (8, 0)
"""Compute capability that the kernels need: bf16, and more than 64 KB of shared memory for their tiles."""


def output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; "" if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def unused_gpu() -> str | None:
    """Why torch does not see the NVIDIA card that the driver lists, and what to do about it. None if it sees one, or was told
    not to (CUDA_VISIBLE_DEVICES), or no driver lists any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or visible in ("", "-1", "NoDevFiles"):  # the last is Slurm's
        return None
    listed = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    if not listed:
        return None
    name, _, driver = listed[0].partition(", ")
    build = f"this machine has an {name}, but torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{build} is built without CUDA: install the build for CUDA that https://pytorch.org/get-started names"
    try:
        torch.cuda.init()
        why = "no reason is given"
    except Exception as error:
        why = first_line(error).split(". ")[0]
    if visible is not None and why.startswith("No CUDA GPUs"):
        hides = f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides it"
        return f"this machine has an {name}, but {hides}: unset it, or name a GPU that nvidia-smi -L lists"
    return (
        f"{build}, built for CUDA {torch.version.cuda}, cannot use it with driver {driver} ({why}): update the driver and "
        "restart, or install a build of torch for an older CUDA, https://pytorch.org/get-started"
    )


def no_gpu() -> str:
    """What is said where a GPU is needed and torch sees none."""
    return unused_gpu() or f"torch {torch.__version__} sees no CUDA GPU"


def name_a_gpu() -> str:
    """What a command says that needs a card's name, was given none, and finds none."""
    return f"gpu is not given and {unused_gpu() or 'there is no CUDA GPU here'}: name one, such as rtx4070"


def no_kernels(device: str, plain: str = "--kernels eager") -> str | None:
    """Why Triton's kernels cannot run, or their launcher cannot be built, on the "cuda" or "cpu" device of this machine, and
    what can; None if they can. ``plain``: the flag that does without them, "" where a command has none."""
    return no_triton(device, plain) or (no_compiler(plain) or no_launcher(plain) if device == "cuda" else None)


def check_kernels(command: str) -> None:
    """Raise UserError if ``command``, which measures Triton's kernels on the GPU that is here, cannot run them."""
    if (missing := no_kernels("cuda", plain="")) is not None:
        raise UserError(f"{command} measures Triton's kernels, but {missing}")


def no_triton(device: str, plain: str = "--kernels eager") -> str | None:
    """The same, but for the launcher."""
    if find_spec("triton") is None:
        without = f"use {plain} (plain PyTorch), or " if plain else ""
        return f"triton is not installed: {without}pip install triton on Linux and triton-windows on Windows; macOS has neither"
    if device == "cuda" and torch.version.hip:
        without = f": use {plain}" if plain else ""
        return f"the {torch.cuda.get_device_name()} is an AMD GPU, and the kernels are written for NVIDIA's{without}"
    if device == "cuda" and (capability := torch.cuda.get_device_capability()) < OLDEST:
        return (
            f"the {torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and the kernels need "
            "8.0 for bf16 and for their shared memory" + (f": use {plain} --precision fp16" if plain else "")
        )
    return None


def no_compiler(plain: str = "--kernels eager") -> str | None:
    """What Triton lacks to build the launcher of its kernels, which it does with a C compiler and Python's headers before the
    first launch; None if it has both. triton-windows brings its own."""
    if sys.platform != "linux":
        return None
    missing, chosen = {}, os.environ.get("CC")
    if not any(map(shutil.which, ["gcc", "clang"] if chosen is None else [chosen])):  # triton takes CC for one program
        missing["gcc"] = "no C compiler" if chosen is None else f"no C compiler {chosen!r}, which CC names,"
    # Where triton looks, and where CPATH has the compiler look.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    folders = [sysconfig.get_paths(scheme)["include"], *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        missing[f"python{sys.version_info.major}.{sys.version_info.minor}-dev"] = "no Python.h"
    if not missing:
        return None
    remedy = f"sudo apt install {' '.join(missing)}" + (
        " and unset CC" if chosen is not None and "gcc" in missing else ""
    )
    without = f", or {plain}" if plain else ""
    return f"Triton finds {' and '.join(missing.values())} to build its kernels' launcher with: {remedy}{without}"


def no_launcher(plain: str = "--kernels eager") -> str | None:
    """Why Triton cannot build or load its kernels' launcher, by letting it do so now; the first launch finds it in the cache. A
    compiler may lack a C library, a folder be full or allow no programs, and libcuda lie where nobody looks."""
    if sys.platform != "linux":
        return None
    from triton.backends.nvidia.driver import CudaUtils

    try:
        CudaUtils()
        return None
    except subprocess.CalledProcessError as error:
        why = f"{error.cmd[0]} failed, as it says above"
    except Exception as error:
        why = first_line(error)
    without = f", or use {plain}" if plain else ""
    return (
        f"Triton cannot build or load its kernels' launcher ({why}): see to the compiler, or name another with CC, and a "
        f"folder that programs run from with TRITON_CACHE_DIR{without}"
    )


def no_cpp_compiler() -> str | None:
    """What torch.compile lacks to compile for a CPU; None if nothing. Where it looks: torch/_inductor/cpp_builder.py."""
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler):
        return None
    remedy = {"win32": "install Microsoft's C++ build tools", "darwin": "xcode-select --install"}
    install = "set CXX to one" if "CXX" in os.environ else remedy.get(sys.platform, "sudo apt install g++")
    return f"torch.compile finds no C++ compiler {compiler!r} to compile for the CPU with: {install}, or leave out --compile"
