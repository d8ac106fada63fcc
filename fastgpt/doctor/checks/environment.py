"""The machine: no CUDA, a torch without Triton or C compiler, a card without bf16, too little memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastgpt.common import gigabytes
from fastgpt.doctor.checks import vram
from fastgpt.doctor.evidence import Evidence, Place, Seen
from fastgpt.doctor.figures import GEOMETRY, Figures
from fastgpt.doctor.findings import Finding, check
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.fitting import usable_vram

HERE = Place("this machine")
FP16 = "dtype = 'float16'    # with loss scaling, which nanoGPT and fastgpt then switch on"


def _no_cuda(seen: Seen, torch: str = "torch") -> Finding:
    return Finding(
        "no_cuda",
        "critical",
        f"{torch} sees no CUDA GPU",
        seen,
        "Either torch is a CPU build ('+cpu' in its version), or the driver is missing or older than the CUDA that "
        "torch was built for.",
        "python -c 'import torch; print(torch.__version__, torch.version.cuda)' and nvidia-smi tell which; then "
        "install the CUDA build of torch that pytorch.org names for this driver.",
        cost=1.0,
    )


def _interpreted(seen: Seen) -> Finding:
    return Finding(
        "interpreted",
        "info",
        "The run was on a CPU, the kernels in Triton's interpreter: its speed says nothing",
        seen,
        "The interpreter shows that kernels compute the right thing, one program at a time in NumPy.",
        "The same command on a machine with a CUDA GPU; python train.py --kernels eager for speed on a CPU.",
    )


def _no_triton(seen: Seen, windows: bool) -> Finding:
    return Finding(
        "no_triton",
        "critical",
        "torch is here without Triton: no torch.compile on the GPU, and no kernels of this library",
        seen,
        "PyTorch's wheels for Windows do not bring Triton; triton-windows is a package of its own."
        if windows
        else "PyTorch's CUDA wheels for Linux depend on triton; this environment has lost it, or torch is a CPU build.",
        "pip install triton-windows" if windows else "pip install triton",
        cost=1.0,
    )


@check("environment", section=11)
def machine(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """What the machine lacks that the run is to start on."""
    it, get = evidence.machine, figures.config.get
    if it is None:
        return
    device = str(get("device")) if figures.config.is_set("device") else ""
    asked, cpu = device.startswith("cuda"), device.startswith("cpu")  # which is a choice
    if not it.cuda and not cpu and (asked or it.nvidia_driver):
        driver = "an NVIDIA driver is installed" if it.nvidia_driver else "the run asks for CUDA"
        seen = f"torch {it.torch}: torch.cuda.is_available() is False, and {driver}"
        yield _no_cuda([(HERE, seen)], f"torch {it.torch}")
    fastgpt = figures.config.kind == "fastgpt"
    if not it.triton and (get("kernels") == "triton" or get("compile") if fastgpt else it.cuda):
        yield _no_triton([(HERE, f"torch {it.torch}, no triton, {it.platform}")], it.platform.startswith("win"))


@check("environment", section=11)
def from_log(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """What the log's own error messages say."""
    log = evidence.log
    if log is None:
        return
    if notes := log.all("no_cuda"):
        seen = [(notes[0].place, notes[0].text)]
        yield _interpreted(seen) if "interpreter" in notes[0].text else _no_cuda(seen)
    if notes := log.all("no_bf16"):
        yield Finding(
            "no_bf16",
            "critical",
            "The card has no bf16, and the run stopped at it",
            [(notes[0].place, notes[0].text), *figures.place("dtype")],
            "bf16 came with Ampere (sm_80); Turing and Volta have fp16 tensor cores.",
            FP16,
            cost=1.0,
        )
    if notes := log.all("no_triton"):
        windows = any(re.search(r"win(dows|32)|[A-Z]:\\", note.text, re.IGNORECASE) for note in log.notes)
        yield _no_triton([(notes[0].place, notes[0].text)], windows)
    if notes := log.all("no_compiler"):
        yield Finding(
            "no_compiler",
            "critical",
            "Triton had no C compiler, or no Python.h, to build the launcher of its kernels with",
            [(notes[0].place, notes[0].text)],
            "Triton, and torch.compile on a GPU through it, compile a small C module before the first launch. A fresh "
            "Ubuntu or WSL has neither a compiler nor Python's headers.",
            "sudo apt install build-essential python3-dev",
            cost=1.0,
        )
    if notes := log.all("oom"):
        batch = figures.config.get("batch_size")
        last = max((int(series.line[-1]) for series in (log.steps, log.evals) if len(series)), default=0)
        # What is written in between may be a remark. A traceback stands before steps, too: stdout to a file is buffered.
        steps_follow = (notes[-1].place.line or last) < last
        remark = steps_follow and not re.search(r"(?:^|\s)[\w.]*Error: ", notes[-1].text)
        yield Finding(
            "out_of_memory",
            "warning" if remark else "critical",
            "The log speaks of GPU memory that ran out, and the run went on"
            if remark
            else "The run ran out of GPU memory",
            [(notes[-1].place, notes[-1].text), *figures.place("batch_size", "gradient_accumulation_steps")],
            "Activations and logits grow with the micro-batch; weights and optimizer do not. Half the micro-batch at "
            "twice the accumulation is the same optimizer step.",
            vram.lines(next(vram.geometries(figures, batch // 2)))
            if batch and batch > 1
            else "A shorter block_size, or a smaller model."
            if batch
            else "Half the batch_size at twice the gradient_accumulation_steps, again until it fits; at batch_size 1 a shorter "
            "block_size, or a smaller model. python -m fastgpt.plan says what fits a card.",
            confidence="possible" if remark else "likely" if steps_follow else "certain",
            cost=0.0 if remark else 1.0,
            regardless_of=GEOMETRY,
        )


@check("environment", section=11)
def precision(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """bf16 on a card that has none (Turing, Volta and older)."""
    if gpu is None or gpu.peak_flops("bf16") is not None or not figures.config.settings or figures.precision != "bf16":
        return
    asked = figures.place("dtype")
    yield Finding(
        "no_bf16",
        "warning",
        f"{gpu.name} ({gpu.arch}) has no bf16 tensor cores",
        asked or [(Place("--gpu"), gpu.name)],
        "bf16 came with Ampere (sm_80). "
        f"{'The config asks for it' if asked else 'Programs that ask torch.cuda.is_bf16_supported() choose it here'}: "
        f"torch emulates it, far slower than fp16, which this card does at "
        f"{(gpu.peak_flops('fp16') or 0) / 1e12:.0f} TFLOP/s.",
        FP16,
        "likely",
        cost=0.5,
    )


@check("environment", section=11)
def memory(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """A micro-batch that the planner says does not fit; nothing where the log shows that it does."""
    shape, batch = figures.shape, figures.config.get("batch_size")
    ran = evidence.log is not None and len(evidence.log.steps) > 1
    if gpu is None or shape is None or batch is None or ran:
        return
    need, room = vram.needed(shape, batch, figures), usable_vram(gpu)
    if need is None or need <= room:
        return
    geometry = vram.fitting(shape, figures, gpu)
    yield Finding(
        "too_little_vram",
        "critical",
        f"Micro-batch {batch} needs about {gigabytes(need)}; the {gpu.name} has {gigabytes(room)} to give",
        figures.place("batch_size", "gradient_accumulation_steps", "n_embd", "n_layer"),
        f"A prediction (fastgpt.plan, {vram.kernels(figures)}): weights, gradients, optimizer, activations, logits or "
        f"their chunks, workspace. Of the card's {gpu.vram_gb} GB the CUDA context, a desktop and a margin are taken "
        "off.",
        f"{vram.lines(geometry)}\nthe same tokens per step; python -m fastgpt.plan shows every way."
        if geometry
        else "A smaller model or block_size: one sequence does not fit.",
        "likely",
        cost=1.0,
    )
