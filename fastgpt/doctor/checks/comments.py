"""Claims that a config makes in prose, held against what its numbers give: sizes, batches, token budgets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastgpt import anatomy
from fastgpt.common import rounded
from fastgpt.doctor.evidence import ConfigFacts, Place, Setting
from fastgpt.doctor.figures import Figures, one_line
from fastgpt.doctor.findings import Finding, check

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
NUMBER = r"(?<![\w.,*])~?\s*(\d[\d,_]*(?:\.\d+)?)\s*([kmbt])?"
SIZE_IN_PROSE = re.compile(NUMBER + r"[- ]?(?:parameters?|params?|model)\b", re.IGNORECASE)
SIZE_IN_NAME = re.compile(r"(?:^|[-_ /.])(\d+(?:\.\d+)?)([mb])(?=$|[-_ /.])", re.IGNORECASE)
NOT_A_SIZE = re.compile(r"tok|data|fineweb|owt|openweb|pile|sample|corpus|edu", re.IGNORECASE)
"""What stands before a number of tokens in a run's name: fineweb-10B."""
TOKENS_IN_PROSE = re.compile(
    NUMBER
    + r"\s*tokens?\b(?!\s*(?:/|per)\s*s)|tokens?\s+(?:be|is|of|to|=|:)\s*~?\s*(\d[\d,_]*(?:\.\d+)?)\s*([kmbt])\b",
    re.IGNORECASE,
)
PRODUCT = re.compile(r"\d[\d_,]*(?:\s*[*x×]\s*\d[\d_,]*)+[^=\d]*=\s*~?(\d[\d_,.]*)\s*([kmb])?\b\s*(\w*)", re.IGNORECASE)
PER_STEP = re.compile(
    NUMBER + r"\s*tokens?\s*(?:/|per)\s*(?:optimi[sz]er\s+)?(?:step|iter|update|batch)", re.IGNORECASE
)
EFFECTIVE_BATCH = re.compile(r"effective batch(?: size)?\s*[:=]?\s*~?(\d[\d,_]*)(?![\d,_.]*\s*[*x×kmb])", re.IGNORECASE)
NAMES = ("wandb_run_name", "run_name", "out_dir", "out", "wandb_project")
OF_THIS_MODEL = re.compile(
    r"\W*(?:(?:an?|the|this|our|is|has|of|with|model|size|total|number|about|around|roughly|approx|ca|gpt-?2?|small|medium"
    r"|large)\b\W*)*",
    re.IGNORECASE,
)
"""All that may stand before a size in a comment that gives it as the config's own: "Model (~125M parameters)"."""
ANOTHER_MODEL = re.compile(
    r"teacher|distil|compar|baseline|reference|paper|\b(?:if|instead|like|than|then|vs|would|could|can|needs?|was|were)\b",
    re.IGNORECASE,
)
"""Words of one that speaks of another model, or of what could be."""


@dataclass(frozen=True)
class Claim:
    """A number that prose claims."""

    value: float
    setting: Setting
    """The line that does."""
    hint: bool
    """A name, which may be that of a project or a teacher, or a comment that speaks of another model: never certain."""

    @property
    def seen(self) -> tuple[Place, str]:
        return _seen(self.setting)


def amount(digits: str, unit: str | None) -> float | None:
    """The number; None for one that no run could have."""
    value = float(digits.replace(",", "").replace("_", "").rstrip(".")) * UNITS[(unit or "").lower()]
    return value if 1 <= value < 1e18 else None


def remarks(figures: Figures) -> list[tuple[str, Setting]]:
    """Every comment of the config, with the name of the setting on its line ("" for a line of its own)."""
    beside = [(name, setting) for name, setting in figures.config.settings.items() if setting.comment]
    return sorted([*beside, *(("", s) for s in figures.config.comments)], key=lambda item: item[1].place.line or 0)


def _seen(setting: Setting) -> tuple[Place, str]:
    return setting.place, one_line(setting.text or f"# {setting.comment.lstrip('# ')}")


def claimed_sizes(figures: Figures) -> list[Claim]:
    """Model sizes that comments and run names claim, in parameters."""
    claims = []
    for _, setting in remarks(figures):
        for match in SIZE_IN_PROSE.finditer(setting.comment):
            if match[2] and match[2].lower() in "mb" and (size := amount(match[1], match[2])):
                own = OF_THIS_MODEL.fullmatch(setting.comment[: match.start()])
                hint = own is None or ANOTHER_MODEL.search(setting.comment) is not None
                claims.append(Claim(size, setting, hint))
    for name in NAMES:
        named = figures.config.settings.get(name)
        if named is None or not isinstance(named.value, str):
            continue
        sizes = []
        for match in SIZE_IN_NAME.finditer(named.value):
            before, after = named.value[: match.start()], named.value[match.end() + 1 :]
            if NOT_A_SIZE.search(before[-12:]) or re.match("tok|data|sample", after, re.IGNORECASE):
                continue  # "fineweb-10B": tokens, not parameters
            sizes.append(amount(match[1], match[2]) or 0.0)
        planned, size = figures.tokens_planned or 0, min(sizes, default=0.0)  # of "124m-14B" the second is the tokens
        if size and abs(size - planned) > 0.25 * planned:  # "small-14B" of a run over 14B tokens
            claims.append(Claim(size, named, True))
    return claims


