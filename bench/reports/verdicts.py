"""What a run of bench.gpu says of each claim that this project makes: confirmed, refuted, or not reached; and its one-page
summary. Reads plain dicts, measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.reports.markdown import memory_rows, step_rows, where
from bench.reports.tables import markdown
from bench.steps.variants import VARIANTS
from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.config import load_preset
from fastgpt.hardware import cards
from fastgpt.performance.projection import project

SCHEMA, SCHEMA_VERSION = "fastgpt.gpu", 1
CONFIRMED, REFUTED, NOT_REACHED = "confirmed", "**refuted**", "not reached"

NANOGPT = {"NVIDIA GeForce RTX 4070": 56_070}
"""Tokens per second of nanoGPT under torch.compile, GPT-2 124M, as measured by others: README.md."""
CLOSE = 0.05
"""How far what was measured may lie from a figure that is no interval."""
PROJECTED = (
    ("gpt2-124m", "triton"),
    ("gpt2-124m", "triton fp16-fast"),
    ("gpt2-124m", "triton fp8"),
    ("gpt2-40m", "triton"),
    ("gpt2-40m", "triton fp16-fast"),
    ("gpt2-xl", "triton"),
)
"""The steps whose speed docs/performance.md projects."""
TARGETS = {
    "NVIDIA GeForce RTX 4070": {
        ("gpt2-124m", "triton"): 60_000,
        ("gpt2-124m", "triton fp16-fast"): 88_000,
        ("gpt2-40m", "triton"): 145_000,
        ("gpt2-40m", "triton fp16-fast"): 195_000,
    },
    "NVIDIA H200": {("gpt2-124m", "triton"): 498_000},
}
"""The least tokens per second that docs/performance.md aims at."""


class Verdict(NamedTuple):
    claim: str
    verdict: str
    evidence: str


def empty() -> dict[str, Any]:
    """The results of a run that has not begun."""
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "stages": {}}


def key(step: dict[str, Any]) -> tuple:
    """What tells one measured step from another."""
    return tuple(step.get(name) for name in ("preset", "variant", "cap_gb", "batch_size", "grad_accum"))


def step_of(results: dict[str, Any], preset: str, variant: str) -> dict[str, Any] | None:
    """The measured step of that kind, of the largest micro-batch; one with a speed before one without."""
    found = [
        s for s in results.get("steps", ()) if (s["preset"], s["variant"]) == (preset, variant) and not s["cap_gb"]
    ]
    return max(found, key=lambda s: ("tokens_per_second" in s, s["batch_size"]), default=None)


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Every claim that can be made of this card."""
    about = results["environment"]
    gpu = cards.lookup(about["device"], sm_count=about.get("sms"), vram_gb=about.get("memory_gib"))
    found = [_tests(results), *_training(results), *_beside(results), _memory(results)]
    if about["device"] in NANOGPT:
        found.insert(3, _nanogpt(results, NANOGPT[about["device"]]))
    for preset, variant in PROJECTED:
        if gpu is not None and (variant == "triton" or cards.gains(VARIANTS[variant].precision, gpu)):
            found.append(_projected(results, preset, variant, gpu))
    for (preset, variant), least in TARGETS.get(about["device"], {}).items():
        step = step_of(results, preset, variant)
        claim = f"Target: {preset}, {variant}, at least {least:,} tokens/s"
        found.append(_judged(claim, step, lambda rate, least=least: rate >= least))  # type: ignore[misc]
    return found


def _tests(results: dict[str, Any]) -> Verdict:
    claim, found = "The parity tests pass on this GPU", results.get("parity")
    if not found or not (found["passed"] or found["failed"]):
        return Verdict(claim, NOT_REACHED, "")
    counts = f"{found['passed']:,} passed, {found['failed']} failed, {found['not_reached']} not reached"
    verdict = REFUTED if found["failed"] else NOT_REACHED if found["not_reached"] else CONFIRMED
    return Verdict(claim, verdict, counts)


def _training(results: dict[str, Any]) -> Iterator[Verdict]:
    runs = results.get("train", {})
    direct = runs.get("direct", {})
    for name, claim in (
        ("graphs", "A run replayed as CUDA graphs has the bits of one run directly"),
        ("resumed", "A run resumed half way repeats the undisturbed one, bit for bit"),
    ):
        other = runs.get(name)
        if other is None or "sha256" not in direct:
            yield Verdict(claim, NOT_REACHED, "")
        elif "sha256" not in other:
            yield Verdict(claim, REFUTED, other["error"])
        else:
            apart = [step for step, loss in other["losses"].items() if direct["losses"].get(step) != loss]
            evidence = f"losses of {len(other['losses']) - len(apart)} of {len(other['losses'])} steps are equal"
            same = other["sha256"] == direct["sha256"]
            weights = "weights and moments too" if same else "weights or moments differ"
            yield Verdict(claim, CONFIRMED if same and not apart else REFUTED, f"{evidence}, {weights}")


