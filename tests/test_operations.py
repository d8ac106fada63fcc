"""The list of operations of a step: FLOPs equal the closed forms, bytes follow what each variant really moves."""

from dataclasses import replace

import pytest
import torch

from fastgpt import flops, operations
from fastgpt.errors import UserError
from fastgpt.flops import GPT2_124M, Shape
from fastgpt.operations import GROUPS, KERNELS, LINEARS, PASSES

SHAPE = Shape(n_layer=3, n_head=2, n_embd=128, block_size=256, vocab_size=1024)
B = 4
ELEMENTS = B * SHAPE.block_size * SHAPE.n_embd


def step(kernels, shape=SHAPE, **options):
    return operations.operations(shape, kernels, B, **options)


def total(ops, what, accum=2, **only):
    chosen = [op for op in ops if all(getattr(op, key) == value for key, value in only.items())]
    return sum(getattr(op, what) * op.executions(accum) for op in chosen)


def named(ops, name):
    (found,) = [op for op in ops if op.name == name]
    return found


@pytest.mark.parametrize("kernels", KERNELS)
def test_matmul_flops_are_six_per_weight_and_token(kernels):
    tokens = B * SHAPE.block_size
    assert total(step(kernels), "flops", accum=1, kind="matmul") == 6 * flops.matmul_params(SHAPE) * tokens


@pytest.mark.parametrize("kernels", ["eager", "compile", "nanogpt-compile"])
def test_all_flops_are_those_of_the_hardware_formula(kernels):
    expected = flops.hardware(SHAPE, tile=128, split_backward=False) * B * SHAPE.block_size
    assert total(step(kernels), "flops", accum=1) == expected


def test_tritons_attention_recomputes_scores_in_each_of_its_backward_loops():
    pairs = {tile: B * SHAPE.n_head * SHAPE.block_size * flops.attended_keys(256, tile=tile) for tile in (64, 128)}
    D = SHAPE.n_embd // SHAPE.n_head
    per_block = 2 * D * (3 * pairs[128] + 4 * pairs[64])  # S, dP, dQ; S, dP, dK, dV
    assert total(step("triton"), "flops", accum=1, group="attention backward") == SHAPE.n_layer * per_block


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_operation_is_well_formed_and_no_group_is_left_out(kernels):
    ops = step(kernels, dropout=0.1)
    assert {op.group for op in ops} == set(GROUPS)
    for op in ops:
        assert op.bytes > 0 and op.launches > 0 and op.count > 0, op
        assert 0 <= op.fresh <= op.bytes, op
        assert (op.kind == "matmul") == (op.mnk is not None), op
        assert (op.kind == "attention") == (op.scores > 0), op
        if op.mnk:
            m, n, k = op.mnk
            assert op.flops == 2 * m * n * k, op


def test_groups_name_every_matmul():
    assert {f"{linear} {way}" for linear in LINEARS for way in PASSES} < set(GROUPS)


def test_bytes_and_launches_fall_from_eager_over_compile_to_triton():
    moved, launches = (
        {kernels: total(step(kernels, GPT2_124M), what, kind="memory") for kernels in KERNELS}
        for what in ("bytes", "launches")
    )
    assert moved["eager"] > 1.5 * moved["compile"] and moved["compile"] > 1.2 * moved["triton"]
    assert launches["eager"] > launches["compile"] > launches["triton"]
    assert moved["compile"] == moved["nanogpt-compile"]


def test_tritons_norms_move_what_their_kernels_read_and_write():
    ops = step("triton")
    # branch 2 and residual 4 in, sum 4 and norm 2 out; dy 2, sum 4, its gradient 4 in, two gradients 2 + 4 out
    assert named(ops, "norm forward").bytes == 12 * ELEMENTS
    assert named(ops, "norm backward").bytes == 16 * ELEMENTS
    assert named(ops, "norm forward").count == 2 * SHAPE.n_layer
    assert named(ops, "norm forward").launches == 1 and named(ops, "norm backward").launches == 2


def test_flash_attention_clears_adds_to_and_casts_an_fp32_dq_and_the_packing_copies_all_three():
    logsums = 4 * B * SHAPE.block_size * SHAPE.n_head
    for kernels in ("eager", "compile"):
        assert total(step(kernels), "bytes", 1, group="attention backward") == SHAPE.n_layer * (
            46 * ELEMENTS + 3 * logsums
        )
    assert total(step("triton"), "bytes", 1, group="attention backward") == SHAPE.n_layer * (
        24 * ELEMENTS + 4 * logsums
    )
    for kernels in KERNELS:
        assert total(step(kernels), "bytes", 1, group="attention forward") == SHAPE.n_layer * (8 * ELEMENTS + logsums)


