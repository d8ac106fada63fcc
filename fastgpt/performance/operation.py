"""One operation of a training step: what it computes and moves, and how often a step executes it. And what of a step decides
which operations there are. performance/operations.py lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from fastgpt import anatomy
from fastgpt.anatomy import Shape

Kind = Literal["matmul", "attention", "memory"]
Per = Literal["micro-batch", "accumulation", "step"]


@dataclass(frozen=True)
class PerScore:
    """What an attention kernel executes for one score beside its products."""

    rows: int
    """Queries or keys that one program owns."""
    instructions: float
    """Without those of products and exponentials."""
    dropout: float
    """More of them with dropout: a share of a Philox call, compare, select."""
    masked: float
    """More of them in a masked tile."""
    shared: float
    """Bytes through shared memory for each column of a head."""
    shared_once: float = 0.0
    """The same, whatever the columns."""
    exponentials: float = 1.0
    products: float = 1.0
    """Matrix products computed, over those needed: above 1 where warps repeat each other's."""


@dataclass(frozen=True)
class Scores:
    """What attention computes besides its products. A block is a program: a tile of queries or keys of one head."""

    blocks: tuple[int, ...]
    """Scores, elements of S = Q K^T that get an exponential, of each block of one head, in the order of launch."""
    heads: int
    masked: int
    """Of one head's scores: those in tiles that the causal mask or a window's edge cuts."""
    cost: PerScore
    dropout: bool
    columns: int
    turns: bool = False
    """All heads launch their first block, then their second (fused_attn.py); else one head after another."""
    pairs: bool = False
    """Two blocks share an SM."""

    @property
    def number(self) -> int:
        return self.heads * sum(self.blocks)


@dataclass(frozen=True)
class Operation:
    """One execution of one operation, and how often a step executes it."""

    name: str
    group: str
    """One of bench/steps/trace.py's names; casts, residual adds outside the norm and everything else that a fused step does not
    need are "pointwise"."""
    kind: Kind
    flops: int
    bytes: int  # moved by one execution, every read and write counted
    launches: int  # kernels of one execution
    count: int = 1  # executions per micro-batch, per accumulation (all micro-batches but the first) or per step
    per: Per = "micro-batch"
    fresh: int = 0  # of ``bytes``: reads of what the kernel just before has written, and L2 may still hold
    mnk: tuple[int, int, int] | None = None  # of a matmul: an (m, k) by a (k, n) matrix
    scores: Scores | None = None  # of attention
    summed_in_fp16: float = 0.0  # of attention: share of its FLOPs
    fast: bool = True  # of a matmul: in the arithmetic of the --precision; else in plain 16 bits
    own: bool = False  # a kernel of this repository, not of a library or of Inductor

    def executions(self, grad_accum: int) -> int:
        """How often a step of ``grad_accum`` micro-batches executes this."""
        return self.count * {"micro-batch": grad_accum, "accumulation": grad_accum - 1, "step": 1}[self.per]


@dataclass(frozen=True)
class Fusions:
    """Which fusions of the ``triton`` variant are on: as the training loop runs it on one GPU, unless said otherwise. Off,
    an operation is PyTorch's own, as in ``eager``. bench.ablation switches them off one by one."""

    attention: bool = True
    """Flash attention on packed qkv; else torch's flash attention and the packing of its gradients."""
    norms: bool = True
    """Residual add and norm in one pass."""
    weight_gradients: bool = True
    """Weight gradients written in fp32 by the matmul; else in 16 bits, cast by a pass."""
    loss: bool = True
    """Head and loss in chunks; else whole logits, also in fp32."""
    optimizer: bool = True
    """Norm, clip, update and working copies in three launches; else torch's fused AdamW and clip_grad_norm_."""
    working_copy: bool = True
    """16-bit weights kept from step to step; else cast in every micro-batch."""
    in_place: bool = True
    """Weight gradients of later micro-batches added by the matmul that forms them; else autograd adds them."""
    embedding: bool = True
    """Sum of the rows in one pass, and with ``in_place`` their gradients added to the rows that occur."""
    epilogues: bool = False
    """GELU and its gradient in the epilogues of the matmuls, which are then Triton's: off until measured beside cuBLAS."""


AS_SHIPPED = Fusions()
NONE = Fusions(*(False for _ in fields(Fusions)))


@dataclass(frozen=True)
class StepSizes:
    """What every part below needs. ``fusions``: none of them is on in a variant that is not triton."""

    shape: Shape
    kernels: str
    precision: str
    B: int
    T: int
    dropout: float
    sm_count: int
    fusions: Fusions
    optimizer: str = "adamw"

    @property
    def model(self) -> anatomy.Anatomy:
        return anatomy.of(self.shape)

    @property
    def rows(self) -> int:
        return self.B * self.T

    @property
    def compiled(self) -> bool:
        return self.kernels.endswith("compile")

    @property
    def own_fp8(self) -> bool:
        """Whether the blocks' linears are this repository's in fp8: kernels/fp8/."""
        return self.kernels == "triton" and self.precision == "fp8"


def sweep(name: str, group: str, moved: int, launches: int = 1, **rest: Any) -> Operation:
    """An operation that only moves bytes."""
    return Operation(name, group, "memory", 0, moved, launches, **rest)
