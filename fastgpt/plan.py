"""The planner's command: a table of what fits, nanoGPT config lines, a fastgpt preset, or JSON (fitting.py does the sums).

python -m fastgpt.plan --gpu rtx4070 --model gpt2-124m --tokens-per-step 524288
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from json import dumps
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, Literal

from rich.table import Table

from fastgpt import anatomy, command, common
from fastgpt.anatomy import Shape
from fastgpt.command import Arg
from fastgpt.common import UserError, gigabytes, millions, rounded
from fastgpt.config import EXPERIMENTAL, MODERN, Config, ModelConfig, OptimConfig, load_preset, load_toml
from fastgpt.hardware import cards
from fastgpt.performance import recipes
from fastgpt.performance.fitting import CUDA_CONTEXT, MARGIN, RunPlan, plan, usable_vram
from fastgpt.performance.memory import KERNELS

PARTS = {
    "weights": "weights, fp32",
    "working_copies": "working copies, 16 bit",
    "gradients": "gradients, fp32",
    "optimizer": "two moments, fp32",
    "activations": "activations",
    "loss": "logits and loss",
    "backward": "backward's temporaries",
    "workspace": "cuBLAS workspace",
    "fragmentation": "fragmentation",
}

NANOGPT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class PlanConfig:
    """Which batch geometry fits a GPU, exactly at the tokens per step asked for, and what the run then costs.

    Examples:
      python -m fastgpt.plan --gpu rtx4070 --model gpt2-124m --tokens 2.5B
      python -m fastgpt.plan --n-layer 24 --n-head 16 --n-embd 1024 --tokens 2.5B
      python -m fastgpt.plan --gpu 3060 --model my.toml --kernels eager --vram 8
      python -m fastgpt.plan --json
    """

    gpu: str | None = None
    """rtx4070, 3090, h100, ... Without it, the card in this machine."""
    model: str = "gpt2-124m"
    """A preset (gpt2-40m, gpt2-124m, gpt2-350m, gpt2-xl, demo, modern-124m, ...) or a fastgpt TOML file; the flags below change
    it."""
    tokens_per_step: int | None = None
    """Tokens behind one optimizer step, on all GPUs: 524288, 0.5e6, ... Without it, the model file's own."""
    tokens: int | None = None
    """Token budget of the run: 2.5B, 300M, 1e9. Without it, those of the model file's own steps where it has the modern recipe,
    which needs fewer; else Chinchilla's 20 per parameter."""
    vram: Annotated[float | None, Arg("GB")] = None
    """GB on the card's box, where it is not in the table or part of it is taken."""
    kernels: Literal["nanogpt-compile", "eager", "compile", "triton"] | None = None
    """One of them; without it, all are compared."""
    precision: Literal["auto", "bf16", "fp16", "fp16-fast", "fp8", "fp32"] = "auto"
    """auto is bf16, or fp16 on cards without it (Turing, Volta). fp16-fast and fp8 are experimental, and --kernels triton's
    alone."""
    world_size: int = 1
    """GPUs of this kind that share a step (speed: no communication counted)."""
    n_layer: int | None = None
    """The model's, instead of the preset's or the file's; so are the next six."""
    n_head: int | None = None
    n_embd: int | None = None
    block_size: int | None = None
    vocab_size: int | None = None
    bias: bool | None = None
    dropout: float | None = None
    json: bool = False
    """Print JSON: the plan for --kernels (triton without it), and under "plans" each of those compared."""


