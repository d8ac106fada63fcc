"""What a training budget buys: two published fits of loss against size and data, and one run that was measured.

Both fits have the form L(N, D) = E + A / N^alpha + B / D^beta (nats per token; N parameters, D training tokens) and come
from the same experiments. Hoffmann et al. 2022 ("Chinchilla", arXiv 2203.15556), approach 3; Besiroglu et al. 2024 (arXiv
2404.10102) fitted their data again and found other coefficients and far wider errors. They speak of DeepMind's data and
tokeniser: use the *differences* between sizes, not the losses, and mind that they are extrapolations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.performance import flops

TOKENS_PER_PARAMETER = 20.0
"""Hoffmann et al. 2022, table 3, for models of this size: how to split compute, not when to stop."""


def in_range(shape: Shape | None, parameters: int) -> bool:
    """Whether the fits speak of such a model: not of bytes and characters, nor of models below 10M parameters, nor of those in
    which much of the parameters is looked up (value embeddings)."""
    return parameters >= 10_000_000 and (shape is None or (shape.vocab_size >= 1024 and shape.family == "gpt2"))


@dataclass(frozen=True)
class Fit:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    name: str
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def tokens_for(self, parameters: float, loss: float) -> float | None:
        """Tokens after which a model of this size has this loss; None if it never does."""
        rest = loss - self.E - self.A / parameters**self.alpha
        return (self.B / rest) ** (1 / self.beta) if rest > 0 else None


HOFFMANN = Fit("Hoffmann et al. 2022", 1.69, 406.4, 0.34, 410.7, 0.28)
BESIROGLU = Fit("Besiroglu et al. 2024", 1.8172, 482.01, 0.3478, 2085.43, 0.3658)

CAVEAT = (
    "The fits are of other data and another tokeniser: their differences carry over, their losses do not, and the "
    "re-fit of the same experiments (Besiroglu et al. 2024) moves them by a few hundredths of a nat."
)


@dataclass(frozen=True)
class Offer:
    """One size at a given compute."""

    shape: Shape
    parameters: int
    tokens: float
    hoffmann: float
    besiroglu: float


def offers(shape: Shape, compute: float) -> list[Offer]:
    """What ``compute`` FLOP (palm's formula) buy at ``shape`` and at GPT-2's usual sizes, smallest first."""
    found: dict[int, Offer] = {}
    sizes = [(6, 6, 384), (12, 6, 384), (12, 12, 768), (24, 16, 1024), (36, 20, 1280)]
    for layers, heads, width in [(shape.n_layer, shape.n_head, shape.n_embd), *sizes]:
        other = replace(shape, n_layer=layers, n_head=heads, n_embd=width)
        size, tokens = anatomy.n_params(other, positions=False), compute / flops.palm(other)
        found.setdefault(size, Offer(other, size, tokens, HOFFMANN.loss(size, tokens), BESIROGLU.loss(size, tokens)))
    return sorted(found.values(), key=lambda offer: offer.parameters)


@dataclass(frozen=True)
class Measured:
    """A run whose log is in docs/rtx4070-runs: what fits and claims are held against."""

    name: str
    shape: Shape
    gpu: str
    dropout: float
    tokens_per_step: int
    steady_ms: float  # median of iterations without an evaluation
    val: dict[int, float]  # step -> nats
    val_minus_train: tuple[float, float]  # mean and standard error from step 3,000 on
    iter_minus_train: tuple[float, float]
    log: str

    @property
    def parameters(self) -> int:
        return anatomy.n_params(self.shape, positions=False)

    def at_compute(self, compute: float) -> tuple[int, float] | None:
        """Last evaluated step whose FLOPs so far do not exceed ``compute``, and its loss."""
        per_step = self.tokens_per_step * flops.palm(self.shape)
        reached = [step for step in self.val if step * per_step <= compute * 1.005]
        return (max(reached), self.val[max(reached)]) if reached else None


SMALL = Measured(
    name="the 40.56M run",
    shape=GPT2_40M,
    gpu="NVIDIA GeForce RTX 4070",
    dropout=0.1,
    tokens_per_step=524288,
    steady_ms=3909.8,
    val={5000: 3.7625, 10000: 3.6567, 14500: 3.5696, 20000: 3.5228},
    val_minus_train=(-0.0659, 0.0022),
    iter_minus_train=(0.0923, 0.0102),
    log="docs/rtx4070-runs/nanogpt-40m-fineweb.log",
)
_LARGE_VAL = (4.3850, 3.8626, 3.6867, 3.5957, 3.4873, 3.4676, 3.4243, 3.4081, 3.3741, 3.3581, 3.3366)
LARGE = Measured(
    name="the 123.59M run",
    shape=GPT2_124M,
    gpu="NVIDIA GeForce RTX 4070",
    dropout=0.0,
    tokens_per_step=524288,
    steady_ms=9349.8,
    val=dict(zip(range(1000, 11001, 1000), _LARGE_VAL)),
    val_minus_train=(-0.0424, 0.0035),
    iter_minus_train=(-0.0261, 0.0220),
    log="docs/rtx4070-runs/nanogpt-124m-fineweb.log",
)
