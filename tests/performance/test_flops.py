"""Closed forms against torch's FlopCounterMode on meta models, and against figures that others published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.config import ModelConfig
from fastgpt.model import GPT
from fastgpt.performance import flops
from tests.performance import formulas

SHAPES = [
    Shape(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=11),
    Shape(n_layer=2, n_head=4, n_embd=32, block_size=12, vocab_size=64, bias=True),
    Shape(n_layer=3, n_head=2, n_embd=48, block_size=7, vocab_size=97),
]
BATCH = 3


def counted(model, shape, T=None):
    """FLOPs per token of a forward and backward pass, as FlopCounterMode sees them on the meta device."""
    T = T or shape.block_size
    idx = torch.zeros(BATCH, T, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(idx).backward()
    return counter.get_total_flops() / (BATCH * T)


def our_gpt(shape):
    config = ModelConfig(shape.n_layer, shape.n_head, shape.n_embd, shape.block_size, shape.vocab_size, shape.bias)
    with torch.device("meta"):
        model = GPT(config)
    return model, lambda idx: model(idx, idx)[1]


@pytest.mark.parametrize("shape", [*SHAPES, GPT2_40M, GPT2_124M], ids=str)
def test_exact_is_what_torch_counts_of_our_model(shape):
    model, loss = our_gpt(shape)
    assert counted(loss, shape) == formulas.exact(shape, is_causal=False)
    half = max(1, shape.block_size // 2)
    assert counted(loss, shape, T=half) == formulas.exact(shape, T=half, is_causal=False)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == anatomy.n_params(shape)
    assert sum(sizes.values()) - sizes["transformer.wpe.weight"] == anatomy.n_params(shape, positions=False)


# A GPT of nothing but matmuls, with the attention under test and no causal shortcut that the counter cannot see.


class PlainGPT(torch.nn.Module):
    def __init__(self, shape, attend):
        super().__init__()
        C, V = shape.n_embd, shape.vocab_size
        self.embedding = torch.nn.Parameter(torch.empty(V, C, device="meta"))
        sizes = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))
        self.blocks = [[torch.nn.Parameter(torch.empty(s, device="meta")) for s in sizes] for _ in range(shape.n_layer)]
        self.n_head, self.attend = shape.n_head, attend

    def block(self, x, qkv, proj, up, down):
        B, T, C = x.shape
        q, k, v = F.linear(x, qkv).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        x = x + F.linear(self.attend(q, k, v).transpose(1, 2).reshape(B, T, C), proj)
        return x + F.linear(F.gelu(F.linear(x, up)), down)

    def forward(self, idx):
        x = F.embedding(idx, self.embedding)
        for weights in self.blocks:
            x = self.block(x, *weights)
        return F.linear(x, self.embedding).sum()


def tiled(tile):
    """Causal attention in squares of tile x tile, diagonal ones computed whole: what a flash kernel multiplies."""

    def attend(q, k, v):
        T, padded = q.shape[2], -(-q.shape[2] // tile) * tile
        q, k, v = (F.pad(x, (0, 0, 0, padded - T)) for x in (q, k, v))
        rows = [
            F.softmax(q[:, :, i : i + tile] @ k[:, :, : i + tile].mT, -1) @ v[:, :, : i + tile]
            for i in range(0, padded, tile)
        ]
        return torch.cat(rows, 2)[:, :, :T]

    return attend


def flash(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


class SplitLoops(torch.autograd.Function):
    """Full attention; backward forms scores and dP twice, once for dQ and once for dK and dV."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return F.softmax(q @ k.mT, -1) @ v

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        dq = ((q @ k.mT) * (dout @ v.mT)) @ k
        p, dp = q @ k.mT, dout @ v.mT
        return dq, (p * dp).mT @ q, p.mT @ dout


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_causal_counts_each_query_with_its_own_keys(shape):
    assert counted(PlainGPT(shape, tiled(1)), shape) == formulas.exact(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hardware_counts_recomputation(shape):
    def check(attend, **options):
        assert counted(PlainGPT(shape, attend), shape) == formulas.hardware(shape, **options)

    check(flash, is_causal=False, split_backward=False)  # the counter takes flash attention as not causal
    check(SplitLoops.apply, is_causal=False, split_backward=True)


@pytest.mark.parametrize(("T", "tile"), [(12, 1), (12, 4), (7, 4), (4, 4), (3, 8)])
def test_attended_keys_of_whole_tiles(T, tile):
    q = torch.empty(1, 1, T, 5, device="meta")
    with FlopCounterMode(display=False) as counter:
        tiled(tile)(q, q, q)
    assert counter.get_total_flops() == round(4 * 5 * T * flops.attended_keys(T, tile=tile))


def test_attended_keys():
    assert flops.attended_keys(1024) == 512.5
    assert flops.attended_keys(1024, tile=128) == 576
    assert flops.attended_keys(1024, tile=1024) == 1024


def test_published_figures():
    def mega(flop):
        return round(flop / 1e6, 1)

    assert (mega(flops.palm(GPT2_124M)), mega(flops.palm(GPT2_40M))) == (854.8, 300.0)
    assert mega(formulas.exact(GPT2_124M)) == 798.1
    assert mega(6 * anatomy.matmul_params(GPT2_124M)) == 741.4
    assert anatomy.n_params(GPT2_40M, positions=False) == 40_560_000
    assert round(anatomy.n_params(GPT2_124M, positions=False) / 1e6, 2) == 123.59
    gpt2 = Shape(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=True)
    assert anatomy.n_params(gpt2) == 124_439_808  # OpenAI's checkpoint
    # causal attention of 124M: 66 MFLOP per token with the fewest matmuls, 85 with split loops
    gemms = 6 * anatomy.matmul_params(GPT2_124M)
    assert mega(formulas.hardware(GPT2_124M, split_backward=False) - gemms) == 66.1
    assert mega(formulas.hardware(GPT2_124M) - gemms) == 85.0


def test_two_logged_runs_in_three_units():
    """nanoGPT on an RTX 4070: 12.9% and 15.4% of an A100 are 69% and 82% of the card."""
    for shape, ms, of_a100, of_4070 in ((GPT2_40M, 3911, 12.9, 69), (GPT2_124M, 9350, 15.4, 82)):
        achieved = flops.palm(shape) * 524_288 / (ms / 1e3)
        assert round(100 * achieved / 312e12, 1) == of_a100
        assert round(100 * achieved / 58.3e12) == of_4070


def test_palm_follows_the_length_of_a_sequence():
    assert flops.palm(GPT2_124M, T=2048) - flops.palm(GPT2_124M) == 12 * 12 * 768 * 1024


# The work of single operations, in numbers small enough to count by hand. bf16 unless said.


def test_attention_work():
    B, T, H, D = 2, 4, 3, 8
    pairs = B * H * (1 + 2 + 3 + 4)
    tensor, lse = B * T * H * D * 2, B * H * T * 4
    assert flops.attention_forward(B, T, H, D) == (2 * 2 * D * pairs, 4 * tensor + lse)
    assert flops.attention_backward(B, T, H, D) == (5 * 2 * D * pairs, 8 * tensor + lse)
    assert flops.attention_backward(B, T, H, D, matmuls=7).flops == 7 * 2 * D * pairs
    shared = tensor // H  # k and v of one head for all queries
    assert flops.attention_forward(B, T, H, D, kv_heads=1) == (2 * 2 * D * pairs, 2 * tensor + 2 * shared + lse)
    assert flops.attention_backward(B, T, H, D, kv_heads=1) == (5 * 2 * D * pairs, 4 * tensor + 4 * shared + lse)


def test_rms_norm_work():
    n, stats = 10 * 16, 4 * 10
    assert flops.rms_norm_forward(10, 16) == (0, 2 * 2 * n + stats)  # x, y
    assert flops.rms_norm_backward(10, 16) == (0, 3 * 2 * n + stats)  # dy, x, dx
    assert flops.rms_norm_forward(10, 16, residual=True).bytes == 4 * 2 * n + stats
    assert flops.rms_norm_backward(10, 16, residual=True).bytes == 4 * 2 * n + stats  # dy, dsum, s, dx for both
    fp32 = {"stream": 4, "residual": True}
    assert flops.rms_norm_backward(10, 16, **fp32).bytes == (2 * 2 + 3 * 4) * n + stats  # and a gradient of its own
    assert flops.rms_norm_forward(10, 16, **fp32, mixed=True).bytes == (2 * 2 + 3 * 4) * n + stats  # and x0
    # dy, x, dx; residual, dsum, dresidual; x0 and dx0
    assert flops.rms_norm_backward(10, 16, **fp32, mixed=True).bytes == (3 * 2 + 5 * 4) * n + stats


def test_layer_norm_work():
    row, stats, vector = 10 * 16 * 2, 10 * 2 * 4, 16 * 4
    assert flops.layer_norm_forward(10, 16) == (0, 2 * row + stats + vector)  # x, y
    assert flops.layer_norm_forward(10, 16, residual=True, bias=True) == (0, 4 * row + stats + 2 * vector)
    assert flops.layer_norm_backward(10, 16) == (0, 3 * row + stats + 2 * vector)  # dy, x, dx; weight, dweight
    assert flops.layer_norm_backward(10, 16, residual=True, bias=True) == (0, 4 * row + stats + 3 * vector)
    assert flops.layer_norm_forward(10, 16, size=4).bytes == 4 * row + stats + vector


def test_linear_work():
    M, N, K = 5, 7, 3
    assert flops.linear_forward(M, N, K) == (210, 2 * (15 + 21 + 35))
    assert flops.linear_forward(M, N, K, bias=True) == (210, 2 * (15 + 21 + 35 + 7))
    assert flops.linear_input_grad(M, N, K) == (210, 2 * (35 + 21 + 15))
    assert flops.linear_weight_grad(M, N, K) == (210, 2 * (35 + 15) + 4 * 21)
    assert flops.linear_weight_grad(M, N, K, accumulate=True) == (210, 2 * (35 + 15) + 8 * 21)


def test_the_linears_of_a_step_add_up_to_six_flop_per_weight():
    C, L, V = GPT2_40M.n_embd, GPT2_40M.n_layer, GPT2_40M.vocab_size
    sizes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]
    linears = (flops.linear_forward, flops.linear_input_grad, flops.linear_weight_grad)
    blocks = L * sum(work(1, N, K).flops for N, K in sizes for work in linears)
    head = flops.linear_cross_entropy(1, C, V).flops
    T, D = GPT2_40M.block_size, C // GPT2_40M.n_head
    attention = flops.attention_forward(1, T, GPT2_40M.n_head, D).flops * 3 * L / T
    assert blocks + head + attention == formulas.exact(GPT2_40M)


