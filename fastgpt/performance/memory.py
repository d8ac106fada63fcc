"""GPU memory of one training step, as a sum of named parts. Derived in docs/memory.md; nothing is fitted.

A step holds its state (fp32 weights, 16-bit working copies, gradients, two moments) all the time, and on top of it whatever
the worst moment of a micro-batch needs. ``memory`` writes the candidates down and takes the largest:

* ``loss``: every activation is saved, and the loss is at its peak;
* ``backward starts``: the loss is gone, the head's gradient and the temporaries of the last block are there;
* ``backward ends``: the activations are gone, gradients that autograd has not yet added to ``.grad`` are there;
* ``update``: the optimizer is at work, of which only Muon needs memory for that.

Letters as in flops.py, N = micro_batch x T tokens, s = bytes of the compute dtype. All sizes are bytes. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

from fastgpt import anatomy
from fastgpt.common import UserError, at_least, unknown
from fastgpt.config import GPT2_ALONE, ModelConfig

KERNELS = ("nanogpt-compile", "eager", "compile", "triton")
"""nanoGPT under torch.compile; fastgpt's model in plain PyTorch, under torch.compile, and on the Triton kernels."""

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp16-fast": 2, "fp8": 2}
"""Bytes of the compute dtype per ``--precision``; fp8 keeps two copies of a weight, of one byte each."""

LOGITS_BUDGET = 256 * 2**20
"""Most bytes that the logits of one chunk take: fused_cross_entropy.LOGITS_BUDGET, repeated so that no kernel is imported."""

MUON_BATCH = 32 * 2**20
"""Most elements of the matrices that Muon orthogonalizes at a time: muon.SCRATCH, repeated for the same reason."""

CUBLAS_WORKSPACE = 8_519_680
"""PyTorch's cuBLAS workspace before Hopper: 2 x 4096 KiB + 8 x 16 KiB per handle and stream (CUDABlas, seen as such in
memory snapshots: discuss.pytorch.org/t/178671)."""
CUBLAS_WORKSPACE_HOPPER = 32 * 2**20
"""The same from sm_90 on (cuBLAS manual, cublasSetWorkspace: 32 MiB; pytorch#120925)."""
CUBLAS_HANDLES = 2
"""The main thread's, and that of autograd's backward thread."""

FRAGMENTATION = 0.015
"""Reserved by PyTorch's allocator beyond what is allocated: 5.25 over 5.17 GiB in a nanoGPT run (karpathy/nanoGPT#88). Other
reports: 0.9% (nanoGPT#391), 0.4% (transformers#3360)."""


class SavedForBackward(NamedTuple):
    """What autograd keeps from the end of forward on, excluding parameters and their working copies."""

    activations: int  # embeddings, blocks, final norm
    loss: int


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the worst moment of a step. ``allocated`` compares with torch.cuda.max_memory_allocated, ``total``
    with max_memory_reserved; the CUDA context is in neither (fitting.CUDA_CONTEXT)."""

    weights: int
    working_copies: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    backward: int
    workspace: int
    peak: str
    """Which moment this is: "loss", "backward starts", "backward ends" or "update"."""

    @property
    def allocated(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "peak")

    @property
    def fragmentation(self) -> int:
        return round(FRAGMENTATION * self.allocated)

    @property
    def total(self) -> int:
        return self.allocated + self.fragmentation

    def parts(self) -> dict[str, int]:
        """Every part by name; they add up to ``total``."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "peak"}
        return {**named, "fragmentation": self.fragmentation}


