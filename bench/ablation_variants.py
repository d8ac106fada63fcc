"""The variants of the training step that bench.ablation compares: as shipped, and with one thing changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """The step with one thing changed. ``fusion``: of operations.Fusions; ``part``: of fp16-fast, see ablation.PARTS."""

    name: str
    text: str
    precision: str = "bf16"
    fusion: str | None = None
    on: bool = False
    part: str | None = None
    graphs: bool = False

    @property
    def key(self) -> str:
        return f"{self.precision}: {self.name}"

    @property
    def is_shipped(self) -> bool:
        return self.name == "as shipped"


VARIANTS = (
    Variant("as shipped", "cuBLAS with every fusion below on"),
    Variant("attention off", "torch's flash attention; dQ, dK and dV packed by a copy", fusion="attention"),
    Variant("norms off", "residual add, norm and casts in passes of their own", fusion="norms"),
    Variant("loss off", "whole logits, in 16 bits and fp32", fusion="loss"),
    Variant("weight gradients off", "rounded to 16 bits, cast and added by passes", fusion="weight_gradients"),
    Variant("in place off", "autograd adds the gradients of later micro-batches", fusion="in_place"),
    Variant("working copy off", "weights cast in every micro-batch", fusion="working_copy"),
    Variant("optimizer off", "torch's fused AdamW and clip_grad_norm_", fusion="optimizer"),
    Variant("embedding off", "gather, add; dense gradients", fusion="embedding"),
    Variant("epilogues on", "GELU inside Triton matmuls, at a library's efficiency", fusion="epilogues", on=True),
    Variant("CUDA graphs on", "micro-steps and update replayed", graphs=True),
    Variant("as shipped", "products summed in fp16 by chunks, in Triton", "fp16-fast"),
    Variant("linears off", "the blocks' linears by cuBLAS, sums in fp32, GELU in passes", "fp16-fast", part="linears"),
    Variant("head off", "logits and their gradients by cuBLAS", "fp16-fast", part="head"),
    Variant("attention off", "attention's products summed in fp32", "fp16-fast", part="attention"),
)  # fmt: skip
