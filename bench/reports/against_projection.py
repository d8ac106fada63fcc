"""Predicted beside measured: what this project has timed on a GPU itself, and what the projection says of the same.

Reads the results files of bench.mfu (a profiled step, per operation), bench.gpu (whole steps, and kernels) and bench.kernels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastgpt.anatomy import Shape
from fastgpt.common import UserError, load_json
from fastgpt.config import load_preset
from fastgpt.hardware import cards
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.memory import KERNELS
from fastgpt.performance.operation import Operation
from fastgpt.performance.operations import operations
from fastgpt.performance.projection import Projection, project
from fastgpt.performance.step_time import CONSTANTS, step_times

VARIANTS = {"nanogpt": "nanogpt-compile", "torch fused": "eager"}
"""Names that results files give to what ran -> --kernels of the projection, where they are not the same."""


@dataclass(frozen=True)
class Pair:
    """One thing measured and projected. None where one of the two has nothing to say; ``note`` then says why."""

    what: str
    variant: str
    measured_ms: float | None
    projected_ms: float | None
    status: str = ""
    note: str = ""

    @property
    def error(self) -> float | None:
        """The error as a share of the projected time: above 0, the model is too slow."""
        return self.projected_ms / self.measured_ms - 1 if self.projected_ms is not None and self.measured_ms else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


def read(path: Path) -> tuple[Gpu, list[Pair]]:
    """The GPU of a results file and all pairs in it.

    Raises UserError if the file cannot be read, is no such file, or was not measured on a GPU of the table.
    """
    results = load_json(path, "measured file")
    try:
        gpu = _gpu(results["environment"], path)
        pairs = list(_pairs(results, gpu))
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"measured file {path} is not a results file of bench.mfu, bench.gpu or bench.kernels ({error!r}): measure again"
        ) from error
    if not pairs:
        raise UserError(f"measured file {path} holds no time: measure again, on a GPU")
    return gpu, pairs


def _gpu(environment: dict[str, Any], path: Path) -> Gpu:
    name = str(environment["device"])
    gpu = cards.lookup(name, sm_count=environment.get("sms"), vram_gb=environment.get("memory_gib"))
    if gpu is None:
        raise UserError(f"measured file {path} comes from {name!r}, which is no GPU of the table: it has no projection")
    return gpu


def _pairs(results: dict[str, Any], gpu: Gpu) -> Iterator[Pair]:
    if "backends" in results:
        yield from _profile(results, gpu)
    for step in results.get("steps", []):
        if "ms" in step and "tokens_per_second" in step:  # a wrong result gets no speed
            yield _step(step, gpu)
    for entry in (results.get("kernels") or results).get("entries", []):
        for variant, figures in entry["variants"].items():
            if "ms" in figures:
                yield _entry(entry, variant, figures["ms"], gpu)


# ---------------------------------------------------------------- steps


def _profile(results: dict[str, Any], gpu: Gpu) -> Iterator[Pair]:
    """Every backend of an mfu.json: its step, and each operation of the profiled one."""
    setup = results["setup"]
    geometry = (Shape(**setup["shape"]), setup["precision"], setup["batch_size"], setup["grad_accum"], setup["seq"])
    for name, backend in results["backends"].items():
        if "error" in backend:
            continue
        found = _projection(name, *geometry, gpu)
        if "ms" in backend:
            yield _pair("step", name, backend["ms"], found)
        if isinstance(found, str):
            continue
        projected: dict[str, float] = defaultdict(float)
        for op in found.operations:
            projected[op.group] += op.ms
        measured = {row["name"]: row["ms"] for row in backend.get("rows", [])}
        known = {*measured, *projected} if measured else set()
        for what in sorted(known, key=lambda w: (-measured.get(w, 0.0), -projected.get(w, 0.0))):
            note = "not in the model" if what not in projected else "" if what in measured else "not in the profile"
            yield Pair(what, name, measured.get(what), projected.get(what), found.status, note)


def _step(step: dict[str, Any], gpu: Gpu) -> Pair:
    """A whole step of bench.gpu."""
    model = load_preset(step["preset"], "cuda").model
    what = f"step of {step['preset']}, {step['batch_size']} x {step['grad_accum']}"
    what += f", {step['cap_gb']:g} GB cap" if step.get("cap_gb") else ""
    geometry = (Shape.of(model), "bf16", step["batch_size"], step["grad_accum"], model.block_size)
    return _pair(what, step["variant"], step["ms"], _projection(step["variant"], *geometry, gpu, dropout=model.dropout))


def _projection(
    variant: str, shape: Shape, precision: str, batch: int, accum: int, T: int, gpu: Gpu, *, dropout: float = 0.0
) -> Projection | str:
    """The projection of a step, or why there is none."""
    kernels = VARIANTS.get(variant, variant)
    if kernels not in KERNELS:
        return "no projection of this variant"
    rest: dict[str, Any] = {"micro_batch": batch, "tokens_per_step": batch * accum * T, "T": T, "dropout": dropout}
    try:
        return project(shape, gpu, kernels=kernels, precision=precision, **rest)
    except UserError as error:
        return str(error)


def _pair(what: str, variant: str, measured_ms: float, found: Projection | str) -> Pair:
    if isinstance(found, str):
        return Pair(what, variant, measured_ms, None, note=found)
    return Pair(what, variant, measured_ms, found.ms_per_step, found.status)


# ---------------------------------------------------------------- kernels


def _entry(entry: dict[str, Any], variant: str, measured_ms: float, gpu: Gpu) -> Pair:
    """One variant of one entry of bench.kernels: forward and backward once, from a cold L2."""
    what, kernels = f"{entry['name']} {entry['shape']}".strip(), VARIANTS.get(variant, variant)
    if kernels not in KERNELS:
        return Pair(what, variant, measured_ms, None, note="no projection of this variant")
    ops = _of_entry(entry, kernels, gpu)
    if not ops:
        return Pair(what, variant, measured_ms, None, note="no counterpart in a step")
    ms = sum(op.ms for op in step_times(ops, 1, gpu, "bf16", CONSTANTS))
    return Pair(what, variant, measured_ms, ms, "projected, uncalibrated")


def _of_entry(entry: dict[str, Any], kernels: str, gpu: Gpu) -> list[Operation]:
    """The operations that an entry times, each executed once as in bench.kernels; none where no step has them."""
    sizes = [int(n) for n in re.findall(r"\d+", entry["shape"])]
    if entry["name"] == "adamw + clip":
        scaled = 0 if kernels == "triton" else 8  # clip_grad_norm_ reads and writes the gradients
        moved = entry["bytes"] + entry["bytes"] // 32 * scaled
        return [Operation("clip and AdamW", "optimizer", "memory", 0, moved, 3, own=kernels == "triton")]
    if entry["name"] == "attention" and len(sizes) == 4:
        B, T, H, D = sizes
        return _once(Shape(1, H, H * D, T, 64), kernels, B, gpu, ("attention forward", "attention backward"))
    if entry["name"] == "layer_norm + residual" and len(sizes) == 2:
        rows, C = sizes
        apart = ("residual", "norm", "branch") if kernels == "eager" else ()
        found = _once(Shape(1, 1, C, rows, 64), kernels, 1, gpu, ("norms forward", "norms backward"), apart)
        return [op for op in found if not op.name.startswith("first")]
    if entry["name"] == "linear_cross_entropy" and len(sizes) == 3:
        rows, C, V = sizes
        return _once(Shape(1, 1, C, rows, V), kernels, 1, gpu, ("head forward", "head dX", "head dW", "loss"))
    return []


def _once(
    shape: Shape, kernels: str, B: int, gpu: Gpu, groups: tuple[str, ...], apart: tuple[str, ...] = ()
) -> list[Operation]:
    """The operations of these groups, and the pointwise ones whose name starts so, in a model of one block: chunks of the
    loss as often as they come, all else once, from a cold L2."""
    found = operations(shape, kernels, B, sm_count=gpu.sm_count)
    chosen = [op for op in found if op.group in groups or (apart and op.name.startswith(apart))]
    return [op if op.group == "loss" or op.group.startswith("head") else replace(op, count=1, fresh=0) for op in chosen]