def test_loss_work():
    rows, C, V = 6, 4, 10
    x, w, ends = 2 * rows * C, 2 * V * C, rows * (8 + 4)  # int64 target, fp32 loss
    product = 2 * rows * C * V
    assert flops.linear_cross_entropy(rows, C, V) == (3 * product, 2 * x + w + ends + 4 * V * C)
    logits = 2 * rows * V
    assert flops.cross_entropy(rows, V, grad=False) == (0, logits + ends)
    assert flops.cross_entropy(rows, V) == (0, 3 * logits + ends + rows * (8 + 4 + 4))


def test_embedding_and_optimizer_work():
    assert flops.embedding_forward(6, 4, 16) == (0, 6 * 8 + (4 + 6) * 16 * 2)
    assert flops.embedding_backward(6, 4, 16) == (0, 6 * 8 + 6 * 16 * 2 + 2 * 4 * 16 * 4)
    assert flops.adamw(100) == (0, 100 * 8 * 4)


def test_roof_is_the_nearer_limit():
    gemm = flops.linear_forward(8192, 768, 768)
    assert gemm.roof(58.3e12, 504e9) == (gemm.flops / 58.3e12, "compute")
    norm = flops.layer_norm_forward(8192, 768)
    assert norm.roof(58.3e12, 504e9) == (norm.bytes / 504e9, "memory")