def _judged(claim: str, step: dict[str, Any] | None, holds: Any) -> Verdict:
    """A claim about a step's tokens per second."""
    if step is None or ("tokens_per_second" not in step and not step.get("error", "").startswith("no speed")):
        return Verdict(claim, NOT_REACHED, "" if step is None else step.get("error", ""))
    if "tokens_per_second" not in step:
        return Verdict(claim, REFUTED, step["error"])
    rate = step["tokens_per_second"]
    return Verdict(claim, CONFIRMED if holds(rate) else REFUTED, f"{rate:,.0f} tokens/s at batch {step['batch_size']}")


def _nanogpt(results: dict[str, Any], rate: int) -> Verdict:
    claim = f"nanoGPT + torch.compile: {rate:,} tokens/s (within {CLOSE:.0%})"
    return _judged(claim, step_of(results, "gpt2-124m", "nanogpt"), lambda found: abs(found / rate - 1) <= CLOSE)


def _projected(results: dict[str, Any], preset: str, variant: str, gpu: cards.Gpu) -> Verdict:
    """README's figure for fastgpt and its like, for this card, at the batch that was measured."""
    config, step = load_preset(preset, "cuda"), step_of(results, preset, variant)
    batch = step["batch_size"] if step else config.data.batch_size
    tokens = batch * step["grad_accum"] * config.model.block_size if step else config.tokens_per_step
    try:
        found = project(
            Shape.of(config.model), gpu, kernels="triton", precision=VARIANTS[variant].precision,
            micro_batch=batch, tokens_per_step=tokens, dropout=config.model.dropout,
        )  # fmt: skip
    except UserError as error:
        return Verdict(f"{preset}, {variant}, as projected", NOT_REACHED, str(error))
    low, high = found.tokens_per_second_low, found.tokens_per_second_high
    claim = f"{preset}, {variant}: {low:,.0f} to {high:,.0f} tokens/s, projected"
    return _judged(claim, step, lambda rate: low <= rate <= high)


def _beside(results: dict[str, Any]) -> Iterator[Verdict]:
    """Speed and memory beside the same step in the same run."""
    for other, name in (("compile", "torch.compile"), ("nanogpt", "nanoGPT + torch.compile")):
        claim = f"GPT-2 124M trains faster than {name} on the same tokens in the same run"
        ours, theirs = _same_run(results, other)
        if ours is None or theirs is None:
            yield Verdict(claim, NOT_REACHED, "")
            continue
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        yield Verdict(claim, CONFIRMED if ratio > 1 else REFUTED, f"{ratio:.2f} times as fast ({ours['variant']})")
    ours, theirs = _same_run(results, "compile", "peak_memory")
    claim = "... with a smaller memory peak than torch.compile"
    if ours is None or theirs is None:
        yield Verdict(claim, NOT_REACHED, "")
    else:
        sizes = f"{ours['peak_memory'] / 1e9:.2f} GB, torch.compile {theirs['peak_memory'] / 1e9:.2f} GB"
        yield Verdict(claim, CONFIRMED if ours["peak_memory"] < theirs["peak_memory"] else REFUTED, sizes)


def _same_run(results: dict[str, Any], other: str, figure: str = "tokens_per_second") -> tuple[Any, Any]:
    """Our fastest bf16 step of GPT-2 124M, and the other, of the same batch."""
    theirs = step_of(results, "gpt2-124m", other)
    if theirs is None or figure not in theirs:
        return None, None
    steps = [
        step
        for step in results["steps"]
        if step["variant"] in ("triton", "triton+compile") and key(step)[2:] == key(theirs)[2:] and figure in step
        if step["preset"] == "gpt2-124m"
    ]
    return max(steps, key=lambda step: step.get("tokens_per_second", 0.0), default=None), theirs


def _memory(results: dict[str, Any]) -> Verdict:
    claim = f"A step's peak memory is as counted, within {CLOSE:.0%}"
    off = {f"{row.step['preset']} {row.step['variant']}": row.off for row in memory_rows(results)}
    if not off:
        return Verdict(claim, NOT_REACHED, "")
    worst = max(off, key=lambda name: abs(off[name]))
    evidence = f"{len(off)} steps; furthest off: {worst}, {off[worst]:+.1%}"
    return Verdict(claim, CONFIRMED if abs(off[worst]) <= CLOSE else REFUTED, evidence)


def summary(results: dict[str, Any]) -> str:
    """One page of Markdown."""
    cells = [["claim", "verdict", "evidence"], *map(list, verdicts(results))]
    parts = ["# fastgpt on " + results["environment"]["device"], where(results["environment"]), markdown(cells)]
    batch = results.get("batch", {}).get("size")
    main = [s for s in results.get("steps", ()) if s["preset"] == "gpt2-124m" and not s["cap_gb"]]
    if main:
        parts += [f"GPT-2 124M, at the micro-batch that is best here ({batch or 'not found'}) and at one:"]
        parts += [markdown(step_rows(main, header=True))]
    stages = [["stage", "seconds", "ended"]]
    for name, stage in results["stages"].items():
        stages.append([name, f"{stage['seconds']:.0f}", "yes" if stage["ended"] is True else str(stage["ended"])[:160]])
    parts += [markdown(stages), "A stage that is not listed was not reached: the same command goes on with it."]
    if results.get("left_out"):
        parts.append(f"Too large for the archive: {', '.join(results['left_out'])}.")
    return "\n\n".join(parts) + "\n"