def saved(model: ModelConfig, *, micro_batch: int, kernels: str, precision: str = "bf16") -> SavedForBackward:
    """Bytes that autograd saves in one forward pass on a GPU (docs/memory.md, 2 and 3). Dropout masks are bool there.

    Raises UserError for kernels, precision or micro_batch that do not exist.
    """
    check_step(kernels, precision, micro_batch)
    check_family(model, kernels, precision)
    s, parts = SIZES[precision], anatomy.of(model)
    C, T, V = model.n_embd, model.block_size, model.vocab_size
    N = micro_batch * T
    # Per norm: eager and the kernels keep its input, mean and 1/std; Inductor the normalised input and 1/(std C).
    # An RMS norm has no mean.
    norms = sum(
        norm.count * (4 * norm.width + (8 if norm.weight and not kernels.endswith("compile") else 4))
        for norm in parts.norms
    )
    # The input of every linear: norm output, attention output, norm output, GELU output. The outputs that attention (q, k and
    # v) and the GELU read; the norms' residual sum is kept instead of a branch. Attention's log-sum-exp.
    # Of a squared ReLU the kernels form the gradient from its output alone, but in fp16, where small squares are 0.
    squared = kernels == "triton" and parts.activation == "ReLU2" and precision not in ("fp16", "fp16-fast")
    read_again = ("attention",) if squared else ("attention", "activation")
    linears = sum(
        linear.count * (linear.n_in + (linear.n_out if linear.sink in read_again else 0))
        for linear in parts.block_linears
    )
    activations = N * (norms + s * linears + 4 * parts.attention.count * parts.attention.heads)
    activations += _modern_extras(parts, N, T, kernels, s)
    if kernels == "triton":  # ids in 32 bits; seeds instead of masks; the loss's gradients instead of its inputs
        return SavedForBackward(activations + 4 * N, 4 * N * C + 4 * V * C)
    activations += 8 * N + (8 * T if model.family == "gpt2" else 0)  # token ids and positions
    if model.dropout:
        activations += N * C * sum(norm.count for norm in parts.norms)  # each norm but the first, and the embedding
    activations += N * s * C  # the final norm's output: the head's operand
    capped = 4 * N * V if model.softcap else 0  # tanh of the logits
    if kernels == "eager":  # log-probabilities in fp32, and targets
        return SavedForBackward(activations, 4 * N * V + 8 * N + capped)
    return SavedForBackward(activations, s * N * V + 8 * N)  # logits; each row's largest and log-sum-exp


def _modern_extras(parts: anatomy.Anatomy, N: int, T: int, kernels: str, s: int) -> int:
    """What a modern model's parts save beyond what a GPT-2 has, for N tokens."""
    heads, triton = parts.attention, kernels == "triton"
    per_token = each = 0
    if heads.prepared:
        valued = sum(table.count for table in parts.embeddings if table.in_blocks)
        # Value embeddings; their gates before and after the factor, the latter in fp32.
        per_token += valued * heads.kv_heads * (s * heads.head_dim + s + 4)
        if heads.normed:  # 1/rms of each head; the kernel goes by attention's input, plain PyTorch by its own in fp32
            columns = 0 if triton else heads.head_dim
            per_token += heads.count * 4 * (heads.heads + heads.kv_heads) * (1 + columns)
        each += (
            (1 if triton else heads.count) * 4 * T * heads.head_dim
        )  # cos and sin; in plain PyTorch a copy per block
    if parts.mixes:
        # The gradients of the scalars. The kernel keeps a branch in the place of each sum but the first, as it forms the sum
        # again from what is kept anyway; plain PyTorch also keeps branch + residual, in fp32.
        per_token += (heads.count - 1) * (s - 4) * heads.width if triton else heads.count * 4 * heads.width
    gates = [part for part in parts.parts if isinstance(part, anatomy.Gate) and not part.in_blocks]
    per_token += sum(
        4 * heads.width + s * gate.n_in + 8 for gate in gates
    )  # smear: the token before, the gate and its input
    if not triton:  # the kernel forms the sum again
        per_token += 4 * heads.width * sum(part.name == "backout" for part in parts.parts)
    return N * per_token + each


