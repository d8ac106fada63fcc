"""What a GPU that is not here would do, for bench.mfu: its step as projected, its kernels as compiled.

Nothing here is a measurement. bench.project and bench.audit show the same at length.
"""

from __future__ import annotations

from typing import Any

from bench.compiler.audit import run, target
from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, load_preset, preset_names
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.memory import KERNELS
from fastgpt.performance.projection import project

AUDITED = "step gpt2-124m {precision}"
"""The step whose kernels are compiled: all of them take minutes (python -m bench.audit)."""


def projection(model: str | None, gpu: Gpu, precision: str = "bf16") -> dict[str, Any]:
    """One step of a preset (GPT-2 124M if ``model`` is none of them) on every kind of kernels, in bf16; and on ours in
    ``precision``, if that is an experimental one."""
    name = model if model in preset_names() and model != "demo" else "gpt2-124m"
    config = load_preset(name, "cuda")
    batch, T, tokens = config.data.batch_size, config.model.block_size, config.tokens_per_step
    shape = Shape.of(config.model)
    rest: dict[str, Any] = {"micro_batch": batch, "tokens_per_step": tokens, "dropout": config.model.dropout}
    rest["optimizer"] = config.optim.optimizer
    steps = {kernels: (kernels, "bf16") for kernels in KERNELS}
    if precision in EXPERIMENTAL:
        steps[f"triton {precision}"] = ("triton", precision)
    variants: dict[str, Any] = {}
    for name_of_step, (kernels, used) in steps.items():
        try:
            variants[name_of_step] = project(shape, gpu, kernels=kernels, precision=used, **rest).to_json()
        except UserError as error:  # a card without the arithmetic
            variants[name_of_step] = {"error": str(error)}
    return {
        "gpu": gpu.name,
        "model": name,
        "batch_size": batch,
        "seq": T,
        "tokens_per_step": tokens,
        "variants": variants,
    }


def audit(gpu: Gpu, precision: str = "bf16") -> dict[str, Any]:
    """The kernels of a GPT-2 124M step in bf16, or in an experimental precision, compiled for this GPU in a process of its own:
    rows of bench.audit."""
    case = AUDITED.format(precision=precision if precision in EXPERIMENTAL else "bf16")
    found: dict[str, Any] = {"gpu": gpu.name, "arch": gpu.arch, "cases": case}
    try:
        report = run(target(None, gpu.name), only=f"^{case}$", shard=None)
    except (UserError, RuntimeError, OSError) as error:  # an architecture that Triton does not compile for, no ptxas
        return found | {"error": str(error).splitlines()[0][:300]}
    if not report.rows:
        return found | {"error": f"{gpu.name} cannot run {case}"}
    return found | {"triton": report.triton, "rows": report.rows, "failures": report.failures}
