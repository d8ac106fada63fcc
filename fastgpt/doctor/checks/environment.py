"""The machine: no CUDA, a torch without Triton or C compiler, a card without bf16, too little memory; and how a run ended that
did not come to its end. Sentences that stay the same are in crashes.toml."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fastgpt.anatomy import Shape
from fastgpt.common import UserError, gigabytes, packaged_toml, shortened
from fastgpt.config import ModelConfig
from fastgpt.doctor.evidence import ConfigFacts, Evidence, LogFacts, Place, Seen
from fastgpt.doctor.figures import GEOMETRY, Figures
from fastgpt.doctor.findings import Finding, check
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.fitting import usable_vram
from fastgpt.performance.memory import memory as predicted

HERE = Place("this machine")
TEXTS: dict[str, Any] = packaged_toml("fastgpt.doctor.checks", "crashes.toml")
LACKS = ("no_cuda", "no_bf16", "no_triton", "no_compiler")
"""Notes that the machine is not fit for the run."""


def _lack(name: str, seen: Seen, torch: str = "torch") -> Finding:
    """What is missing, in the words of crashes.toml. ``torch``: its name and version."""
    said = TEXTS["lack"][name]
    severity, title = said.get("severity", "critical"), said["title"].format(torch=torch)
    check = name.removesuffix("_on_windows")
    return Finding(check, severity, title, seen, said["why"], said["advice"], cost=float(severity == "critical"))


@check("environment", section=11)
def machine(evidence: Evidence, config: ConfigFacts) -> Iterator[Finding]:
    """What the machine lacks that the run is to start on."""
    it, get = evidence.machine, config.get
    if it is None:
        return
    device = str(get("device")) if config.is_set("device") else ""
    asked, cpu = device.startswith("cuda"), device.startswith("cpu")  # which is a choice
    if not it.cuda and not cpu and (asked or it.nvidia_driver):
        driver = "an NVIDIA driver is installed" if it.nvidia_driver else "the run asks for CUDA"
        seen = f"torch {it.torch}: torch.cuda.is_available() is False, and {driver}"
        yield _lack("no_cuda", [(HERE, seen)], f"torch {it.torch}")
    if not it.triton and (get("kernels") == "triton" or get("compile") if config.kind == "fastgpt" else it.cuda):
        name = "no_triton_on_windows" if it.platform.startswith("win") else "no_triton"
        yield _lack(name, [(HERE, f"torch {it.torch}, no triton, {it.platform}")])


@check("environment", section=11)
def lacks_in_the_log(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """What the log's own error messages say of the machine."""
    for name in LACKS:
        if not (notes := log.all(name)):
            continue
        seen = [(notes[0].place, notes[0].text), *(figures.place("dtype") if name == "no_bf16" else ())]
        if name == "no_triton" and any(re.search(r"win(dows|32)|[A-Z]:\\", n.text, re.IGNORECASE) for n in log.notes):
            name = "no_triton_on_windows"
        yield _lack("interpreted" if "interpreter" in notes[0].text else name, seen)


