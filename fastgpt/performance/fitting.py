"""The batch geometry that fits a GPU at exactly the tokens per step asked for, and the cost of the run.

Memory is counted (memory.py, docs/memory.md), speed is projected (projection.py), and energy is an upper bound: the board's
power limit for as long as the run takes. ``fit_batch`` and ``check_fits`` apply the same rules for train.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fastgpt import anatomy
from fastgpt.common import UserError, at_least, gigabytes, within
from fastgpt.config import Config, ModelConfig
from fastgpt.hardware import cards
from fastgpt.performance.memory import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_HOPPER, Memory, memory

CUDA_CONTEXT = 426 * 2**20
"""What a process holds before its first tensor: measured with PyTorch 2.10 and CUDA 13 on an sm_89 card
(unslothai/unsloth-zoo#1053). Kernels are loaded lazily since CUDA 11.7; before, it was over 1 GB (pytorch#107667)."""

DESKTOP = 400 * 2**20
"""What a desktop session holds on a GeForce card: an assumption, close to what users report after login. A browser that plays
video takes more (mylinuxforwork/dotfiles#93: 400 MiB, 1000 MiB with video). Data-centre cards: 0."""

MARGIN = 0.05
"""Share of VRAM left free: a choice. It is as large as the memory model's error at the two published points (docs/memory.md,
section 7)."""

CHINCHILLA = 20
"""Compute-optimal tokens per parameter (Hoffmann et al. 2022, table 3), excluding tables that are only looked up."""

CPU_SHARE = 0.25
"""Share of a computer's free memory that ``--batch-size auto`` takes on the CPU: other programs need some of it."""


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Job:
    """Everything that determines how much memory a micro-batch takes."""

    model: ModelConfig
    kernels: str
    precision: str
    world_size: int
    workspace: int = CUBLAS_WORKSPACE
    optimizer: str = "adamw"

    @classmethod
    def of(cls, config: Config, world_size: int, device: str) -> Job:
        kernels = config.train.implementation
        auto = "bf16" if device == "cuda" else "fp32"
        precision = auto if config.train.precision == "auto" else config.train.precision
        return cls(config.model, kernels, precision, world_size, optimizer=config.optim.optimizer)

    def needs(self, micro_batch: int) -> Memory:
        return memory(
            self.model,
            micro_batch=micro_batch,
            kernels=self.kernels,
            precision=self.precision,
            world_size=self.world_size,
            workspace=self.workspace,
            optimizer=self.optimizer,
        )

    def fits(self, micro_batch: int, usable: int) -> bool:
        return self.needs(micro_batch).total <= usable

    def geometry(self, tokens_per_step: int, usable: int, where: str) -> tuple[int, int, str | None]:
        """micro_batch, grad_accum, and a hint where other tokens per step would allow a much larger micro-batch."""
        at_least(1, world_size=self.world_size)
        within("[0, 1e12]", tokens_per_step=tokens_per_step)  # all divisors of it are looked at
        unit = self.model.block_size * self.world_size
        if tokens_per_step < 1 or tokens_per_step % unit:
            below = tokens_per_step // unit * unit
            near = " or ".join(f"{n:,}" for n in (below, below + unit) if n > 0)
            each = f"block_size {self.model.block_size}" + (f" x {self.world_size} GPUs" if self.world_size > 1 else "")
            raise UserError(
                f"tokens_per_step is {tokens_per_step:,}: {each} needs a multiple of {unit:,}; the nearest: {near}"
            )
        sequences = tokens_per_step // unit
        if not self.fits(1, usable):
            raise UserError(self._nothing_fits(usable, where))
        micro_batch = next(n for n in _divisors(sequences) if self.fits(n, usable))
        largest = micro_batch
        while largest < 2 * micro_batch and largest < sequences and self.fits(largest + 1, usable):
            largest += 1
        hint = None
        if largest >= 2 * micro_batch:
            other = max(1, round(sequences / largest)) * largest * unit
            hint = f"{tokens_per_step:,} tokens per step allow a micro-batch of {micro_batch}; {other:,} would allow {largest}"
        return micro_batch, sequences // micro_batch, hint

    def _nothing_fits(self, usable: int, where: str) -> str:
        """What one sequence needs, and everything that would help."""
        ways = []
        if self.kernels != "triton":
            lean = replace(self, kernels="triton")
            if lean.fits(1, usable):
                ways.append(f"--kernels triton needs {gigabytes(lean.needs(1).total)}")
        length = self.model.block_size // 2
        while length >= 64 and not replace(self, model=replace(self.model, block_size=length)).fits(1, usable):
            length //= 2
        if length >= 64:
            ways.append(f"--block-size {length} fits")
        needed = self.needs(1).total
        card = next((gpu for gpu in sorted(cards.GPUS, key=lambda g: g.vram_gb) if usable_vram(gpu) >= needed), None)
        if card:
            ways.append(f"a card with {card.vram_gb} GB fits it")
        millions = anatomy.n_params(self.model, positions=False) / 1e6
        return (
            f"micro_batch is 1 and does not fit: one sequence of {self.model.block_size} tokens through {millions:,.0f}M "
            f"parameters ({self.kernels}, {self.precision}) needs {gigabytes(needed)}, and {where} has "
            f"{gigabytes(max(usable, 0))} usable: {'; '.join(ways) or 'use a smaller model'}"
        )


def _divisors(number: int) -> list[int]:
    """All divisors, largest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


# ---------------------------------------------------------------- a plan


@dataclass(frozen=True, kw_only=True)
class RunPlan(Job):
    """A run that fits. Bytes in ``memory`` and ``usable``; ``vram_gb`` in 1e9 bytes, with the CUDA context.

    ``grad_accum`` counts on one GPU: micro_batch x grad_accum x T x world_size = tokens_per_step. Speed, hours and kWh are
    projections for all GPUs together, or None where nothing could be projected.
    """

    gpu: str
    micro_batch: int
    grad_accum: int
    tokens: int
    memory: Memory
    usable: int
    hint: str | None = None
    power_w: int | None = None
    tokens_per_second: float | None = None
    tokens_per_second_low: float | None = None
    tokens_per_second_high: float | None = None
    calibrated: bool | None = None
    """Whether the projection is calibrated on real runs like this one."""
    calibration_error: float | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch * self.grad_accum * self.model.block_size * self.world_size

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def vram_gb(self) -> float:
        return (self.memory.total + CUDA_CONTEXT) / 1e9

    @property
    def hours(self) -> float | None:
        return self._hours(self.tokens_per_second)

    @property
    def hours_low(self) -> float | None:
        return self._hours(self.tokens_per_second_high)

    @property
    def hours_high(self) -> float | None:
        return self._hours(self.tokens_per_second_low)

    @property
    def kwh(self) -> float | None:
        """At most: every board at its limit all the time, the rest of the computer not counted."""
        if self.hours is None or self.power_w is None:
            return None
        return self.hours * self.power_w * self.world_size / 1000

    def _hours(self, rate: float | None) -> float | None:
        return None if not rate else self.steps * self.tokens_per_step / rate / 3600

    def to_json(self) -> dict[str, Any]:
        names = (
            "kernels precision gpu micro_batch grad_accum world_size tokens_per_step tokens steps vram_gb "
            "tokens_per_second tokens_per_second_low tokens_per_second_high calibrated calibration_error "
            "hours hours_low hours_high kwh hint"
        )
        parts = {"memory_bytes": self.memory.parts(), "peak": self.memory.peak, "usable_bytes": self.usable}
        return {name: getattr(self, name) for name in names.split()} | parts


def usable_vram(gpu: cards.Gpu | None, vram_gb: float | None = None) -> int:
    """Bytes that PyTorch's allocator can plan with: VRAM less CUDA context, desktop and margin.

    ``vram_gb`` replaces the card's own; GB as on the box, 2**30 bytes. Raises UserError where neither is known.
    """
    if vram_gb is not None and not 0 < vram_gb < 10_000:
        raise UserError(f"vram is {vram_gb:g}: give the GB on the box, such as 12")
    on_box = gpu.vram_gb if vram_gb is None and gpu else vram_gb
    if on_box is None:
        raise UserError("vram is not known for this card: give the GB on its box, such as --vram 12")
    total = round(on_box * 2**30)
    desktop = 0 if gpu is not None and gpu.full_rate else DESKTOP
    return total - CUDA_CONTEXT - desktop - round(MARGIN * total)


def plan(
    model: ModelConfig,
    gpu: cards.Gpu | None,
    *,
    tokens_per_step: int,
    kernels: str = "triton",
    precision: str = "bf16",
    vram_gb: float | None = None,
    tokens: int | None = None,
    world_size: int = 1,
    optimizer: str = "adamw",
) -> RunPlan:
    """The largest micro-batch that fits ``gpu`` and divides ``tokens_per_step`` (of all ``world_size`` GPUs) exactly.

    ``tokens`` is the run's budget, Chinchilla's 20 per parameter by default. ``gpu`` None: a card that is not in the table;
    then ``vram_gb`` is needed and speed is unknown. Raises UserError for tokens_per_step that T x world_size does not
    divide, naming the nearest that work, and when not even one sequence fits, naming what would.
    """
    if tokens is None:
        tokens = CHINCHILLA * anatomy.multiplied_params(model)
    at_least(1, tokens=tokens)
    usable = usable_vram(gpu, vram_gb)
    hopper = gpu is not None and int(gpu.arch.removeprefix("sm_")) >= 90
    workspace = CUBLAS_WORKSPACE_HOPPER if hopper else CUBLAS_WORKSPACE
    job = Job(model, kernels, precision, world_size, workspace, optimizer)
    name = gpu.name if gpu else f"a card with {vram_gb:g} GB"
    micro_batch, grad_accum, hint = job.geometry(tokens_per_step, usable, name)
    return RunPlan(
        **vars(job),
        gpu=name,
        micro_batch=micro_batch,
        grad_accum=grad_accum,
        tokens=tokens,
        memory=job.needs(micro_batch),
        usable=usable,
        hint=hint,
        power_w=gpu.power_w if gpu else None,
        **_projected(job, gpu, micro_batch, grad_accum),
    )


def fit_batch(config: Config, free: int, world_size: int = 1, *, device: str = "cuda") -> tuple[int, int]:
    """(micro_batch, grad_accum) that fit into ``free`` bytes and keep ``config.tokens_per_step``: ``--batch-size auto``.

    grad_accum as the configuration counts it, over all GPUs together. Raises UserError as ``plan`` does.
    """
    job = Job.of(config, world_size, device)
    micro_batch, per_gpu, _ = job.geometry(config.tokens_per_step, round((1 - MARGIN) * free), "this machine")
    return micro_batch, per_gpu * world_size


def check_fits(config: Config, free: int, world_size: int = 1, *, device: str = "cuda") -> None:
    """Raise UserError, naming what would fit, if the configured micro-batch cannot fit into ``free`` bytes even if the memory
    model counts too much by its known error and no margin is left."""
    job = Job.of(config, world_size, device)
    needed = job.needs(config.data.batch_size)
    if needed.allocated * (1 - MARGIN) <= free:
        return
    micro_batch, grad_accum = fit_batch(config, free, world_size, device=device)
    raise UserError(
        f"batch_size is {config.data.batch_size}: it needs about {gigabytes(needed.total)} ({job.kernels}, "
        f"{job.precision}) of the {gigabytes(free)} free: --batch-size {micro_batch} --grad-accum "
        f"{grad_accum} fits, at the same {config.tokens_per_step:,} tokens per step"
    )


def free_bytes(device: str) -> int:
    """Free memory: that of the current CUDA device, or the computer's, swap included: no end of it where psutil is missing."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    try:
        import psutil  # not for those who only ask what fits a card
    except ImportError:
        return 2**62
    return psutil.virtual_memory().available + psutil.swap_memory().free


def _projected(job: Job, gpu: cards.Gpu | None, micro_batch: int, grad_accum: int) -> dict[str, Any]:
    """The fields of RunPlan that are projected; empty where there is no projection."""
    if gpu is None:
        return {}
    from fastgpt.performance.projection import project  # not for those who only ask what fits

    try:
        speed = project(
            anatomy.Shape.of(job.model),
            gpu,
            kernels=job.kernels,
            precision=job.precision,
            micro_batch=micro_batch,
            tokens_per_step=micro_batch * grad_accum * job.model.block_size,
            dropout=job.model.dropout,
            optimizer=job.optimizer,
        )
    except UserError:  # a card or an arithmetic that it has no figures for
        return {}
    rates = ("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high")
    found = {name: getattr(speed, name) * job.world_size for name in rates}
    return {**found, "calibrated": speed.calibrated, "calibration_error": speed.calibration_error}
