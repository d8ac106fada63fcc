"""Is the model the size that was meant, and is that a good size for the tokens it sees?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.common import gigabytes, millions, rounded
from fastgpt.doctor.checks import scaling
from fastgpt.doctor.checks.comments import agrees, claimed_sizes
from fastgpt.doctor.checks.environment import bytes_needed, fitting_geometry, geometry_lines
from fastgpt.doctor.evidence import ConfigFacts, Evidence, LogFacts, Place
from fastgpt.doctor.figures import LARGEST_VOCABULARY, PRETRAINED, Figures
from fastgpt.doctor.findings import Finding, check
from fastgpt.hardware.cards import Gpu
from fastgpt.performance import flops
from fastgpt.performance.fitting import usable_vram

ADAM_BYTES = 16
"""Memory per parameter that does not depend on the batch: fp32 weight, gradient and AdamW's two moments."""
MANY, FEW = 5 * scaling.TOKENS_PER_PARAMETER, scaling.TOKENS_PER_PARAMETER / 4


def single_change(shape: Shape, wanted: float) -> tuple[str, Shape] | None:
    """The one setting that brings ``shape`` within 8% of ``wanted`` parameters, and the shape it gives; of several, the
    one with proportions nearest to GPT-2's (width over depth 64)."""
    candidates = [("n_embd", replace(shape, n_embd=64 * k)) for k in range(1, 129) if 64 * k % shape.n_head == 0]
    candidates += [("n_layer", replace(shape, n_layer=layers)) for layers in range(1, 97)]
    fitting = [
        (name, other)
        for name, other in candidates
        if other != shape and abs(anatomy.n_params(other, positions=False) / wanted - 1) <= 0.08
    ]
    return min(
        fitting,
        default=None,
        key=lambda item: (
            round(abs(math.log(item[1].n_embd / item[1].n_layer / 64)), 1),
            abs(anatomy.n_params(item[1], positions=False) - wanted),
        ),
    )


@check("param_count_mismatch", section=1)
def param_count_mismatch(
    evidence: Evidence, figures: Figures, config: ConfigFacts, gpu: Gpu | None
) -> Iterator[Finding]:
    """A comment or the run's name claims another size than the shape gives."""
    shape = figures.shape
    if shape is None or figures.parameters is None:
        return
    any_vocabulary = (2, LARGEST_VOCABULARY) if "vocab_size" in figures.assumed else ()
    claims = claimed_sizes(figures)
    wrong = [claim for claim in claims if not agrees(claim.value, shape, any_vocabulary)]
    if not wrong:
        return
    # A name, or a comment beside one that has it right, may speak of another model.
    doubtful = len(wrong) < len(claims) or all(claim.hint for claim in wrong)
    wrong.sort(key=lambda claim: claim.hint)
    claimed, size = wrong[0].value, figures.parameters
    pretrained = config.get("init_from") in PRETRAINED  # whose shape is not to be changed
    change = None if pretrained else single_change(shape, claimed)
    if change is not None and not _fits(change[1], figures, gpu):
        change = None
    formula = "L (12 C^2 + 2C) + C + V C" if shape.family == "gpt2" else f"A {shape.family} model"
    lines = figures.place("n_layer", "n_embd")
    if (logged := _log_says(evidence, figures)) is not None:
        lines.append(logged)
    yield Finding(
        check="param_count_mismatch",
        severity="warning" if doubtful else "critical",
        title=f"{millions(size)} parameters, not the {rounded(claimed)} that the {_source(wrong[0].seen[1])} claims",
        evidence=[claim.seen for claim in wrong] + lines,
        explanation=f"{formula} with n_layer {shape.n_layer}, n_embd {shape.n_embd}, "
        f"vocabulary {shape.vocab_size:,} is {size:,} parameters "
        f"({'head tied, ' if shape.tied_head else ''}excluding position embeddings): "
        f"{size / claimed:.0%} of what was meant. "
        f"{_consequences(figures, shape, change[1], gpu) if change else ''}".strip(),
        advice=_advice(change, _geometry(figures, change[1], gpu) if change else "", gpu)
        + (" Nothing, if it speaks of another model." if doubtful else ""),
        cost=0.0 if doubtful else 1.0,
        cost_text="" if doubtful else figures.hours() + " on another model than was meant",
        confidence="possible" if doubtful else "certain",
        regardless_of=("vocab_size",),  # none gives the size that is claimed
    )