@check("environment", section=11)
def out_of_memory(log: LogFacts, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """GPU memory that ran out, which ends a run or is a remark on the way."""
    if not (notes := log.all("oom")):
        return
    batch, last = config.get("batch_size"), log.last_line
    # What is written in between may be a remark. A traceback stands before steps, too: stdout to a file is buffered.
    steps_follow = (notes[-1].place.line or last) < last
    remark = steps_follow and not re.search(r"(?:^|\s)[\w.]*Error: ", notes[-1].text)
    yield Finding(
        "out_of_memory",
        "warning" if remark else "critical",
        "The log speaks of GPU memory that ran out, and the run went on" if remark else "The run ran out of GPU memory",
        [(notes[-1].place, notes[-1].text), *figures.place("batch_size", "gradient_accumulation_steps")],
        "Activations and logits grow with the micro-batch; weights and optimizer do not. Half the micro-batch at "
        "twice the accumulation is the same optimizer step.",
        geometry_lines(next(geometries(figures, batch // 2)))
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
def ended_in_an_exception(log: LogFacts) -> Iterator[Finding]:
    """The first exception after the last step. Of a chain, or of several ranks, it is the one that brought the others."""
    last = log.last_line
    after = [note for note in log.notes if (note.place.line or 0) > last]
    notes = [note for note in after if note.kind == "exception"]
    if not notes or any(note.kind in ("oom", *LACKS) for note in after):  # of which the checks above speak
        return
    # A sentence that is known counts before one that is not: the line that says most is seldom the first.
    ranked = ((crash, note) for crash in TEXTS["crash"] for note in notes if re.search(crash["pattern"], note.text))
    crash, note = next(ranked)
    yield Finding(
        crash["check"],
        crash["severity"],
        crash["title"].format(text=shortened(note.value, 90)),
        [(note.place, note.text)],
        crash["why"],
        crash["advice"].strip(),
        "likely" if crash["pattern"] else "certain",
        cost=float(crash["severity"] == "critical"),
    )


@check("environment", section=11)
def precision(figures: Figures, config: ConfigFacts, gpu: Gpu | None) -> Iterator[Finding]:
    """bf16 on a card that has none (Turing, Volta and older)."""
    if gpu is None or gpu.peak_flops("bf16") is not None or not config.settings or figures.precision != "bf16":
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
        TEXTS["lack"]["no_bf16"]["advice"],
        "likely",
        cost=0.5,
    )


@check("environment", section=11)
def memory(evidence: Evidence, figures: Figures, config: ConfigFacts, gpu: Gpu | None) -> Iterator[Finding]:
    """A micro-batch that the planner says does not fit; nothing where the log shows that it does."""
    shape, batch = figures.shape, config.get("batch_size")
    ran = evidence.log is not None and len(evidence.log.steps) > 1
    if gpu is None or shape is None or batch is None or ran:
        return
    need, room = bytes_needed(shape, batch, figures), usable_vram(gpu)
    if need is None or need <= room:
        return
    geometry = fitting_geometry(shape, figures, gpu)
    yield Finding(
        "too_little_vram",
        "critical",
        f"Micro-batch {batch} needs about {gigabytes(need)}; the {gpu.name} has {gigabytes(room)} to give",
        figures.place("batch_size", "gradient_accumulation_steps", "n_embd", "n_layer"),
        f"A prediction (fastgpt.plan, {planner_kernels(figures)}): weights, gradients, optimizer, activations, logits or "
        f"their chunks, workspace. Of the card's {gpu.vram_gb} GB the CUDA context, a desktop and a margin are taken "
        "off.",
        f"{geometry_lines(geometry)}\nthe same tokens per step; python -m fastgpt.plan shows every way."
        if geometry
        else "A smaller model or block_size: one sequence does not fit.",
        "likely",
        cost=1.0,
    )


# ---------------------------------------------------------------- what fits, as fastgpt.plan predicts it


def planner_kernels(figures: Figures) -> str:
    """Which of the planner's kernels the run uses: nanoGPT compiles unless told not to."""
    if figures.config.kind == "fastgpt":
        name = str(figures.config.get("kernels", "triton"))
        return "compile" if name == "eager" and figures.config.get("compile") else name
    return "nanogpt-compile" if figures.config.get("compile", True) else "eager"


def bytes_needed(shape: Shape, micro_batch: int, figures: Figures) -> int | None:
    """Bytes of a training step, predicted; None for a shape or kernels that the planner has no answer for."""
    dropout = figures.config.get("dropout") or 0.0
    precision = "fp32" if figures.precision == "tf32" else figures.precision
    try:
        model = ModelConfig(**asdict(shape), dropout=dropout if dropout < 1 else 0.0)
        return predicted(model, micro_batch=micro_batch, kernels=planner_kernels(figures), precision=precision).total
    except UserError:
        return None


def geometries(figures: Figures, largest: int) -> Iterator[tuple[int, int]]:
    """Micro-batches from ``largest`` down, each with the accumulation that keeps the tokens per step."""
    batch, accumulate = figures.config.get("batch_size"), figures.config.get("gradient_accumulation_steps") or 1
    sequence_tokens = (batch or 0) * (figures.config.get("block_size") or 0)
    if figures.tokens_per_step and sequence_tokens and figures.tokens_per_step % sequence_tokens == 0:
        accumulate = figures.tokens_per_step // sequence_tokens  # the log's, where it says another
    return ((size, batch * accumulate // size) for size in range(largest, 0, -1) if batch * accumulate % size == 0)


def fitting_geometry(shape: Shape, figures: Figures, gpu: Gpu) -> tuple[int, int] | None:
    """The largest of the run's ``geometries`` that fits; None if its batch is not known, or one sequence does not fit."""
    room = usable_vram(gpu)
    sizes = geometries(figures, figures.config.get("batch_size") or 0)
    return next((found for found in sizes if (bytes_needed(shape, found[0], figures) or math.inf) <= room), None)


def geometry_lines(geometry: tuple[int, int]) -> str:
    """Config lines for a micro-batch and its accumulation."""
    return f"batch_size = {geometry[0]}\ngradient_accumulation_steps = {geometry[1]}"
