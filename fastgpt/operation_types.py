"""What fastgpt/operations.py lists: operations, their names, and which of this repository's fusions are on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fastgpt.flops import Shape

KERNELS = ("nanogpt-compile", "eager", "compile", "triton")
PRECISIONS = ("bf16", "fp16", "fp16-fast", "fp8")

GAPS = "gaps (nothing running)"

LINEARS = ("qkv", "attention projection", "mlp up", "mlp down", "head")
PASSES = ("forward", "dX", "dW")
GROUPS = (
    "embedding",
    "norms forward",
    "norms backward",
    "attention forward",
    "attention backward",
    *(f"{linear} {way}" for linear in LINEARS for way in PASSES),
    "GELU forward",
    "GELU backward",
    "pointwise",
    "loss",
    "gradient accumulation",
    "optimizer",
)
"""Every group that an operation can belong to, under the names of fastgpt/profiling.py; a cast, a residual add apart from
the norm and whatever else is not needed is "pointwise"."""

Kind = Literal["matmul", "attention", "memory"]
Per = Literal["micro-batch", "accumulation", "step"]


@dataclass(frozen=True)
class Operation:
    """One execution of one operation, and how often a step executes it."""

    name: str
    group: str  # of GROUPS
    kind: Kind
    flops: int
    bytes: int  # moved by one execution, every read and write counted
    launches: int  # kernels of one execution
    count: int = 1  # executions per micro-batch, per accumulation (all micro-batches but the first) or per step
    per: Per = "micro-batch"
    fresh: int = 0  # of ``bytes``: reads of what the kernel just before has written, and L2 may still hold
    mnk: tuple[int, int, int] | None = None  # of a matmul: an (m, k) by a (k, n) matrix
    scores: int = 0  # of attention: elements of S = Q K^T that get an exponential
    instructions: int = 0  # of attention: plain instructions per score, beside the exponential
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

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def without(self, name: str) -> Fusions:
        return replace(self, **{name: False})


AS_SHIPPED = Fusions()


@dataclass(frozen=True)
class Sizes:
    """The integers that every part below needs. ``e``: bytes of a 16-bit element."""

    shape: Shape
    kernels: str
    precision: str
    B: int
    T: int
    dropout: float
    sm_count: int
    fusions: Fusions = AS_SHIPPED
    e: int = 2

    @property
    def rows(self) -> int:
        return self.B * self.T

    @property
    def compiled(self) -> bool:
        return self.kernels.endswith("compile")

    @property
    def own_fp8(self) -> bool:
        """Whether the blocks' linears are this repository's in fp8: kernels/fused_fp8.py."""
        return self.kernels == "triton" and self.precision == "fp8"

    def fused(self, name: str) -> bool:
        """Whether this is the triton variant, with that one of its fusions."""
        return self.kernels == "triton" and getattr(self.fusions, name)

    @property
    def tensors(self) -> int:
        """Parameter tensors: token and position embedding, final norm, and per block two norms and four linears."""
        per_block, outside = 6, 3
        return (per_block * self.shape.n_layer + outside) + (6 * self.shape.n_layer + 1 if self.shape.bias else 0)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def memory(name: str, group: str, moved: int, launches: int = 1, **rest: Any) -> Operation:
    return Operation(name, group, "memory", 0, moved, launches, **rest)