def main(args: list[str]) -> int:
    asked = command.parse(PlanConfig, args, "fastgpt.plan")
    base = _base(asked)
    card, vram_gb = _card(asked)
    tokens_per_step = base.tokens_per_step if asked.tokens_per_step is None else asked.tokens_per_step
    tokens = asked.tokens
    if tokens is None and base.model.family == "modern" and not _changes(asked):
        tokens = base.train.max_iters * base.tokens_per_step

    plans: dict[str, RunPlan | None] = {}
    refused: dict[str, UserError] = {}
    old = card is not None and card.peak_flops("bf16") is None
    precision = ("fp16" if old else "bf16") if asked.precision == "auto" else asked.precision
    for kernels in [asked.kernels] if asked.kernels else KERNELS:
        try:
            if precision in EXPERIMENTAL and kernels != "triton":
                raise UserError(f"precision is {precision!r}, which only --kernels triton has")
            if old and card is not None and (kernels == "triton" or precision == "bf16"):
                which = "kernels is 'triton'" if kernels == "triton" else "precision is 'bf16'"
                raise UserError(
                    f"{which}, which {card.name} ({card.arch}) cannot run: use --kernels eager --precision fp16"
                )
            plans[kernels] = plan(
                base.model,
                card,
                tokens_per_step=tokens_per_step,
                kernels=kernels,
                precision=precision,
                vram_gb=vram_gb,
                tokens=tokens,
                world_size=asked.world_size,
                optimizer=base.optim.optimizer,
            )
        except UserError as error:
            plans[kernels], refused[kernels] = None, error
    fitting = {kernels: p for kernels, p in plans.items() if p is not None}
    if not fitting:
        raise list(refused.values())[-2 if old and not asked.kernels else -1]  # of what can run, what needs the least
    best = fitting.get("triton") or fitting.get("compile") or next(iter(fitting.values()))
    if asked.json:
        print(dumps(best.to_json() | {"plans": {kernels: p.to_json() for kernels, p in fitting.items()}}, indent=2))
        return 0
    console = common.console(highlight=False, soft_wrap=not sys.stdout.isatty())  # a terminal breaks between words
    console.print(_head(best, card, vram_gb), markup=False)
    console.print(_table(plans))
    for note in _notes(fitting, refused, recipes.comparison(Shape.of(best.model), card)):
        console.print(note, markup=False)
    if "nanogpt-compile" in fitting:
        console.print("\n[bold]nanoGPT config[/]\n")
        console.print(nanogpt_lines(fitting["nanogpt-compile"]), markup=False)
    if best.kernels != "nanogpt-compile":
        console.print(f"\n[bold]fastgpt preset[/] ({common.as_typed('python train.py FILE.toml --data FOLDER')})\n")
        console.print(preset(best, base), markup=False)
    return 0


def _base(asked: PlanConfig) -> Config:
    """The model's file or preset, as on a GPU, with the shape flags put in."""
    from_file = asked.model.endswith(".toml")
    if asked.model.endswith((".yaml", ".yml", ".json", ".py")):
        raise UserError(f"model {asked.model!r} is not TOML, as a config has to be: give a preset or a .toml file")
    base = load_toml(Path(asked.model), Config(), "cuda") if from_file else load_preset(asked.model, "cuda")
    return replace(base, model=replace(base.model, **_changes(asked)))


def _changes(asked: PlanConfig) -> dict[str, Any]:
    """The shape flags that are given."""
    given = {field.name: getattr(asked, field.name, None) for field in fields(ModelConfig)}
    return {name: value for name, value in given.items() if value is not None}


def _card(asked: PlanConfig) -> tuple[cards.Gpu | None, float | None]:
    """The card named, or the one present, and its memory in GB (2**30 bytes) if that is not the table's."""
    if asked.gpu is not None:
        if asked.vram is not None:
            return cards.lookup(asked.gpu, vram_gb=asked.vram), asked.vram
        return cards.card(asked.gpu, otherwise=", or give --vram"), None
    import torch

    from fastgpt.hardware.requirements import name_a_gpu

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        return cards.present(), asked.vram or total
    if asked.vram is None:
        raise UserError(name_a_gpu())
    return None, asked.vram


# ---------------------------------------------------------------- text


def _head(best: RunPlan, card: cards.Gpu | None, vram_gb: float | None) -> str:
    model = best.model
    parameters = anatomy.n_params(model, positions=False)
    on_box = vram_gb if vram_gb is not None else card.vram_gb if card else 0
    total = on_box * 2**30
    margin = MARGIN * total
    desktop = max(0.0, total - CUDA_CONTEXT - margin - usable_vram(card, vram_gb))  # not -0.00
    gpus = f"{best.world_size} x " if best.world_size > 1 else ""
    return (
        f"{millions(parameters)} parameters (excluding position embeddings): {model.in_words}; "
        f"{best.tokens_per_step:,} tokens per step, {best.precision}\n"
        f"{gpus}{best.gpu}: {on_box:g} GB on the box are {total / 1e9:.2f} x 10^9 bytes; less CUDA context "
        f"{CUDA_CONTEXT / 1e9:.2f}, desktop {desktop / 1e9:.2f}, margin {margin / 1e9:.2f}: {gigabytes(best.usable, 2)} usable"
    )


