"""Schedule, optimizer and shape: settings that contradict each other, or that the chip or the data do not like."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from fastgpt.common import rounded
from fastgpt.doctor.checks.comments import remarks
from fastgpt.doctor.evidence import ConfigFacts, Evidence, LogFacts
from fastgpt.doctor.figures import PRETRAINED, Figures, evaluation_interval, learning_rate
from fastgpt.doctor.findings import Confidence, Finding, check
from fastgpt.performance import flops


@check("schedule", section=8)
def warmup(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """A warmup that takes most of the run, or never ends."""
    warm, total = config.get("warmup_iters"), config.get("max_iters")
    if not warm or not total or warm <= total / 2 or not config.get("decay_lr", True):  # without it nothing warms up
        return
    never = warm >= total
    yield Finding(
        "warmup_too_long",
        "critical" if never else "warning",
        f"warmup_iters {warm:,} takes {'the whole' if never else 'most of the'} run: max_iters is {total:,}",
        figures.place("warmup_iters", "max_iters"),
        f"The rate rises until step {warm:,}"
        + (
            f"; the run ends at step {total:,} and never trains at the learning rate that was chosen."
            if never
            else ", and decays in what is left. Warmup is for the first few percent."
        ),
        f"warmup_iters = {max(1, min(2000, total // 20))}",
        cost=1.0 if never else 0.5,
        cost_text=figures.hours(min(1.0, warm / total)),
    )


@check("schedule", section=8)
def floor(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """min_lr above learning_rate: the "decay" is a rise."""
    low, high = config.get("min_lr"), config.get("learning_rate")
    if low is None or high is None or low <= high or not config.get("decay_lr", True):
        return
    default = "" if config.is_set("min_lr") else " (the default)"
    yield Finding(
        "min_lr_above_lr",
        "critical",
        f"min_lr {low:g}{default} is above learning_rate {high:g}: the rate rises from warmup to the end",
        figures.place("min_lr", "learning_rate"),
        "The cosine runs from learning_rate to min_lr, whichever is larger.",
        f"min_lr = {high / 10:g}",
        cost=1.0,
        cost_text=figures.hours(),
    )


@check("schedule", section=8)
def decay(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """A decay that ends well before the run, or is cut off by its end."""
    end, total = config.get("lr_decay_iters"), config.get("max_iters")
    if not end or not total or not config.get("decay_lr", True):
        return
    default = "" if config.is_set("lr_decay_iters") else " (the default)"
    if end < 0.9 * total:
        yield Finding(
            "decay_ends_early",
            "warning",
            f"The learning rate is at its floor for the last {1 - end / total:.0%} of the run: lr_decay_iters "
            f"{end:,}{default}, max_iters {total:,}",
            figures.place("lr_decay_iters", "max_iters"),
            "Steps at the floor change the model little. Decay and run end together in every recipe this comes from "
            "(Hoffmann et al. 2022: a decay that misses the end by more than 25% costs loss).",
            f"lr_decay_iters = {total}",
            cost=1 - end / total,
            cost_text=figures.hours(1 - end / total) + " at the floor",
        )
    elif end > 1.1 * total:
        last, peak = learning_rate(total, config), config.get("learning_rate")
        left = f" at {last:.2e}, {last / peak:.0%} of its peak" if last and peak else ""
        yield Finding(
            "decay_cut_off",
            "warning",
            f"The run ends before its decay does: lr_decay_iters {end:,}{default}, max_iters {total:,}",
            figures.place("lr_decay_iters", "max_iters"),
            f"The learning rate stops{left}. The last part of a decay brings the most: a schedule longer than the run "
            "ends at a higher loss (Hoffmann et al. 2022, appendix B).",
            f"lr_decay_iters = {total}",
            cost=0.2,
        )


@check("schedule", section=8)
def ranks(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """Accumulation that does not divide by the number of processes: nanoGPT stops with an assertion."""
    accumulate = config.get("gradient_accumulation_steps")
    names = ("world_size", "nproc_per_node", "ranks")
    name = next((name for name in names if config.get(name)), None)
    count = config.get(name) if name else None
    source = figures.place(name) if name else []
    if count is None:
        for _, setting in remarks(figures):
            if match := re.search(r"--nproc[-_]per[-_]node[= ](\d+)", setting.comment):
                count, source = int(match[1]), [(setting.place, setting.text or f"# {setting.comment}")]
    if count is None and (figures.gpus or 1) > 1:
        count = figures.gpus
    if not accumulate or not count or accumulate % count == 0:
        return
    yield Finding(
        "accumulation_not_divisible",
        "critical",
        f"gradient_accumulation_steps {accumulate} does not divide by {count} processes",
        source + figures.place("gradient_accumulation_steps"),
        "nanoGPT divides the accumulation among the ranks and asserts that nothing is left over: the run does not "
        "start.",
        f"gradient_accumulation_steps = {count * max(1, round(accumulate / count))}",
        cost=1.0,
    )


MUCH_EVALUATION = 0.05
"""Share of the time."""
SMALL_BATCH, LARGE_BATCH = 32_768, 262_144  # tokens per step
SHORT_MEMORY = 250_000  # tokens


@check("schedule", section=8)
def beta2(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """Adam's memory of squared gradients, in tokens: too short for tiny batches, needlessly long for large ones."""
    value, tokens, total = config.get("beta2"), figures.tokens_per_step, config.get("max_iters")
    if not value or value >= 1 or tokens is None or not config.is_set("beta2"):
        return
    half_life = math.log(0.5) / math.log(value)
    memory = f"{half_life:.0f} steps, {rounded(half_life * tokens)} tokens"
    if tokens >= LARGE_BATCH and value >= 0.99:
        better = 0.95
        title = f"with {tokens:,} tokens per step: 0.95 is usual for batches this large"
        why = (
            "GPT-3 and nanoGPT's GPT-2 take 0.95 at half a million tokens; 0.99 is nanoGPT's for tiny batches. A long "
            "memory is slow to notice that gradients grew, and makes loss spikes likelier. What it costs here is not "
            "known."
        )
    elif tokens < SMALL_BATCH and half_life * tokens < SHORT_MEMORY and (total or 0) > 2000:
        better = 0.99 if value < 0.99 else 0.999
        title = f"with only {tokens:,} tokens per step: a longer memory is usual for batches this small"
        why = "With few tokens per step the squared gradients are noisy, and so are the steps."
    else:
        return
    why = f"beta2 {value:g} halves a squared gradient's weight in {memory}. {why}"
    title, advice = f"beta2 {value:g} {title}", f"beta2 = {better}"
    yield Finding("beta2_for_batch", "info", title, figures.place("beta2"), why, advice, "possible")


