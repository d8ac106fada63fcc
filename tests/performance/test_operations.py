"""The list of operations of a step: FLOPs equal the closed forms, bytes follow what each variant really moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_124M, Shape
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.performance import flops, operations
from fastgpt.performance.attention import fp8_group
from fastgpt.performance.memory import KERNELS
from fastgpt.performance.operation import AS_SHIPPED, Fusions, StepSizes
from fastgpt.performance.operations import LINEARS, PASSES
from fastgpt.performance.projection import project
from tests.performance import formulas

ROOT = Path(__file__).parents[2]

SHAPE = Shape(n_layer=3, n_head=2, n_embd=128, block_size=256, vocab_size=1024)
B = 4
GROUPS = {
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
}
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
    assert total(step(kernels), "flops", accum=1, kind="matmul") == 6 * anatomy.matmul_params(SHAPE) * tokens


@pytest.mark.parametrize("kernels", ["eager", "compile", "nanogpt-compile"])
def test_all_flops_are_those_of_the_hardware_formula(kernels):
    expected = formulas.hardware(SHAPE, tile=128, split_backward=False) * B * SHAPE.block_size
    assert total(step(kernels), "flops", accum=1) == expected


def test_tritons_attention_recomputes_scores_in_each_of_its_backward_loops():
    pairs = {tile: B * SHAPE.n_head * SHAPE.block_size * flops.attended_keys(256, tile=tile) for tile in (64, 128)}
    D = SHAPE.n_embd // SHAPE.n_head
    per_block = 2 * D * (3 * pairs[128] + 4 * pairs[64])  # S, dP, dQ; S, dP, dK, dV
    assert total(step("triton"), "flops", accum=1, group="attention backward") == SHAPE.n_layer * per_block


MODERN = Shape(
    n_layer=6, n_head=4, n_embd=128, block_size=256, vocab_size=1024, family="modern", n_kv_head=2, rotary_base=1e4,
    qk_norm=True, activation="relu2", tied_head=False, embedding_norm=True, residual_scalars=True, value_embeddings=True,
    window_pattern="SSL",
)  # fmt: skip


@pytest.mark.parametrize("kernels", ["eager", "compile", "triton"])
def test_a_modern_step_has_its_own_operations_and_counts_its_windows(kernels):
    ops = step(kernels, MODERN)
    rows, D = B * 256, 32
    weights = 6 * (128 * (128 + 2 * 64) + 128 * 128 + 8 * 128 * 128) + 1024 * 128
    assert total(ops, "flops", accum=1, kind="matmul") == 6 * weights * rows
    assert {op.group for op in ops} - GROUPS == {
        f"{name} {way}" for name in ("rotary", "ReLU2") for way in ("forward", "backward")
    }
    # Blocks 0, 1, 3 and 4 see 65 keys at most, blocks 2 and 5 all: of rows of tiles of 128, 64 and 32, the first one, two or
    # three tiles, or all up to the diagonal.
    expected = {"attention forward": (2, 128, 3, 3)}
    if kernels == "triton":
        expected = {"attention forward": (2, 64, 7, 10), "attention backward dK dV": (4, 32, 21, 36)}
    for name, (products, tile, within, all_of_it) in expected.items():
        found = {op.count: op.flops for op in ops if op.name == name}
        assert found == {n: products * 2 * D * B * 4 * tile**2 * tiles for n, tiles in ((4, within), (2, all_of_it))}
    gradients = total(ops, "bytes", accum=2, per="accumulation", group="gradient accumulation")
    in_place = kernels == "triton"
    assert gradients == 12 * (1024 * 128 + 12 + 3 * 2 * 12 if in_place else anatomy.n_params(MODERN))


def test_the_embeddings_gradient_is_added_up_from_every_block():
    """Each block and the first one's input give the embedding a gradient where it is mixed in: as many sums as blocks."""
    ops = step("triton", MODERN)
    assert [op.count for op in ops if op.name == "embedding gradients added"] == [MODERN.n_layer]
    assert not any(op.name == "first norm, gradients added" for op in ops)
    assert any(
        op.name == "first norm, gradients added" for op in step("triton", replace(MODERN, residual_scalars=False))
    )