def test_the_loss_holds_logits_twice_in_eager_once_in_compile_and_in_chunks_in_triton():
    logits = B * SHAPE.block_size * SHAPE.vocab_size
    assert named(step("eager"), "loss").bytes == 36 * logits
    assert named(step("compile"), "loss").bytes == flops.cross_entropy(B * SHAPE.block_size, SHAPE.vocab_size).bytes
    rows = [op for op in step("triton", GPT2_124M) if op.name == "loss rows"]
    tokens = B * GPT2_124M.block_size
    assert sum(op.count for op in rows) > 1
    assert sum(op.bytes * op.count for op in rows) == 4 * tokens * GPT2_124M.vocab_size + 12 * tokens


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_optimizer_reads_and_writes_every_parameter_once_a_step(kernels):
    update = named(step(kernels), "clip and AdamW")
    least = flops.adamw(flops.n_params(SHAPE)).bytes
    extra = 2 * flops.matmul_params(SHAPE) if kernels == "triton" else 8 * flops.n_params(SHAPE)  # copies; clip scales
    assert update.bytes == least + extra
    assert update.executions(grad_accum=64) == 1


def test_gradients_are_added_for_every_micro_batch_but_the_first():
    added = named(step("triton"), "gradients added")
    assert added.bytes == 12 * flops.n_params(SHAPE)
    assert [added.executions(accum) for accum in (1, 2, 64)] == [0, 1, 63]


@pytest.mark.parametrize("kernels", KERNELS)
def test_dropout_costs_masks_where_they_are_kept_and_random_numbers_in_attention(kernels):
    without, with_it = step(kernels), step(kernels, dropout=0.1)
    assert total(with_it, "instructions", kind="attention") > total(without, "instructions", kind="attention")
    norms = [total(ops, "bytes", group="norms forward") for ops in (without, with_it)]
    assert norms[1] - norms[0] == (2 * 2 * SHAPE.n_layer * ELEMENTS if kernels.endswith("compile") else 0)
    assert total(with_it, "bytes") > total(without, "bytes")


@pytest.mark.parametrize("kernels", KERNELS)
def test_biases_add_their_gradients(kernels):
    more = total(step(kernels, replace(SHAPE, bias=True)), "bytes") - total(step(kernels), "bytes")
    assert more > 2 * SHAPE.n_layer * 2 * 9 * ELEMENTS  # two micro-batches; 9 C columns of 16 bits


def test_fp8_quantises_its_operands_and_the_others_do_not():
    names = {precision: {op.name for op in step("triton", precision=precision)} for precision in ("bf16", "fp8")}
    assert names["fp8"] - names["bf16"] == {"fp8 quantisation"}


def test_own_kernels_are_named_as_such():
    assert not any(op.own for kernels in KERNELS[:3] for op in step(kernels))
    assert {op.group for op in step("triton") if op.own} == {
        *("norms forward", "norms backward", "attention forward", "attention backward", "loss", "optimizer")
    }
    assert all(op.own for op in step("triton", precision="fp16-fast") if op.kind == "matmul")


def test_head_dimensions_are_padded_as_each_kernel_does():
    odd = Shape(n_layer=1, n_head=2, n_embd=160, block_size=256, vocab_size=64)  # heads of 80
    forward = {kernels: named(step(kernels, odd), "attention forward") for kernels in ("triton", "eager")}
    assert forward["triton"].flops / forward["eager"].flops == 128 / 96
    assert forward["triton"].bytes == forward["eager"].bytes


@pytest.mark.parametrize("rows", [1, 100, 2048, 8192, 16384, 65536])
@pytest.mark.parametrize("V, C", [(256, 64), (50257, 768), (50304, 384), (50304, 1600)])
@pytest.mark.parametrize("sm_count", [46, 132])
def test_the_loss_is_cut_into_the_chunks_that_its_kernel_takes(rows, V, C, sm_count):
    from fastgpt.kernels.fused_cross_entropy import chunk_rows

    assert operations.loss_chunk(rows, V, C, sm_count) == chunk_rows(rows, V, C, torch.bfloat16, sm_count)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernels": "cuda"}, "kernels is 'cuda': it can be nanogpt-compile, eager, compile, triton"),
        ({"precision": "fp32"}, "precision is 'fp32': it can be bf16, fp16, fp16-fast, fp8"),
        ({"micro_batch": 0}, "micro_batch is 0: it must be at least 1"),
        ({"T": 0}, "T is 0: it must be at least 1"),
        ({"T": 257}, "T is 257: the model's block_size is 256"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        operations.operations(SHAPE, **options)
