"""``--explain-kernels``: who computes what in a training step, in which launch config, and who chose that. Nothing is trained.

The step's own host code runs once with one micro-batch and once with two (training/dry_run.py): no launch, no arithmetic. What
the tuning tables answer on the way is printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastgpt import anatomy
from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, GPT2_ALONE, Config
from fastgpt.hardware import cards, requirements
from fastgpt.kernels import runtime, tuning
from fastgpt.training import dry_run
from fastgpt.training.dry_run import Record

HERE = "here"
"""The value of a bare ``--explain-kernels``: the GPU that is present."""

WIDE = 130
"""Columns from which on a kernel takes one line."""
KINDS = {
    "none": "linear, or its input gradient",
    "bias": "linear + bias",
    "residual": "linear + residual",
    "gelu": "linear + GELU",
    "dgelu": "input gradient x GELU'",
    "weight_grad": "weight gradient",
    "weight_grad_bias": "weight and bias gradient",
}


class Card(NamedTuple):
    """What is explained for."""

    name: str
    arch: int
    sms: int


def card_of(asked: str) -> Card:
    """The card of that name, or with HERE the one that is present. Raises UserError without a GPU, for an unknown name, and for
    a card that kernels are not compiled for."""
    if asked == HERE:
        if not torch.cuda.is_available():
            raise UserError(requirements.name_a_gpu())
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        card = Card(found.name, 10 * found.major + found.minor, found.multi_processor_count)
    else:
        gpu = cards.card(asked, option="explain_kernels")
        card = Card(gpu.name, int(gpu.arch[3:]), gpu.sm_count)
    if card.arch < 80:
        raise UserError(f"explain_kernels is {asked!r} (sm_{card.arch}): kernels are compiled for sm_80 and later")
    return card


def explain(config: Config, console: Console) -> int:
    """Print the table for ``config.train.explain_kernels``. Raises UserError."""
    asked = config.train.explain_kernels
    assert asked is not None
    if config.train.kernels != "triton":
        raise UserError(f"kernels is {config.train.kernels!r}, which is PyTorch's alone: explain_kernels needs triton")
    card = card_of(asked)
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    gpu = cards.lookup(card.name)
    if precision in GPT2_ALONE and config.model.family != "gpt2":
        raise UserError(f"precision is {precision!r}, which only GPT-2 has yet: use --precision bf16")
    if precision in EXPERIMENTAL and gpu is not None and not cards.gains(precision, gpu):
        console.print(f"{card.name} is no faster in {precision}: a run would use bf16 instead.")
        precision = "bf16"
    _compile_instead_of_interpreting()
    one, two = (dry_run.record(config, precision, card.arch, card.sms, n) for n in (1, 2))
    show(config, card, precision, one, two, console)
    return 0


def _compile_instead_of_interpreting() -> None:
    """Kernels are only written down, but triton has to be the one that compiles. Its interpreter is chosen at import."""
    if find_spec("triton") is None:
        raise UserError("explain_kernels needs triton, which is not installed: pip install triton on Linux")
    if runtime.INTERPRET:
        raise UserError("TRITON_INTERPRET is set, so no table would be asked: unset it to use explain_kernels")


# ---------------------------------------------------------------- the table


def show(config: Config, card: Card, precision: str, one: Record, two: Record, console: Console) -> None:
    """``one``, ``two``: what steps of so many micro-batches ask for; the difference is a micro-batch, the rest once a step."""
    model, data = config.model, config.data
    console.print(
        f"[bold]{escape(card.name)}[/] (sm_{card.arch}, {card.sms} SMs), {precision}, micro-batches of "
        f"{data.batch_size} x {model.block_size} tokens: what a step launches. Nothing was run.",
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    narrow = console.width < WIDE
    for name in ("what, shape", "engine") if narrow else ("what", "shape (m x n x k)", "engine"):
        table.add_column(
            name, overflow="fold", no_wrap=not narrow, min_width=17 if narrow else None
        )  # programs_per_sm=2
    for name in ("chosen by",) if narrow else ("config", "chosen by"):
        table.add_column(name, overflow="fold")
    table.add_column("launches", justify="right", no_wrap=True, min_width=8)
    for what, shape, engine, chosen, *others in rows(one, two, model.vocab_size, anatomy.of(model).activation):
        cells = (f"{what}\n{shape}", f"{engine} {chosen.strip('-')}") if narrow else (what, shape, engine, chosen)
        table.add_row(*(escape(cell.replace(f" ({card.name})", "")) for cell in (*cells, *others)))
    console.print(table)
    console.print(
        "launches: in a micro-batch, or 'once' in a step. Chosen by: a config measured on such a card, or ranked by a model "
        "of what the compiler says, or the default of the kernel's file; a matmul is cuBLAS's until Triton was measured to "
        "be quicker (python -m bench.tune).",
        style="dim",
    )
    _show_rankings(card, two, console)
    tuned = {space.function.__name__ for space in tuning.spaces().values()}
    fixed = [
        f"{name.strip('_').removesuffix('_kernel')} {_count((file, name), one.launches, two.launches)}"
        for file, name in two.launches
        if name not in tuned
    ]
    if fixed:
        console.print(f"Triton kernels with one config, in their file: {', '.join(fixed)}.")
    passes = [f"{_PASSES.get(name, name)} {count}" for name, count in (two.sweeps - one.sweeps).items()]
    if passes:
        console.print(f"Passes over memory by PyTorch, in a micro-batch: {', '.join(passes)}.")


def rows(one: Record, two: Record, vocab_size: int, activation: str) -> Iterator[tuple[str, ...]]:
    """The linears as the tables decide, the head's matmuls where it is PyTorch that multiplies, and all other kernels that
    have configs to choose from: by kernel, in the order of first use."""
    kernels = list(dict.fromkeys(choice.kernel for choice in two.choices))
    choices = sorted(two.choices, key=lambda choice: kernels.index(choice.kernel))
    linears = [choice for choice in choices if choice.kernel.startswith("linear")]
    for choice in linears:
        name = f"{KINDS[choice.kernel.split('.')[1]].replace('GELU', activation)}, {choice.dtype}"
        name += ", sums in fp16" if choice.kernel.startswith("linear_fast") else ""
        library, shape = dict(choice.config) == tuning.CUBLAS, " x ".join(map(str, choice.shape or ()))
        engine, config = ("cuBLAS", "-") if library else ("Triton", tuning.brief(dict(choice.config)))
        yield name, shape, engine, config, choice.source, _count(choice, one.choices, two.choices)
    for product in two.products:
        m, n, k, dtype = product
        if max(m, n, k) >= vocab_size:
            name = f"head, {dtype.replace('bfloat', 'bf').replace('float', 'fp')}"
            count = _count(product, one.products, two.products)
            yield name, f"{m} x {n} x {k}", "cuBLAS", "-", "no other is offered", count
    for choice in choices:
        if choice not in linears:
            config, count = tuning.brief(dict(choice.config)), _count(choice, one.choices, two.choices)
            yield f"{choice.kernel}, {choice.dtype}", choice.bucket, "Triton", config, choice.source, count


def _show_rankings(card: Card, record: Record, console: Console) -> None:
    """What the model says of each config that it ranked: how far it is behind the quickest, whatever overlaps."""
    here = tuning.Target(card.arch, card.sms, cards.ARCHS[f"sm_{card.arch}"].shared_per_block)
    behind: dict[tuple[str, ...], dict[str, float]] = {}
    older: list[str] = []
    for choice in record.choices:
        if not choice.source.startswith("ranked"):
            continue
        key = tuning.Key(choice.kernel, choice.dtype, choice.bucket)
        for entry in [e for e, _ in tuning.entries_for(key, here) if e.config == dict(choice.config)][:1]:
            if tuning.is_of_older_code(entry):
                older.append(choice.kernel)
            else:
                behind[(f"{choice.kernel}, {choice.dtype}", choice.bucket)] = entry.evidence.get("under", {})
    if behind:
        console.print("Time over the quickest config's, by the model that ranked them, if of a kernel's resources:")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        assumptions = list(dict.fromkeys(name for under in behind.values() for name in under))
        for name in ("what, shape", *assumptions):
            table.add_column(name, overflow="fold", justify="left" if name.startswith("what") else "right")
        for words, under in behind.items():
            cells = (f"{under[name]:.3f}" if name in under else "-" for name in assumptions)
            table.add_row(escape(" ".join(words)), *cells)
        console.print(table)
    if older:
        console.print(f"Ranked for older code: {', '.join(dict.fromkeys(older))}.")


def _count(key: Hashable, one: Counter, two: Counter) -> str:
    return str(two[key] - one[key]) if two[key] > one[key] else f"{two[key]}, once"


_PASSES = {"_to_copy": "cast", "add_": "add in place", "new_zeros": "zeros", "copy_": "copy"}