def test_what_autograd_adds_in_a_modern_step_is_listed(tmp_path):
    """As recorded: the embedding's gradients in fp32, and one in 16 bits for each gate, which reads a part of a row."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["XDG_CACHE_HOME"] = str(tmp_path)  # without tables that bench.tune has measured here
    done = subprocess.run([sys.executable, "-c", ADDED], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    number, moved = json.loads(done.stdout.splitlines()[-1])
    ops = operations.operations(MODERN, "triton", 3)
    elements, gated = 3 * 256 * 128, 3
    embedding = sum(op.bytes * op.count for op in ops if op.name == "embedding gradients added")
    assert (number, moved) == (2 * (6 + gated), 2 * (embedding + gated * 6 * elements))


ADDED = """
import json, torch
from dataclasses import replace
from fastgpt.config import Config, DataConfig, ModelConfig
from fastgpt.training import dry_run
from tests.performance.test_operations import MODERN

torch.set_num_threads(1)
model = ModelConfig(**{name: value for name, value in vars(MODERN).items()})
found = dry_run.record(Config(model=model, data=DataConfig(batch_size=3)), "bf16", 89, 46, micro_batches=2)
print(json.dumps([found.sweeps["add"], found.moved["add"]]))
"""


def test_nanogpts_own_program_has_no_modern_model():
    with pytest.raises(UserError, match=r"nanogpt-compile.*no modern model"):
        step("nanogpt-compile", MODERN)


def test_fp8_has_no_modern_model():
    with pytest.raises(UserError, match="precision is 'fp8', which only GPT-2 has yet: use bf16"):
        operations.operations(MODERN, "triton", 8, precision="fp8")


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_operation_is_well_formed_and_no_group_is_left_out(kernels):
    ops = step(kernels, dropout=0.1)
    assert {op.group for op in ops} == GROUPS
    for op in ops:
        assert op.bytes > 0 and op.launches > 0 and op.count > 0, op
        assert 0 <= op.fresh <= op.bytes, op
        assert (op.kind == "matmul") == (op.mnk is not None), op
        assert (op.kind == "attention") == (op.scores is not None), op
        if op.mnk:
            m, n, k = op.mnk
            assert op.flops == 2 * m * n * k, op


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
    least = flops.adamw(anatomy.n_params(SHAPE)).bytes
    extra = (
        2 * anatomy.matmul_params(SHAPE) if kernels == "triton" else 8 * anatomy.n_params(SHAPE)
    )  # copies; clip scales
    assert update.bytes == least + extra
    assert update.executions(grad_accum=64) == 1


@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_are_added_for_every_micro_batch_but_the_first(kernels):
    added = named(step(kernels), "gradients added")
    in_place = kernels == "triton"  # all but the head's, whose chunks make a gradient of their own, and the norms'
    outside = SHAPE.vocab_size * SHAPE.n_embd + (2 * SHAPE.n_layer + 1) * SHAPE.n_embd
    assert added.bytes == 12 * (outside if in_place else anatomy.n_params(SHAPE))
    assert [added.executions(accum) for accum in (1, 2, 64)] == [0, 1, 63]


def test_weight_gradients_are_written_once_and_then_added_to_in_place():
    first, later = [op for op in step("triton") if op.name == "mlp up dW"]
    assert later.bytes - first.bytes == 4 * 4 * SHAPE.n_embd**2
    assert [first.executions(3), later.executions(3)] == [SHAPE.n_layer, 2 * SHAPE.n_layer]


@pytest.mark.parametrize("kernels", KERNELS)
def test_dropout_costs_masks_where_they_are_kept_and_random_numbers_in_attention(kernels):
    without, with_it = step(kernels), step(kernels, dropout=0.1)
    assert [{op.scores.dropout for op in ops if op.scores} for ops in (without, with_it)] == [{False}, {True}]
    norms = [total(ops, "bytes", group="norms forward") for ops in (without, with_it)]
    assert norms[1] - norms[0] == (2 * 2 * SHAPE.n_layer * ELEMENTS if kernels.endswith("compile") else 0)
    masks = total(with_it, "bytes") - total(without, "bytes")
    assert masks > 0 if kernels != "triton" else masks == 0, "triton draws the same numbers again"


@pytest.mark.parametrize("kernels", KERNELS)
def test_biases_add_their_gradients(kernels):
    more = total(step(kernels, replace(SHAPE, bias=True)), "bytes") - total(step(kernels), "bytes")
    pass_over_dy = 2 * SHAPE.n_layer * 2 * 9 * ELEMENTS  # two micro-batches, 16 bits
    assert (more > pass_over_dy) == (kernels != "triton"), "triton's c_fc has its gradient from the pass over GELU's"
    assert kernels != "triton" or 5 / 9 * pass_over_dy < more < 0.65 * pass_over_dy


@pytest.mark.parametrize("precision, columns", [("bf16", 5), ("fp8", 5), ("fp16-fast", 0)])
def test_biases_of_linears_whose_dy_no_pass_of_theirs_forms_take_one(precision, columns):
    passes = [
        op for op in step("triton", replace(SHAPE, bias=True), precision=precision) if op.name == "bias gradients"
    ]
    assert sum(op.bytes for op in passes) == 2 * columns * ELEMENTS


def test_fp8_is_in_forward_and_input_gradients_of_the_blocks():
    ops = step("triton", precision="fp8")
    in_fp8 = {op.name for op in ops if op.kind == "matmul" and op.fast}
    assert in_fp8 == {f"{linear} {way}" for linear in LINEARS[:-1] for way in PASSES[:2]}
    names = {op.name for op in ops} ^ {op.name for op in step("triton")}
    assert names == {"fp8 weights", "GELU forward", "GELU backward"}
    narrow = replace(SHAPE, n_head=8)  # heads of 16: attention has no whole groups of columns
    assert {op.name for op in step("triton", narrow, precision="fp8")} - {op.name for op in ops} == {"fp8 quantisation"}
    assert {op.name for op in step("compile", precision="fp8")} - {op.name for op in step("compile")} == {
        "fp8 quantisation"
    }


def test_own_kernels_are_named_as_such():
    assert not any(op.own for kernels in KERNELS[:3] for op in step(kernels))
    assert {op.group for op in step("triton") if op.own} == {
        *(
            "embedding",
            "norms forward",
            "norms backward",
            "attention forward",
            "attention backward",
            "loss",
            "optimizer",
        )
    }
    assert all(op.own for op in step("triton", precision="fp16-fast") if op.kind == "matmul")


# ---------------------------------------------------------------- one fusion off

FUSIONS = [field.name for field in fields(Fusions)]


def without(name, **options):
    return step("triton", fusions=replace(AS_SHIPPED, **{name: False}), **options)


@pytest.mark.parametrize("name", [name for name in FUSIONS if getattr(AS_SHIPPED, name)])
def test_each_fusion_saves_bytes(name):
    shipped, off = step("triton", GPT2_124M), step("triton", GPT2_124M, fusions=replace(AS_SHIPPED, **{name: False}))
    assert total(off, "bytes", accum=4) > total(shipped, "bytes", accum=4)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_changes_no_flops_of_matmuls(name):
    for fusions in (replace(AS_SHIPPED, **{name: False}), replace(AS_SHIPPED, **{name: True})):
        assert total(step("triton", fusions=fusions), "flops", kind="matmul") == total(
            step("triton"), "flops", kind="matmul"
        )


def test_without_attention_norms_or_loss_these_are_what_eager_does():
    for name, groups in {
        "attention": ("attention forward", "attention backward"),
        "norms": ("norms forward", "norms backward"),
        "loss": ("loss",),
        "embedding": ("embedding",),
    }.items():
        for group in groups:
            assert total(without(name), "bytes", group=group) == total(step("eager"), "bytes", group=group), name


def test_the_other_variants_have_no_fusions_to_switch_off():
    nothing = Fusions(**dict.fromkeys(FUSIONS, False))
    for kernels in KERNELS[:3]:
        assert step(kernels, fusions=nothing) == step(kernels)


def test_epilogues_leave_no_pass_for_the_gelu():
    on = step("triton", fusions=replace(AS_SHIPPED, epilogues=True))
    assert {op.group for op in step("triton")} - {op.group for op in on} == {"GELU forward", "GELU backward"}
    saved = total(step("triton"), "bytes", accum=1) - total(on, "bytes", accum=1)
    # Of 10 bytes per element 4 are left: z written beside gelu(z), and read where its gradient is formed.
    assert saved == SHAPE.n_layer * 6 * 4 * ELEMENTS


def test_sums_in_fp16_are_all_but_the_scores():
    shares = [op.summed_in_fp16 for op in step("triton", precision="fp16-fast") if op.kind == "attention"]
    assert shares == [1 / 2, 2 / 3, 3 / 4]
    assert not any(op.summed_in_fp16 for op in step("triton"))


# ---------------------------------------------------------------- what a step really launches

RECORD = """
import json, torch
from fastgpt.training import dry_run
from fastgpt.config import load_preset
from dataclasses import fields, replace

