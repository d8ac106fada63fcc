"""How long a recipe takes to a validation loss: the tokens that public runs needed, by the projected tokens per second.

bench.recipe, the planner and the doctor read it here. The target is FineWeb validation loss 3.28, which GPT-2 124M reaches
after 10 billion tokens (llm.c's replication). No run of this package has reached it yet, so hours rest on two things that were
not measured here: tokens are other people's, with other code, and the speed is a projection. Details: docs/recipe.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_124M, Shape
from fastgpt.common import UserError, rounded
from fastgpt.config import load_preset
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.projection import Projection, project

TARGET = "FineWeb loss 3.28"


@dataclass(frozen=True)
class Factor:
    """One step of the way from GPT-2's recipe to today's: what changed, and the tokens (in billions) to the target with it."""

    change: str
    billions: float
    source: str
    ours: str
    """What of it --preset modern-124m has."""


FACTORS = (
    Factor("GPT-2, AdamW at 6e-4, cosine", 10.0, "llm.c's replication, record 1", "--preset gpt2-124m"),
    Factor("learning rate tuned, rotary positions", 5.0, "record 2", "yes"),
    Factor("Muon for the matrices of the blocks", 3.25, "record 4", "yes"),
    Factor("ReLU^2, QK-norm, projections that begin at zero, RMS norm", 2.67, "record 5", "yes"),
    Factor("a head of its own", 2.40, "record 8", "yes"),
    Factor(
        "value residual, embedding mixed into every block, Muon's momentum warmed up, capped logits",
        1.68,
        "record 9",
        "yes, with value embeddings for the value residual",
    ),
    Factor("U-net skips, learning rates doubled", 1.57, "record 11", "the rates"),
    Factor("one long sequence (64K), documents masked, window of 1,024", 0.98, "record 12", "4,096, same window"),
    Factor("value embeddings", 0.80, "record 14", "yes, on every other block"),
)
"""Models of 124M parameters, 524,288 tokens per step, each on top of the one before: modded-nanogpt (Jordan et al. 2024)."""


@dataclass(frozen=True)
class Recipe:
    """A preset, and the tokens after which a model trained as it says has the target: fewest, central and most."""

    preset: str
    tokens: tuple[float, float, float]
    why: str


GPT2 = Recipe("gpt2-124m", (10.0e9, 10.0e9, 10.0e9), "llm.c's replication of GPT-2 124M, record 1 of modded-nanogpt")
MODERN = Recipe(
    "modern-124m",
    (0.80e9, 0.98e9, 1.57e9),
    "central: record 12, with its window but a sequence 16 times as long; fewest: record 14, which adds value "
    "embeddings, as this preset does; most: record 11, as if long sequences and value embeddings bought nothing here",
)


@dataclass(frozen=True)
class Hours:
    """Projected hours to the target. ``low``: the fewest tokens at the highest projected speed; ``high`` the other way."""

    low: float
    central: float
    high: float

    def __str__(self) -> str:
        form = ".1f" if self.high < 20 else ".0f"
        return f"{self.central:{form}} hours ({self.low:{form}} to {self.high:{form}})"

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in vars(self).items()}


@lru_cache
def step(recipe: Recipe, gpu: Gpu, precision: str = "bf16") -> Projection:
    """The preset's own step on this repository's kernels. Raises UserError where ``gpu`` lacks the arithmetic."""
    config = load_preset(recipe.preset, "cuda")
    return project(
        Shape.of(config.model),
        gpu,
        precision=precision,
        micro_batch=config.data.batch_size,
        tokens_per_step=config.tokens_per_step,
        dropout=config.model.dropout,
        optimizer=config.optim.optimizer,
    )


def tokens_per_second(recipe: Recipe, gpu: Gpu, precision: str = "bf16") -> tuple[float, float, float]:
    """Low, central and high. Raises UserError as ``step`` does."""
    speed = step(recipe, gpu, precision)
    return speed.tokens_per_second_low, speed.tokens_per_second, speed.tokens_per_second_high


def hours(recipe: Recipe, gpu: Gpu, precision: str = "bf16") -> Hours:
    """Raises UserError as ``tokens_per_second`` does."""
    slow, central, fast = tokens_per_second(recipe, gpu, precision)
    fewest, tokens, most = recipe.tokens
    return Hours(fewest / fast / 3600, tokens / central / 3600, most / slow / 3600)


def comparison(shape: Shape, gpu: Gpu | None) -> str | None:
    """One sentence for the owner of a GPT-2 of about 124M parameters, or of the modern preset: what the same card needs with
    either recipe. None for other models, and for a card without a projection."""
    size, wanted = (anatomy.n_params(each, positions=False) for each in (shape, GPT2_124M))
    modern = shape == Shape.of(load_preset(MODERN.preset, "cuda").model)
    if gpu is None or not (modern or (shape.family == "gpt2" and abs(size / wanted - 1) <= 0.12)):
        return None
    try:
        old, new = hours(GPT2, gpu), hours(MODERN, gpu)
    except UserError:  # no bf16, or an arithmetic that it has no figures for
        return None
    if modern:
        return (
            f"{TARGET} takes --preset {MODERN.preset} {rounded(MODERN.tokens[1])} tokens, {new} on this card; GPT-2's recipe "
            f"takes {rounded(GPT2.tokens[1])} tokens, {old} (projected: docs/recipe.md)"
        )
    return (
        f"{TARGET} takes GPT-2's recipe {rounded(GPT2.tokens[1])} tokens, {old} on this card; the same card reaches it in "
        f"{new} with --preset {MODERN.preset} (projected: docs/recipe.md)"
    )