def memory(
    model: ModelConfig,
    *,
    micro_batch: int,
    kernels: str,
    precision: str = "bf16",
    world_size: int = 1,
    workspace: int = CUBLAS_WORKSPACE,
    optimizer: str = "adamw",
) -> Memory:
    """Peak memory of a training step with gradient accumulation, at ``micro_batch`` sequences of T = block_size.

    ``kernels`` is one of KERNELS, ``precision`` one of SIZES; ``workspace``: cuBLAS's per handle. ``optimizer`` "muon" keeps
    one moment of the blocks' matrices, AdamW two of everything. Counts DistributedDataParallel's buckets for world_size > 1.
    Raises UserError for values that do not exist.
    """
    kept = saved(model, micro_batch=micro_batch, kernels=kernels, precision=precision)
    s, parts = SIZES[precision], anatomy.of(model)
    C, V, N = model.n_embd, model.vocab_size, micro_batch * model.block_size
    params = anatomy.n_params(model)

    low = 0 if precision == "fp32" else s
    in_blocks = parts.block_weights
    if kernels != "triton":  # the kernels keep no copy of biases
        in_blocks = sum(linear.n_params for linear in parts.block_linears)
    head_copy = low * parts.head.weights  # triton casts the head inside the loss, and frees the copy with it
    copies = low * in_blocks + (0 if kernels == "triton" else head_copy)

    head = 4 * parts.head.weights  # the head's gradient in fp32
    if kernels == "eager":
        loss = 12 * N * V + 8 * N  # log-probabilities, their gradient, that of the logits
        last = 2 * head  # the embedding's gradient beside the head's: one parameter
    elif kernels == "triton":
        chunk = min(LOGITS_BUDGET, s * N * V)
        forward = chunk + head_copy + head + 4 * N * C + s * N * C + 12 * N
        backward = head + 4 * N * C + s * N * C + max(head, 4 * N * C)
        loss, last = max(forward, backward), 2 * head if parts.head.tied else head
    else:
        # nanoGPT returns the logits: they outlive the graph, and their own gradient comes in as a tensor of zeros.
        held = 1 if kernels == "nanogpt-compile" else 0
        logits = s * N * V
        loss = max((2 + held) * logits, (1 + held) * logits + head_copy + head + s * N * C) + 8 * N
        last = 4 * params  # a compiled backward returns every gradient at once
    # Gradients of the residual stream, of a branch, and of the GELU's output and input.
    temporaries = N * (4 * C + s * (C + 2 * parts.hidden))

    # One batch of matrices in 16 bits at a time, while nothing of a micro-batch is left: X, the next one, and, which for square
    # matrices are as large, X X^T and its polynomial.
    update = 8 * min(MUON_BATCH, parts.block_weights) if optimizer == "muon" else 0
    moments = {
        "loss": (kept.activations, loss, 0),
        "backward starts": (kept.activations, 0, head + temporaries),
        "backward ends": (0, 0, last),
        "update": (0, 0, update),
    }
    peak = max(moments, key=lambda moment: sum(moments[moment]))
    activations, loss, in_flight = moments[peak]
    return Memory(
        weights=4 * params,
        working_copies=copies,
        gradients=4 * params * (2 if world_size > 1 else 1),
        optimizer=8 * params - (4 * parts.block_weights if optimizer == "muon" else 0),
        activations=activations,
        loss=loss,
        backward=in_flight,
        workspace=CUBLAS_HANDLES * workspace,
        peak=peak,
    )


def check_family(model: object, kernels: str, precision: str) -> None:
    """Raise UserError for a modern model in nanoGPT's own program or in fp8, which have GPT-2 alone."""
    if getattr(model, "family", "gpt2") == "gpt2":
        return
    if kernels == "nanogpt-compile":
        raise UserError("kernels is 'nanogpt-compile', which has no modern model: use compile, eager or triton")
    if precision in GPT2_ALONE:
        raise UserError(f"precision is {precision!r}, which only GPT-2 has yet: use bf16")


def check_step(kernels: str, precision: str, micro_batch: int, precisions: Iterable[str] = tuple(SIZES)) -> None:
    """Raise UserError for kernels, a precision or a micro_batch that do not exist."""
    for name, value, known in (("kernels", kernels, KERNELS), ("precision", precision, precisions)):
        if value not in known:
            raise UserError(unknown(name, value, known))
    at_least(1, micro_batch=micro_batch)
