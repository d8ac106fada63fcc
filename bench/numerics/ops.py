"""The operations of a GPT with every matmul simulated in a mode of numerics/simulation.py, as a table for fastgpt.model.GPT.

Norms, softmax, loss and the residual stream are fp32, as docs/precision.md has them, and so is each weight gradient. What a
matmul reads and what it writes for the next is rounded as the mode says. Values stay in fp32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.numerics.simulation import BF16, HALF_MAX, Mode, matmul, round_to
from fastgpt.ops import EAGER, Ops

Recorder = Callable[[str, Tensor, Tensor], None]
"""Is shown the two operands, fp32 and unrounded, of each matmul, and what it is for: "forward", "dX", "dW", "P V", ..."""

HEADROOM = 8.0
"""Largest input of the head that a chunk of gradients of logits may meet in fp16: an output of the last norm."""


@dataclass(frozen=True)
class Product:
    """Multiplies in ``mode``; ``of_gradients``: which of the operands are gradients."""

    mode: Mode
    record: Recorder | None = None

    def __call__(self, what: str, a: Tensor, b: Tensor, of_gradients: tuple[bool, bool] = (False, False)) -> Tensor:
        if self.record is not None:
            self.record(what, a.detach(), b.detach())
        first, second = (self.mode.gradient if is_gradient else self.mode.forward for is_gradient in of_gradients)
        return matmul(a, b, self.mode, forms=(first, second))

    def stored(self, x: Tensor) -> Tensor:
        return round_to(x, self.mode.output)

    @property
    def scale_of_dlogits(self) -> float:
        """The scale of a logit's gradient, which is at most 1, where it is stored in fp16: a power of two. With fp32
        sums the largest that fits; sums in fp16 need room for a chunk of products with the head's inputs, here if none is
        above ``HEADROOM``."""
        if self.mode.output != "fp16":
            return 1.0
        if self.mode.accumulate != "fp16":
            return 2.0**15
        return 2.0 ** math.floor(math.log2(HALF_MAX / HEADROOM / self.mode.chunk)) if self.mode.chunk else 1.0


class SimulatedLinear(torch.autograd.Function):
    """x (tokens, in) W^T, W (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        x = product.stored(x)
        ctx.save_for_backward(x, weight)
        ctx.product, ctx.has_bias = product, bias is not None
        y = product("forward", x, weight.t())
        return product.stored(y if bias is None else y + product.stored(bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        product = ctx.product
        dy = product.stored(dy)
        dx = product.stored(product("dX", dy, weight, (True, False)))
        dw = product("dW", dy.t(), x, (True, False))
        return dx, dw, dy.sum(0) if ctx.has_bias else None, None


class SimulatedAttention(torch.autograd.Function):
    """Causal attention of q, k, v (B * H, T, D), as a flash kernel rounds: P = exp(S - max), not yet divided by its sum, is an
    operand. S = q k^T always accumulates in fp32, as in the kernels: softmax turns an absolute error in S into a relative one
    in P. It is recorded all the same, to see what sums in fp16 would do to it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, product: Product) -> Tensor:
        T, scale = q.shape[1], 1 / math.sqrt(q.shape[2])
        s = _scores(q, k, scale, product)
        p = torch.exp(s - s.amax(-1, keepdim=True))
        total = p.sum(-1, keepdim=True)
        out = product("P V", p, v) / total
        ctx.save_for_backward(q, k, v, p / total, out)
        ctx.product, ctx.scale, ctx.T = product, scale, T
        return product.stored(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, p, out = ctx.saved_tensors
        product = ctx.product
        dout = product.stored(dout)
        dv = product("dV", p.transpose(1, 2), dout, (False, True))
        dp = product("dP", dout, v.transpose(1, 2), (True, False))
        ds = p * (dp - (dout * out).sum(-1, keepdim=True))
        dq = product("dQ", ds, k, (True, False)) * ctx.scale
        dk = product("dK", ds.transpose(1, 2), q, (True, False)) * ctx.scale
        return product.stored(dq), product.stored(dk), product.stored(dv), None


def _scores(q: Tensor, k: Tensor, scale: float, product: Product) -> Tensor:
    if product.record is not None:
        product.record("Q K", q.detach(), k.transpose(1, 2).detach())
    fp32 = replace(product.mode, accumulate="fp32")
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    return (matmul(q, k.transpose(1, 2), fp32) * scale).masked_fill(hidden, -math.inf)


class SimulatedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (tokens, C) W^T. The gradient of a logit, p - 1 at the target, is rounded before it is divided
    by the number of tokens, scaled by 2^15 where it is stored in fp16: as fused_cross_entropy does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, product: Product) -> Tensor:
        x = product.stored(x)
        logits = product.stored(product("head forward", x, weight.t()))
        lse = logits.logsumexp(-1)
        ctx.save_for_backward(x, weight, target, logits, lse)
        ctx.product = product
        return (lse - logits.gather(1, target[:, None]).squeeze(1)).mean()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, target, logits, lse = ctx.saved_tensors
        product = ctx.product
        dlogits = (logits - lse[:, None]).exp()
        dlogits[torch.arange(len(target)), target] -= 1
        dlogits = product.stored(dlogits * product.scale_of_dlogits)
        factor = dloss / (len(target) * product.scale_of_dlogits)
        dx = product("head dX", dlogits, weight, (True, False)) * factor
        dw = product("head dW", dlogits.t(), x, (True, False)) * factor
        return product.stored(dx), dw, None, None


def simulated(mode: Mode, record: Recorder | None = None) -> Ops:
    """The table of operations in ``mode``. fp8 modes leave attention and the head in bf16 with fp32 sums: their operands are
    not weights, or are the widest of all, and no recipe for fp8 training quantises them by default."""
    product = Product(mode, record)
    other = Product(BF16, record) if mode.forward == "e4m3" else product

    def linear(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, **_: Any
    ) -> Tensor:
        y = SimulatedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, product).view(*x.shape[:-1], -1)
        return y if residual is None else y + residual

    def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return F.gelu(linear(x, weight, bias), approximate="tanh")

    def mlp(
        x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, **options: Any
    ) -> Tensor:
        relu2 = options.get("activation") == "relu2"
        hidden = F.relu(linear(x, w_fc, b_fc)).square() if relu2 else linear_gelu(x, w_fc, b_fc)
        return linear(hidden, w_proj, b_proj, residual=options.get("residual"))

    def qkv_attention(qkv: Tensor, n_head: int, **_: Any) -> Tensor:
        B, T, width = qkv.shape
        D = width // 3 // n_head
        heads = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4).reshape(3, B * n_head, T, D)
        out = SimulatedAttention.apply(*heads.unbind(0), other)
        return out.view(B, n_head, T, D).transpose(1, 2).reshape(B, T, n_head * D)

    def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        return SimulatedCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, target.reshape(-1), other)

    matmuls = {
        "linear": linear,
        "linear_gelu": linear_gelu,
        "mlp": mlp,
        "qkv_attention": qkv_attention,
        "linear_cross_entropy": linear_cross_entropy,
    }
    table = {field.name: getattr(EAGER, field.name) for field in fields(Ops)}
    return Ops(
        **{name: matmuls.get(name, operation) for name, operation in table.items()} | {"name": f"simulated {mode.name}"}
    )