def _table(plans: dict[str, RunPlan | None]) -> Table:
    """A column for each kind of kernels; dashes where it does not fit."""
    table = Table(title="Memory of one GPU, GB (10^9 bytes), counted", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for kernels in plans:
        table.add_column(kernels, justify="right", no_wrap=True)

    def row(name: str, cell: Callable[[RunPlan], str], **style: Any) -> None:
        table.add_row(name, *("-" if p is None else cell(p) for p in plans.values()), **style)

    row("micro-batch x accumulation", lambda p: f"{p.micro_batch} x {p.grad_accum}", style="bold", end_section=True)
    for part, name in PARTS.items():
        row(name, partial(_gb, part=part))
    row("needed", lambda p: f"{p.memory.total / 1e9:.2f}", style="bold")
    row("with the CUDA context", lambda p: f"{p.vram_gb:.2f}", end_section=True)
    row("tokens/s, projected", lambda p: _number(p.tokens_per_second), style="bold")
    known = any(p is not None and p.tokens_per_second is not None for p in plans.values())
    if known:
        row("  low", lambda p: _number(p.tokens_per_second_low))
        row("  high", lambda p: _number(p.tokens_per_second_high))
        row("  calibrated on real runs", lambda p: {True: "yes", False: "no", None: "n/a"}[p.calibrated])
    row("hours", lambda p: _number(p.hours, 1))
    if known:
        row("  at best", lambda p: _number(p.hours_low, 1))
        row("  at worst", lambda p: _number(p.hours_high, 1))
    row("kWh, at most", lambda p: _number(p.kwh, 1))
    return table


def _gb(p: RunPlan, part: str) -> str:
    size = p.memory.parts()[part] / 1e9
    return f"{size:.2f}" if size else "."


def _number(value: float | None, digits: int = 0) -> str:
    return "n/a" if value is None else f"{value:,.{digits}f}"


def _notes(plans: dict[str, RunPlan], refused: dict[str, UserError], recipe: str | None) -> list[str]:
    """What a reader has to know about the table's figures. ``recipe``: how the other recipe compares."""
    some = next(iter(plans.values()))
    per_parameter = some.tokens / anatomy.multiplied_params(some.model)
    notes = []
    if some.precision in EXPERIMENTAL:
        notes.append(f"{some.precision} is experimental: no GPU has confirmed it yet.")
        gpu = cards.lookup(some.gpu)
        if gpu is not None and not cards.gains(some.precision, gpu):
            notes.append(f"{gpu.name} is no faster in it: a run would use bf16 instead.")
    notes += [f"Budget: {rounded(some.tokens)} tokens, {per_parameter:.1f} per parameter, in {some.steps:,} steps."]
    if some.tokens_per_second is None:
        notes.append("Tokens/s: n/a, as there is no projection for this GPU at this precision.")
    else:
        notes.append(
            "Tokens/s and hours are projections, not measurements. Evaluation and checkpoints take time on top."
        )
    if some.kwh is not None:
        notes.append(
            f"kWh: upper bound, the board's limit of {some.power_w} W all the time; the rest of the computer is not counted."
        )
    notes += [f"{kernels}: {p.hint}." for kernels, p in plans.items() if p.hint]
    notes += [f"{kernels}: {error}." for kernels, error in refused.items()]
    return notes + ([f"{recipe}."] if recipe else [])


def nanogpt_lines(p: RunPlan) -> str:
    """The plan as lines of a nanoGPT config file. nanoGPT divides gradient_accumulation_steps by the number of GPUs."""
    model, accumulation = p.model, p.grad_accum * p.world_size
    return dedent(f"""\
        # {p.micro_batch} x {accumulation} x {model.block_size} = {p.tokens_per_step:,} tokens per iteration
        gradient_accumulation_steps = {accumulation}
        batch_size = {p.micro_batch}
        block_size = {model.block_size}
        n_layer = {model.n_layer}
        n_head = {model.n_head}
        n_embd = {model.n_embd}
        bias = {model.bias}
        dropout = {model.dropout}
        max_iters = {p.steps}
        lr_decay_iters = {p.steps}
        dtype = {NANOGPT_DTYPES[p.precision]!r}
        compile = True""")


def preset(p: RunPlan, base: Config) -> str:
    """The plan as a fastgpt TOML file, grad_accum over all GPUs; what the plan does not decide is ``base``'s."""
    masked = {"mask_documents": True} if base.data.mask_documents else {}
    sections: dict[str, dict[str, object]] = {
        "model": _written(p.model, *(name for name in vars(p.model) if name not in ("family", *MODERN))),
        "data": {"batch_size": p.micro_batch, "grad_accum": p.grad_accum * p.world_size, **masked},
        "optim": _written(base.optim, "lr", "warmup_iters"),
        "train": {
            "kernels": "triton" if p.kernels == "triton" else "eager",
            "compile": p.kernels == "compile",
            "precision": p.precision,
            "max_iters": p.steps,
        },
    }
    lines = [f"# {p.gpu}, {p.kernels}: {p.vram_gb:.1f} GB, {p.tokens_per_step:,} tokens per step"]
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
    return "\n".join(lines).rstrip()


def _written(section: ModelConfig | OptimConfig, *always: str) -> dict[str, object]:
    """The fields of a section that are not at their defaults, and those named."""
    values = {each.name: (getattr(section, each.name), each.default) for each in fields(section)}
    return {name: value for name, (value, default) in values.items() if name in always or value != default}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    common.run(main)