@check("schedule", section=8)
def weight_decay(log: LogFacts, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """Weight decay on norms: nanoGPT says how many tensors it leaves alone."""
    wrong = [note for note in log.all("no_decay") if re.search(r"non-decayed parameter tensors: 0\b", note.text)]
    if not wrong or not config.get("weight_decay", 0):
        return
    yield Finding(
        "weight_decay_on_norms",
        "warning",
        "Weight decay is applied to every tensor, norms and biases too",
        [(wrong[0].place, wrong[0].text), *figures.place("weight_decay")],
        "Decay pulls the gains of the norms to 0, against what they are for; GPT-2 and GPT-3 recipes decay matrices and "
        "embeddings only.",
        "Put parameters with fewer than two dimensions into a group with weight_decay = 0.0.",
        cost=0.02,
    )


@check("schedule", section=8)
def vocabulary(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """A large vocabulary that is not a multiple of 64."""
    shape = figures.shape
    if shape is None or shape.vocab_size % 64 == 0 or shape.vocab_size < 1024:
        return
    if config.get("init_from") in PRETRAINED:  # it is that of the weights
        return
    size, padded = shape.vocab_size, 64 * math.ceil(shape.vocab_size / 64)
    head = 6 * size * shape.n_embd / flops.palm(shape)
    yield Finding(
        "vocabulary_not_padded",
        "warning",
        f"vocab_size {size:,} is not a multiple of 64: the head's matmuls run off the fast path",
        figures.place("vocab_size"),
        f"The head is {head:.0%} of this model's FLOPs, and rows of {size:,} bf16 values are not aligned to 16 bytes, "
        f"which tensor-core kernels want. {padded - size} rows more cost {(padded - size) * shape.n_embd:,} "
        "parameters that no token uses.",
        f"vocab_size = {padded}",
        confidence="likely",
        cost=0.1 * head,
    )


@check("schedule", section=8)
def head_dimension(figures: Figures) -> Iterator[Finding]:
    """Heads whose dimension attention kernels pad, or that are too small to fill a matmul instruction."""
    shape = figures.shape
    if shape is None or shape.n_embd % shape.n_head:
        return
    width, heads, D = shape.n_embd, shape.n_head, shape.n_embd // shape.n_head
    padded = max(16, 2 ** math.ceil(math.log2(D)))
    if padded / D < 1.2 and D >= 16:
        return
    fitting = [h for h in range(1, width + 1) if width % h == 0 and width // h in (64, 128)]
    better = min(fitting, key=lambda h: abs(h - heads), default=None)
    yield Finding(
        "head_dimension",
        "warning",
        f"Head dimension {D} ({width} / {heads}): attention kernels compute {padded}, {1 - D / padded:.0%} of it for "
        "nothing",
        figures.place("n_head", "n_embd"),
        "Flash attention works on heads of 16, 32, 64, 128 or 256 (some kernels also 96): others are padded to the "
        "next. It concerns attention only, not the linear layers.",
        f"n_head = {better}    # head dimension {width // better}" if better else "An n_embd that is n_head x 64.",
        confidence="likely",
        cost=(1 - D / padded) * 12 * shape.n_layer * width * shape.block_size / flops.palm(shape) / 2,
    )


@check("schedule", section=8)
def heads_divide_the_width(figures: Figures) -> Iterator[Finding]:
    """Heads that do not divide the width."""
    shape = figures.shape_written  # the vocabulary, which may be assumed, has no part in this
    if shape is None or shape.n_embd % shape.n_head == 0:
        return
    width, heads = shape.n_embd, shape.n_head
    near = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: (abs(h - heads), h))
    yield Finding(
        "heads_do_not_divide",
        "critical",
        f"n_embd {width} is not a multiple of n_head {heads}",
        figures.place("n_head", "n_embd"),
        "Each head takes an equal part of the width: the model cannot be built.",
        f"n_head = {near}",
        cost=1.0,
    )


@check("schedule", section=8)
def block_size(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """A context longer than the data."""
    block, corpus = config.get("block_size"), figures.corpus_tokens
    if not block or corpus is None or block < corpus:
        return
    yield Finding(
        "block_size_beyond_data",
        "critical",
        f"block_size {block:,} is beyond the data: the corpus has {corpus:,} tokens",
        figures.place("block_size", "dataset"),
        "There is not one whole window in it: nanoGPT fails when it draws the first batch.",
        f"block_size = {2 ** int(math.log2(max(2, corpus // 16)))}",
        cost=1.0,
    )


@check("curve", section=10)
def evaluation_time(evidence: Evidence, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """More than a twentieth of the time spent on evaluations: as measured, else as counted from the config."""
    share, how = figures.evaluation_share, "measured in the log"
    confidence: Confidence = "certain"
    if share is None:
        share, confidence = counted_share(figures, evidence.log), "likely"
        each = "both splits" if config.kind == "nanogpt" else "the validation split"
        how = f"forward passes of {each} at a third of a training step's FLOPs"
    if share is None or share <= MUCH_EVALUATION:
        return
    interval = evaluation_interval(config, evidence.log)
    batches, total = config.get("eval_iters"), config.get("max_iters")
    fewer = (
        (1 / MUCH_EVALUATION - 1) * share / (1 - share) if share < 1 else math.inf
    )  # by which evaluations have to shrink
    longer = _round_up((interval or 1) * fewer) if fewer < 1e9 else 0
    advice = f"eval_interval = {longer}"
    if not longer or (total and longer > total / 2):  # too few would be left of them
        advice = f"eval_iters = {max(1, int(batches / fewer))}" if batches else "Fewer batches per evaluation."
    yield Finding(
        "evaluation_time",
        "warning",
        f"{share:.0%} of the time goes into evaluations ({share * 24 * 60:.0f} minutes per day)",
        figures.place("eval_interval", "eval_iters"),
        f"One every {interval} steps" + (f", {batches} batches a split" if batches else "") + f" ({how}).",
        advice,
        confidence,
        share,
        figures.hours(share),
    )


def _round_up(number: float) -> int:
    """The next number of two digits and zeros."""
    unit = 10 ** max(0, int(math.log10(max(number, 1.0))) - 1)
    return math.ceil(number / unit) * unit


def counted_share(figures: Figures, log: LogFacts | None) -> float | None:
    """Share of the time that evaluations will take, by their FLOPs; None where there is a log, or a setting is missing."""
    interval, iters, batch = (figures.config.get(name) for name in ("eval_interval", "eval_iters", "batch_size"))
    block, tokens = figures.config.get("block_size"), figures.tokens_per_step
    if log is not None or not (interval and iters and batch and block and tokens):
        return None
    splits = 2 if figures.config.kind == "nanogpt" else 1
    extra = splits * iters * batch * block / 3
    return extra / (extra + interval * tokens)