@check("unknown_settings", section=1)
def unknown_settings(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """Settings that nanoGPT does not have and that may change the model: its size and FLOPs are then unknown."""
    names = config.foreign_model
    if not names:
        return
    yield Finding(
        check="unknown_settings",
        severity="info",
        title=f"nanoGPT has no setting {', '.join(names[:6])}: the model is a fork's, its size is not known",
        evidence=figures.place(*names[:6]),
        explanation="What they do to the model is not in these files. So the doctor judges neither its size nor its FLOPs, "
        "memory and tokens per parameter"
        + (", and takes the number of parameters from the log or checkpoint." if figures.parameters else "."),
        advice="Nothing, if train.py reads them. The first lines of the run's log count the parameters: give it, too.",
    )


def _fits(shape: Shape, figures: Figures, gpu: Gpu | None) -> bool:
    """Whether a shape fits the card in some micro-batch of the run's; True where that cannot be told."""
    return gpu is None or not figures.config.get("batch_size") or fitting_geometry(shape, figures, gpu) is not None


def _source(line: str) -> str:
    return "comment" if line.lstrip().startswith("#") else "config"


def _log_says(evidence: Evidence, figures: Figures) -> tuple[Place, str] | None:
    """What the log says of the size: nanoGPT's own count, or the FLOPs behind its first mfu."""
    log = evidence.log
    if log is None:
        return None
    if counted := log.all("parameters"):
        return counted[-1].place, counted[-1].text
    if figures.flops_per_token_logged is None or figures.flops_per_token is None or figures.gpus != 1:
        return None
    if abs(figures.flops_per_token_logged / figures.flops_per_token - 1) > 0.05:
        return None
    place, seen = log.first_mfu()
    return (
        place,
        f"the log agrees: {seen} is {figures.flops_per_token_logged / 1e6:.1f} MFLOP per token; this shape "
        f"has {figures.flops_per_token / 1e6:.1f}",
    )


def _consequences(figures: Figures, shape: Shape, other: Shape, gpu: Gpu | None) -> str:
    """What the change does to memory and time."""
    size, before = anatomy.n_params(other, positions=False), anatomy.n_params(shape, positions=False)
    work = flops.palm(other) / flops.palm(shape)
    text = (
        f"The change gives {millions(size)}. Memory: weights, gradients and AdamW's moments grow from "
        f"{before * ADAM_BYTES / 1e9:.2f} to {gigabytes(size * ADAM_BYTES, 2)}"
    )
    batch = figures.config.get("batch_size")
    now, then = (bytes_needed(s, batch, figures) if batch else None for s in (shape, other))
    if now and then:
        text += f", all together from {now / 1e9:.1f} to {gigabytes(then)} at micro-batch {batch} (fastgpt.plan's "
        text += f"prediction; the {gpu.name} has {usable_vram(gpu) / 1e9:.1f} to give)" if gpu else "prediction)"
    text += f". Time: {work:.2f} times the FLOPs per token"
    if figures.steady_ms_per_iter:
        text += f", {figures.steady_ms_per_iter * work / 1e3:.1f} s per step at the present MFU (a projection)"
    ran = scaling.LARGE
    if other == replace(ran.shape, n_head=other.n_head) and figures.tokens_per_step == ran.tokens_per_step:
        text += f"; measured on an RTX 4070 with nanoGPT: {ran.steady_ms / 1e3:.2f} s, micro-batch 8 x 64 ({ran.log})"
    return text + "."


def _geometry(figures: Figures, shape: Shape, gpu: Gpu | None) -> str:
    """Lines for the micro-batch, where the present one would not fit the larger model."""
    geometry = fitting_geometry(shape, figures, gpu) if gpu else None
    return (
        "" if geometry is None or geometry[0] == figures.config.get("batch_size") else geometry_lines(geometry) + "\n"
    )


def _advice(change: tuple[str, Shape] | None, batch: str, gpu: Gpu | None) -> str:
    if change is None:
        card = f" and fits the {gpu.name}" if gpu else ""
        return f"Correct the comment or the name: no single change of n_embd or n_layer gives the size it claims{card}."
    name, shape = change
    gives = millions(anatomy.n_params(shape, positions=False))
    return (
        f"{name} = {getattr(shape, name)}    # gives {gives}\n{batch}"
        "in a new out_dir and with init_from = 'scratch' (a resumed nanoGPT run silently keeps the old shape); if the "
        "small model was meant, correct the comment and the run's name."
    )


@check("tokens_per_parameter", section=2)
def tokens_per_parameter(
    evidence: Evidence, figures: Figures, config: ConfigFacts, gpu: Gpu | None
) -> Iterator[Finding]:
    """Far more, or far fewer, tokens than Chinchilla's 20 per parameter."""
    ratio, size, tokens = figures.tokens_per_parameter, figures.parameters, figures.seen()
    if ratio is None or size is None or tokens is None or not scaling.in_range(figures.shape, size):
        return
    many = ratio > MANY
    if not many:  # a run that is not over yet is judged by what it will see
        tokens = max(tokens, figures.tokens_planned or 0)
        if not figures.tokens_planned or tokens >= FEW * size:
            return
    shown, log = tokens / size, evidence.log
    seen = figures.place("max_iters", "n_layer", "n_embd")
    if many:
        steps = figures.steps_seen if figures.tokens_seen is not None else config.get("max_iters")
        explanation = (
            f"{steps:,} steps x {figures.tokens_per_step:,} = {_billions(tokens)} tokens for {millions(size)} parameters: "
            f"{ratio:.0f} per parameter, {ratio / scaling.TOKENS_PER_PARAMETER:.1f} times Chinchilla's 20. "
            "20 says how to split compute between size and tokens, not where to stop: a small model goes on improving, "
            "and is cheaper to use. "
        )
        if log is not None:
            if figures.steps_seen is not None:
                seen.insert(0, (_last_line(log), f"step {figures.steps_seen:,}"))
            explanation += _where_it_pays(log)
    else:
        explanation = (
            f"The run is planned for {_ratio(shown)} tokens per parameter; Chinchilla's compute-optimal split is about 20. "
            "A model that is smaller for its tokens, or more tokens, would end lower. "
        )
    best = None
    if figures.shape is not None:
        table, best = _same_compute(figures, figures.shape, tokens, gpu)
        explanation += table
    times = (
        f"{shown / 20:.1f} times"
        if shown >= 20
        else f"{np.format_float_positional(5 * shown, 2, fractional=False, trim='-')}% of"
    )
    waste = _waste(figures, best, tokens)
    yield Finding(
        check="many" if many else "few",
        severity="warning",
        title=f"{_ratio(shown)} tokens per parameter: {times} Chinchilla's 20",
        evidence=seen,
        explanation=explanation.strip(),
        advice=_size_advice(figures, best, gpu, many),
        confidence="likely",
        cost=waste,
        cost_text=figures.hours(waste) + " could have been saved for the same loss (fit)" if best else "",
    )


def _billions(tokens: float) -> str:
    return f"{tokens / 1e9:.2f}B" if 1e9 <= tokens < 1e12 else rounded(tokens)


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else np.format_float_positional(value, 3, fractional=False, trim="-")


def _last_line(log: LogFacts) -> Place:
    last = max((series for series in (log.steps, log.evals) if len(series)), key=lambda series: int(series.step[-1]))
    return log.place(last.line[-1])


def _where_it_pays(log: LogFacts) -> str:
    """Fall of the validation loss per quarter of the run, each point a mean of three evaluations."""
    val, step = log.evals.val, log.evals.step
    good = np.isfinite(val)
    val, step = val[good], step[good]
    if len(val) < 12:
        return ""
    smooth = np.convolve(val, np.ones(3) / 3, "valid")
    at = [float(np.interp(q * step[-1], step[1:-1], smooth)) for q in (0.25, 0.5, 0.75, 1.0)]
    falls = [before - after for before, after in itertools.pairwise(at)]
    return (
        "Where the curve still pays: the second, third and last quarter of the steps lowered val by "
        + ", ".join(f"{fall:.3f}" for fall in falls)
        + " nat (a decaying learning rate included). "
    )


def _same_compute(figures: Figures, shape: Shape, tokens: float, gpu: Gpu | None) -> tuple[str, scaling.Offer | None]:
    """The table of what the same compute buys, and of what fits the card the offer with the lowest loss of Hoffmann's fit."""
    compute = tokens * flops.palm(shape)
    offers = [
        offer
        for offer in scaling.offers(shape, compute)
        if offer.parameters == figures.parameters
        or (
            scaling.in_range(offer.shape, offer.parameters) and offer.tokens > offer.parameters / 2
        )  # where the fits know something
    ]
    fitting = [o for o in offers if o.parameters == figures.parameters or _fits(o.shape, figures, gpu)]
    best = min(fitting, key=lambda offer: offer.hoffmann)
    rows = [
        f"  {millions(o.parameters):>8} on {rounded(o.tokens):>5} ({_ratio(o.tokens / o.parameters):>6} each)  "
        f"{o.hoffmann:.3f}  {o.besiroglu:.3f}" + ("  <- this" if o.parameters == figures.parameters else "")
        for o in offers
    ]
    text = f"The same {compute:.2e} FLOP at other sizes (tokens for each parameter; loss by the fit of Hoffmann et al. "
    text += "2022, and by that of Besiroglu et al. 2024):\n"
    text += "\n".join(rows) + f"\n{scaling.CAVEAT}"
    if "fineweb" in str(figures.config.get("dataset", "")).lower() and shape.block_size == 1024:
        text += _measured(figures, shape, compute)
    return text, best if best.parameters != figures.parameters else None


def _measured(figures: Figures, shape: Shape, compute: float) -> str:
    """What a run of another size measured on this data, at the same compute."""
    ran = scaling.LARGE
    at = ran.at_compute(compute)
    if at is None or figures.parameters == ran.parameters:
        return ""
    last = max(ran.val)
    text = f"\nMeasured on FineWeb ({ran.log}): {millions(ran.parameters)} reached val {at[1]:.4f} at step {at[0]:,}"
    text += " with this compute" if at[0] < last else " (its last)"
    if figures.last_val is not None:
        text += f", against {figures.last_val:.4f} here"
    if at[0] != last:
        text += f", and {ran.val[last]:.4f} at step {last:,}, its learning rate still above its floor"
    return text + "."


def _waste(figures: Figures, best: scaling.Offer | None, tokens: float) -> float:
    """Share of the compute without which the better size, by Hoffmann's fit, ends at this run's loss."""
    if best is None or figures.parameters is None or figures.shape is None:
        return 0.0
    fit = scaling.HOFFMANN
    needed = fit.tokens_for(best.parameters, fit.loss(figures.parameters, tokens))
    if needed is None:
        return 0.0
    return max(0.0, 1 - needed * flops.palm(best.shape) / (tokens * flops.palm(figures.shape)))


def _size_advice(figures: Figures, best: scaling.Offer | None, gpu: Gpu | None, many: bool) -> str:
    if not many and (best is None or figures.tokens_per_step is None or best.parameters > (figures.parameters or 0)):
        return "More tokens (a larger max_iters), or a smaller model."
    if best is None or figures.tokens_per_step is None:
        return "Nothing, if the model has to be this small; otherwise a larger one that fits the card, on fewer tokens."
    s, steps = best.shape, round(best.tokens / figures.tokens_per_step)
    decay = "" if figures.config.get("decay_lr") is False else f"lr_decay_iters = {steps}\n"
    return (
        f"n_layer = {s.n_layer}\nn_head = {s.n_head}\nn_embd = {s.n_embd}\n{_geometry(figures, s, gpu)}max_iters = "
        f"{steps}\n{decay}"
        "for the same compute, unless the model has to be small where it is used."
    )