def agrees(claim: float, shape: anatomy.Shape, vocabularies: Sequence[int] = ()) -> bool:
    """Whether any usual way of counting gives the claimed size, within 12% (GPT-2 was published as 117M). ``vocabularies``: the
    least and the largest, where the shape's is not known."""
    low, high = (_counts(replace(shape, vocab_size=size)) for size in vocabularies or 2 * [shape.vocab_size])
    return any(0.88 * least <= claim <= 1.12 * most for least, most in zip(low, high))


def _counts(shape: anatomy.Shape) -> tuple[int, ...]:
    if shape.family != "gpt2":  # and by the size of the GPT-2 of its proportions, after which modern-124m is called
        named_after = anatomy.Shape(**{name: getattr(shape, name) for name in anatomy.SHAPE})
        return anatomy.n_params(shape, positions=False), anatomy.of(shape).block_weights, *_counts(named_after)
    return (
        anatomy.n_params(shape, positions=False),
        anatomy.n_params(shape),
        anatomy.n_params(shape) + anatomy.of(shape).head.weights,  # an untied head
        anatomy.of(shape).block_weights,  # without embeddings
    )


@check("schedule", section=9)
def tokens_per_step(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """A batch that a comment computes ("16 * 32 = 512 sequences") and the settings do not give."""
    tokens, block = figures.tokens_per_step, config.get("block_size")
    if tokens is None or block is None:
        return
    sequences, micro = tokens // block, config.get("batch_size") or 0
    for name, setting in remarks(figures):
        of_a_micro_step = (micro, micro * block) if re.search("micro", setting.comment, re.IGNORECASE) else ()
        right = {"sequences": (sequences,), "tokens": (tokens,), "": (sequences, tokens)}
        claims = _batch_claims(name, setting)
        if not claims or any(abs(v - n) <= 0.1 * n for unit, v in claims for n in (*right[unit], *of_a_micro_step)):
            continue
        unit, value = claims[0]
        yield Finding(
            check="tokens_per_step_comment",
            severity="warning",
            title=f"A comment says {value:,.0f} {unit or 'sequences or tokens'} per step; the settings give "
            f"{sequences:,} sequences, {tokens:,} tokens",
            evidence=[
                _seen(setting),
                *figures.place("batch_size", "gradient_accumulation_steps", "block_size"),
            ],
            explanation="Learning rate, warmup and max_iters were chosen for a batch. batch_size x "
            f"gradient_accumulation_steps is {sequences:,} sequences; times block_size {block:,} it is {tokens:,} "
            "tokens (in nanoGPT accumulation is over all GPUs together).",
            advice=_geometry(figures, value if unit == "sequences" else value / block),
            cost=min(1.0, abs(1 - (sequences if unit == "sequences" else tokens) / value)),
        )


def _batch_claims(name: str, setting: Setting) -> list[tuple[str, float]]:
    """("sequences" | "tokens" | "", number) for each number that a remark gives as a step's: where one of them is right, the
    others may be parts of it."""
    text = setting.comment
    claims: list[tuple[str, float | None]] = []
    if name in ("batch_size", "gradient_accumulation_steps") or re.search("batch", text, re.IGNORECASE):
        for product in PRODUCT.finditer(text):
            word = product[3].lower()
            unit = "tokens" if word.startswith("tok") else "sequences" if re.match("seq|sample|example", word) else ""
            claims.append((unit, amount(product[1], product[2])))
    claims += [("tokens", amount(match[1], match[2])) for match in PER_STEP.finditer(text)]
    if not claims:
        claims = [("", amount(match[1], "")) for match in EFFECTIVE_BATCH.finditer(text)]
    return [(unit, value) for unit, value in claims if value]


def _geometry(figures: Figures, sequences: float) -> str:
    batch = figures.config.get("batch_size")
    if batch and sequences >= batch and round(sequences) % batch == 0:
        return f"gradient_accumulation_steps = {round(sequences) // batch}\nor correct the comment."
    return "Correct the comment, or batch_size and gradient_accumulation_steps."


@check("schedule", section=9)
def token_budget(figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """A token budget that a comment claims ("~3B tokens seen") and max_iters does not give."""
    planned, per_step = figures.tokens_planned, figures.tokens_per_step
    if not planned or not per_step:
        return
    for name, setting in remarks(figures):
        about_run = name == "max_iters" or re.search(r"\b(seen|total|train(ing)? (for|on)|budget)\b", setting.comment)
        match = TOKENS_IN_PROSE.search(setting.comment)
        if not about_run or not match or PER_STEP.search(setting.comment) or not (match[2] or match[4]):
            continue
        claimed = amount(match[1] or match[3], match[2] or match[4])
        if claimed is None or abs(claimed / planned - 1) <= 0.25:
            continue
        steps = round(claimed / per_step)
        yield Finding(
            check="token_budget_comment",
            severity="warning",
            title=f"A comment says {match[0].strip()}; max_iters gives {rounded(planned)}",
            evidence=[_seen(setting), *([] if name == "max_iters" else figures.place("max_iters"))],
            explanation=f"max_iters {config.get('max_iters'):,} x {per_step:,} tokens per step = {planned:,} "
            f"tokens, {planned / claimed:.1f} times what the comment says.",
            advice=f"max_iters = {steps}\nlr_decay_iters = {steps}\nif {rounded(claimed)} tokens were meant; else "
            "correct the comment.",
            cost=max(0.0, 1 - claimed / planned),
            cost_text=figures.hours(1 - claimed / planned) + " more than meant" if claimed < planned else "",
        )