torch.set_num_threads(1)
for precision, n_head, bias in {kinds}:
    config = load_preset("gpt2-40m", "cuda")
    model = replace(config.model, n_layer=2, n_head=n_head, bias=bias)
    config = replace(config, model=model, data=replace(config.data, batch_size=4))
    found = dry_run.record(config, precision, 89, 46, micro_batches=3)
    print(json.dumps([[[list(key), n] for key, n in count.items()] for count in (found.products, found.launches)]
        + [[[name, n, found.moved[name]] for name, n in found.sweeps.items()]]))
"""
KINDS = {
    "bf16": ("bf16", 12, False), "bf16 with biases": ("bf16", 12, True), "fp16-fast": ("fp16-fast", 12, False),
    "fp8 with biases": ("fp8", 12, True), "fp8 with heads of 16": ("fp8", 24, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What RECORD prints of each of KINDS, in a process whose triton compiles."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # without tables that bench.tune has measured here
    command = [sys.executable, "-c", RECORD.format(kinds=list(KINDS.values()))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(KINDS, map(json.loads, done.stdout.splitlines()[-len(KINDS) :])))


@pytest.fixture(scope="module", params=KINDS)
def recorded(request, records):
    """(precision, matrix products of cuBLAS, Triton launches by function, sweeps of PyTorch) of three micro-batches."""
    precision, n_head, bias = KINDS[request.param]
    products, launches, sweeps = records[request.param]
    shape = Shape(n_layer=2, n_head=n_head, n_embd=384, block_size=1024, vocab_size=50304, bias=bias)
    listed = operations.operations(shape, "triton", 4, precision=precision)
    return (
        precision,
        listed,
        Counter({tuple(key[:3]): n for key, n in products}),
        Counter({function: n for (_, function), n in launches}),
        {name: (n, moved) for name, n, moved in sweeps},
    )


def executed(listed, *names, group=None):
    return sum(op.executions(3) for op in listed if (op.group == group if group else op.name in names))


def test_the_matrix_products_listed_are_those_of_a_step(recorded):
    precision, listed, products, launches, _ = recorded
    expected, own = Counter(), 0
    for op in listed:
        if op.kind == "matmul" and not op.own:
            expected[op.mnk] += op.executions(3)
        elif op.kind == "matmul":
            own += op.executions(3)
    assert products == expected
    assert own == launches["linear_kernel"] + launches["weight_grad_kernel"] + launches["fp8_linear_kernel"]
    assert (own == 0) == (precision == "bf16") and (expected.total() == 0) == (precision == "fp16-fast")


def test_the_kernels_listed_are_those_of_a_step(recorded):
    precision, listed, _, launches, _ = recorded
    assert launches["layer_norm_forward_kernel"] == executed(listed, group="norms forward")
    assert launches["layer_norm_backward_kernel"] == executed(listed, group="norms backward")
    # Beside the norms', those of GELU's gradient for a bias.
    more = [op for op in listed if op.name in ("GELU backward", "mlp down dX") and op.launches > 1]
    assert launches["add_up_kernel"] == launches["layer_norm_backward_kernel"] + sum(op.executions(3) for op in more)
    assert launches["forward_kernel"] == executed(listed, "attention forward")
    assert launches["backward_q_kernel"] == executed(listed, "attention backward dQ")
    assert launches["backward_kv_kernel"] == executed(listed, "attention backward dK dV")
    assert launches["rows_kernel"] == executed(listed, "loss rows")
    assert launches["pointwise_kernel"] == executed(listed, "GELU backward")
    assert launches["embedding_forward_kernel"] == executed(listed, "embedding forward") == 3
    assert launches["token_grad_kernel"] == launches["position_grad_kernel"] == executed(listed, "embedding backward")
    quantised = executed(listed, "fp8 quantisation") * 2 + executed(listed, "fp8 weights") * 8
    assert launches["fp8_quantise_kernel"] == quantised
    assert launches["_adamw_kernel"] == executed(listed, "clip and AdamW") == 1


def test_the_passes_listed_move_the_bytes_of_a_step(recorded):
    precision, listed, _, _, sweeps = recorded
    moved = {
        name: sum(op.bytes * op.executions(3) for op in listed if op.name == name) for name in {o.name for o in listed}
    }
    if precision == "bf16":
        assert sweeps["gelu"] == (executed(listed, "GELU forward"), moved["GELU forward"])
    else:
        assert "gelu" not in sweeps and "GELU forward" not in moved
    passes = executed(listed, "bias gradients")  # 5 C columns in 3 tensors, whose sums in fp32 are written
    assert sweeps.get("sum", (0, 0)) == (3 * passes, moved.get("bias gradients", 0) + passes * 4 * 5 * 384)
    assert sweeps["add"] == (4, moved["first norm, gradients added"] + moved["tied gradients added"])
    # The norms' weights are too small to be noted: the head's gradient alone.
    assert sweeps["add_"] == (2, 2 * 12 * 50304 * 384)
    assert moved["gradients added"] == pytest.approx(sweeps["add_"][1], rel=1e-3)


def test_head_dimensions_are_padded_as_each_kernel_does():
    odd = Shape(n_layer=1, n_head=2, n_embd=160, block_size=256, vocab_size=64)  # heads of 80
    forward = {kernels: named(step(kernels, odd), "attention forward") for kernels in ("triton", "eager")}
    assert forward["triton"].flops / forward["eager"].flops == 128 / 96
    assert forward["triton"].bytes == forward["eager"].bytes


def test_heads_are_cut_into_the_groups_that_attention_writes_in_fp8():
    from fastgpt.kernels.quantise import group_size

    for D in (16, 32, 48, 64, 80, 96, 128, 192, 256):
        shape = Shape(n_layer=1, n_head=2, n_embd=2 * D, block_size=64, vocab_size=64)
        assert fp8_group(StepSizes(shape, "triton", "fp8", 1, 64, 0.0, 46, AS_SHIPPED)) == group_size(D)


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


def test_muon_takes_less_than_a_hundredth_of_a_step_on_an_rtx_4070():
    """GPT-2 124M, 524,288 tokens: counted twice, by matrix (flops.muon) and by launch in tiles of 128, and projected."""
    matrices = flops.muon_matrices(anatomy.of(GPT2_124M))
    assert sum(count * n * m for count, n, m in matrices) == anatomy.of(GPT2_124M).block_weights
    ops = {
        optimizer: operations.operations(GPT2_124M, "triton", 8, optimizer=optimizer) for optimizer in ("adamw", "muon")
    }
    muon = [op for op in ops["muon"] if op.name.startswith("Muon")]
    counted = flops.muon(anatomy.of(GPT2_124M))
    assert 1 < sum(op.flops * op.count for op in muon) / counted.flops < 1.1  # tiles on the diagonal are computed whole
    copies = 2 * anatomy.of(GPT2_124M).block_weights
    assert sum(op.bytes * op.count for op in muon) == pytest.approx(counted.bytes + copies, rel=0.01)
    adamw = {name: next(op for op in found if op.name == "clip and AdamW").bytes for name, found in ops.items()}
    assert adamw["adamw"] - adamw["muon"] == (32 + 2) * anatomy.of(GPT2_124M).block_weights
    card = cards.card("rtx4070")
    step = project(GPT2_124M, card, micro_batch=8, tokens_per_step=524_288, optimizer="muon")
    share = sum(op.ms for op in step.operations if op.name.startswith("Muon")) / step.ms_per_step
    assert share < 0.01
    more = step.ms_per_step / project(GPT2_124M, card, micro_batch=8, tokens_per_step=524_288).ms_per_step
    assert 1 < more < 1 + share  # AdamW has less to do
