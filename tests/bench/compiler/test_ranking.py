"""The model that ranks launch configs: what it takes from the compiler's output, what a tile costs, which comes first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.compiler import ranking
from bench.compiler.ranking import Facts
from bench.ops import families
from bench.ops.attention import batch_heads
from bench.ops.linear import typical_tokens
from fastgpt.hardware import cards
from fastgpt.kernels import matmul as launch
from fastgpt.kernels import tuning
from fastgpt.kernels.fused_attn import attention_bucket

RTX_4070 = cards.lookup("rtx4070")
PLAIN = {"HMMA.16816.F32.BF16": 32, "MUFU.EX2": 64, "FFMA": 150, "LDSM.16.M88.4": 24}
MASKED = {**PLAIN, "FSEL": 128}
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
SMALLER = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
ROWS = {"tile": 4096, "num_warps": 8}
LINEARS = [family for family in families() if family.kernel.startswith("linear")]


def attention(config, blocks_per_sm, plain=PLAIN, masked=MASKED, problem=""):
    return Facts(config, problem, 128, 32_768, config["num_warps"], blocks_per_sm, plain, masked)


def rows(config=ROWS, problem="", blocks_per_sm=6, shared=32):
    return Facts(config, problem, 38, shared, config["num_warps"], blocks_per_sm, {"LDG.E.128": 2, "FADD": 40}, None)


# ---------------------------------------------------------------- what the compiler says

SASS = """
forward:
.text.forward:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
.L_x_2:
        /*0040*/                   LDG.E.128 R4, [R2.64] ;
.L_x_3:
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/              @P2  FSEL R5, R5, -1, P0 ;
        /*0070*/                   BRA `(.L_x_3) ;
        /*0080*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_loops_are_the_innermost_ones_in_order():
    first, second = ranking.loops(SASS)
    assert first == {"HMMA.16816.F32.BF16": 1, "BRA": 1}
    assert second == {"HMMA.16816.F32.BF16": 1, "FSEL": 1, "BRA": 1}


def test_a_kernel_without_loops_has_none():
    assert ranking.loops(SASS[: SASS.index(".L_x_1")]) == []


# ---------------------------------------------------------------- the model


def test_tensor_cores_bind_a_tile_of_nothing_but_products():
    # 32 HMMA of 4096 FLOP in 8 warps, at the 512 FLOP a clock of an SM of a GeForce Ada.
    found = attention(FORWARD, 2, plain={"HMMA.16816.F32.BF16": 32})
    clocks = ranking.tile_clocks(found, found.plain_loop, 0, RTX_4070, blocks_per_sm=2)
    assert clocks == pytest.approx(32 * 4096 * 8 / 512, rel=0.05)


def test_warp_group_products_are_counted_once_for_four_warps():
    one_warp = ranking._tensor_flops("HMMA.16816.F32.BF16", 4)
    group = ranking._tensor_flops("HGMMA.64x32x16.F32.BF16", 4)
    assert one_warp == 4 * 2 * 16 * 8 * 16 and group == 2 * 64 * 32 * 16


def test_more_resident_warps_hide_more():
    found = attention(FORWARD, 2)
    alone, together = (ranking.tile_clocks(found, PLAIN, 8192, RTX_4070, blocks_per_sm=n) for n in (1, 4))
    assert together < alone


def test_blocks_share_an_sm_and_go_where_there_is_room():
    # Two SMs with room for two: three equal blocks of 10 clocks alone. One SM runs two of them at half speed.
    assert ranking.schedule([[10.0], [10.0]], [0, 0, 0], sms=2) == pytest.approx(20)
    # Room for one each: the third waits for the first to end.
    assert ranking.schedule([[10.0]], [0, 0, 0], sms=2) == pytest.approx(20)
    # A short block frees its place for the last one.
    assert ranking.schedule([[10.0, 2.0]], [0, 1, 0], sms=2) == pytest.approx(12)


def test_a_full_wave_has_fill_one_and_one_block_more_costs():
    _, full = ranking.waves_time(46 * 6 * 50, 1e6, 1, rows(), RTX_4070)
    less, _ = ranking.waves_time(46 * 6 * 2, 1e4, 20, rows(), RTX_4070)
    more, _ = ranking.waves_time(46 * 6 * 2 + 1, 1e4, 20, rows(), RTX_4070)
    assert full > 0.98 and more > less * 1.05


@pytest.mark.parametrize("kernel", ["attention.forward", "attention.backward_q", "attention.backward_kv"])
@pytest.mark.parametrize("m, n", [(128, 32), (64, 64), (32, 64)])
def test_causal_tiles_are_those_at_or_below_the_diagonal(kernel, m, n):
    T = 1024
    tiles = ranking._causal_tiles(kernel, {"BLOCK_M": m, "BLOCK_N": n}, T)
    touched = sum(any(q >= k for q in (i + m - 1,) for k in (j,)) for i in range(0, T, m) for j in range(0, T, n))
    whole = sum(i >= j + n - 1 for i in range(0, T, m) for j in range(0, T, n))
    assert sum(full + edge for full, edge in tiles) == touched
    assert sum(full for full, _ in tiles) == whole
    assert tiles[0] == max(tiles, key=sum), "the heaviest block starts first"


@pytest.mark.parametrize(
    "kernel, config, gains", [("forward", FORWARD, (0.2, 0.1, 0.05)), ("backward_kv", SMALLER, (0.03, 0.01, 0.005))]
)
def test_heads_that_take_turns_end_more_evenly(kernel, config, gains):
    found = attention(config, 2)
    for heads, least in zip((24, 48, 96), gains):
        one_by_one, together = (
            ranking.attention_time(f"attention.{kernel}", found, heads, 1024, 64, replace(RTX_4070, l2_mb=l2_mb))
            for l2_mb in (0.01, 36)
        )
        assert together[0] < (1 - least) * one_by_one[0] and together[1] > max(0.93, one_by_one[1])


def test_gpt2_124m_counts_in_its_bucket_and_no_other():
    bucket = attention_bucket(64, 8 * 12 * 1024, plain=True, dropout=False)
    assert batch_heads(bucket)[-1] == 96
    assert 96 not in batch_heads("D64 rows<=65536") and 96 not in batch_heads("D64 rows>1048576")


# ---------------------------------------------------------------- linear layers

TILES = {"block_m": 128, "block_n": 128, "block_k": 32, "group": 8, "num_warps": 8, "num_stages": 4}
STEP = {"HMMA.16816.F32.BF16": 32, "LDSM.16.M88.4": 12, "IADD3": 20}  # a warp's, for a block of 32 of K
FAST_STEP = {"HMMA.16816.F16": 32, "HADD2.F32": 64, "FADD": 64, "IADD3": 20}


def matmul(config=TILES, loop=STEP, blocks_per_sm=1, problem=""):
    return Facts(config, problem, 151, 49_152, config["num_warps"], blocks_per_sm, loop, loop)


def test_products_summed_in_fp16_take_half_the_tensor_cores_clocks_on_geforce_and_as_many_elsewhere():
    loops = [matmul(loop={op: 64}) for op in ("HMMA.16816.F32", "HMMA.16816.F16")]
    for name, ratio in (("rtx4070", 2), ("a100", 1)):
        card = cards.lookup(name)
        full, fast = (ranking.tile_parts(each, each.plain_loop, 0, card)["tensor"] for each in loops)
        assert full / fast == ratio


def test_a_loop_that_holds_several_blocks_of_k_counts_one_and_a_promotion_once_per_chunk():
    body, read = ranking.linear_step(matmul(loop={op: 2 * count for op, count in STEP.items()}))
    assert body == STEP and read == 2 * (128 + 128) * 32
    body, _ = ranking.linear_step(matmul({**TILES, "chunk": 4}, FAST_STEP))
    assert (body["FADD"], body["HADD2.F32"], body["HMMA.16816.F16"], body["IADD3"]) == (16, 16, 32, 20)


def linear_time(kernel="linear.gelu", config=TILES, N=768, K=768, tokens=8192, gpu=RTX_4070, **facts):
    return ranking.linear_time(kernel, matmul(config, **facts), N, K, tokens, gpu)


def test_a_wave_of_tiles_more_costs_a_wave():
    full, fill = linear_time(N=128, tokens=46 * 128)
    more, less_fill = linear_time(N=128, tokens=47 * 128)
    assert fill > 0.99 and more == pytest.approx(2 * full) and less_fill == pytest.approx(47 / 92)


def test_a_weight_gradient_that_leaves_sms_idle_gains_from_a_split_and_a_large_one_does_not():
    def at(N, K, splits):
        return linear_time("linear.weight_grad", {**TILES, "splits": splits}, N, K)[0]

    assert at(384, 384, 5) < 0.5 * at(384, 384, 1)
    assert at(50304, 768, 2) > at(50304, 768, 1)


@pytest.mark.parametrize("C, tokens", [(384, 16384), (768, 8192), (1024, 2048)])
def test_a_bucket_is_timed_at_its_models_micro_batch(C, tokens):
    for N, K in ((3 * C, C), (C, C), (C, 4 * C)):
        bucket = launch.linear_bucket(N, K, tokens)
        assert bucket is not None and typical_tokens(bucket) == tokens
    assert launch.linear_bucket(C, C, 2047) is None


@pytest.mark.parametrize("family", LINEARS, ids=lambda family: family.name)
def test_cublas_is_what_a_matmul_is_compared_with_and_is_not_compiled(family):
    has = tuning.CUBLAS in tuning.spaces()[family.kernel].configs
    assert has == tuning.has_library(family.kernel) == (not family.kernel.startswith("linear_fast"))
    assert tuning.CUBLAS not in family.configs()


def test_no_config_sums_more_products_in_fp16_than_the_error_allows():
    for kernel, space in tuning.spaces().items():
        if kernel.startswith("linear_fast"):
            limit = launch.CHUNK_LIMITS["weight_grad" if "weight_grad" in kernel else "linear"]
            products = {config["chunk"] * config["block_k"] for config in space.configs}
            assert max(products) == limit <= 128
    assert launch.CHUNK_LIMITS == {"linear": 128, "weight_grad": 64}, "docs/precision-modes.md"


# ---------------------------------------------------------------- ranking


def family_of(kernel, bucket):
    return next(f for f in families() if (f.kernel, f.dtype_name) == (kernel, "bf16") and bucket in f.buckets)


def rank(found, default=ROWS, kernel="cross_entropy.rows", bucket="V>=8192", gpu=RTX_4070):
    return family_of(kernel, bucket).rank(bucket, found, default, gpu)


def test_configs_with_a_problem_are_out():
    order = rank([rows(problem="spills 8 bytes"), rows({"tile": 2048, "num_warps": 4})])
    assert [r.facts.config["tile"] for r in order] == [2048]
    assert order[0].over_default is None, "the default is out, so nothing is over it"


def test_nothing_is_ranked_where_everything_spills():
    assert rank([rows(problem="spills 8 bytes")]) == []


def test_the_default_stays_unless_another_is_better_by_more_than_the_model_can_tell():
    order = rank([rows({"tile": 2048, "num_warps": 8}), rows()])
    assert order[0].facts.config == ROWS
    slow = replace(rows(), plain_loop={"FADD": 40_000})
    assert rank([rows({"tile": 2048, "num_warps": 8}), slow])[0].facts.config["tile"] == 2048


SHARED = {"LDSM.16.M88.4": 512, "LDSM.16.MT88.2": 256, "LDSM.16.M88": 128, "STSM.16.M88.4": 512, "LDS.128": 512, "LDS": 128,
          "STS.64": 256, "LDS.U16": 64, "LDS.S8": 32, "LDGSTS.E.BYPASS.128": 512, "LDG.E.128": 0,
          "HGMMA.64x32x16.F32.BF16": 256, "HMMA.16816.F32.BF16": 0, "LDSX": 0}  # fmt: skip


@pytest.mark.parametrize("op", SHARED)
def test_shared_memory_is_counted_by_instruction(op):
    """Bytes of a warp: 32 lanes, 8 x 8 matrices of 16 bits, a quarter of a warp group's second operand."""
    assert ranking._shared_bytes(op) == SHARED[op]
    parts = ranking.tile_parts(attention(FORWARD, 2), {op: 3}, 0, RTX_4070)
    assert parts["shared"] == 3 * SHARED[op] * 8 / 128


def test_waits_for_l2_are_hidden_by_asynchronous_copies_until_l2_is_the_limit():
    def clocks(l2_bytes, body):
        found = attention(FORWARD, 2, plain=body)
        parts = ranking.tile_parts(found, body, l2_bytes, RTX_4070)
        return ranking.tile_clocks(found, body, l2_bytes, RTX_4070, blocks_per_sm=2), parts["l2"]

    copying = {**PLAIN, "LDGSTS.E.BYPASS.128": 4}
    assert clocks(8192, copying)[0] == clocks(0, copying)[0] and clocks(8192, PLAIN)[0] > clocks(0, PLAIN)[0]
    slow, l2 = clocks(2**20, copying)
    assert slow > l2 == 2**20 / 13


def test_what_is_nowhere_far_behind_comes_before_what_is_first_under_one_assumption():
    def found(name, **parts):
        return Facts({"name": name, "num_warps": 4}, "", 64, 0, 4, 1, parts, parts)

    quick = found("quick", tensor=90, l2=0, shared=60)  # the quickest unless nothing overlaps
    steady = found("steady", tensor=92, l2=0, shared=10)

    def times(facts):
        return [(ranking._together(facts.plain_loop, 4.0, ()), 1.0)]

    order = ranking.rank([quick, steady], {}, times)
    assert [item.facts for item in order] == [steady, quick]
    assert order[0].time == pytest.approx(92 / 90) and order[1].under["nothing overlaps"] == pytest.approx(150 / 102)
    assert set(order[0].under) == set(ranking.ASSUMPTIONS) == {"usual", "all overlaps", "nothing overlaps", "no L2"}


def test_buckets_take_one_config_where_the_model_cannot_tell_them_apart():
    def ranked(name, time, over_default=0.9):
        return ranking.Ranked(Facts({"name": name}, ""), time, 1.0, over_default, {})

    orders = {
        "few": [ranked("small", 1.0), ranked("large", 1.2)],
        "some": [ranked("other", 1.0), ranked("large", 1.02)],
        "more": [ranked("large", 1.0), ranked("other", 1.1)],
        "none": [],
        "default": [ranked("default", 1.0, 1.0), ranked("large", 1.01, 1.01)],
    }
    chosen = {bucket: item.facts.config["name"] for bucket, item in ranking.settle(orders).items()}
    assert chosen == {"few": "small", "some": "large", "more": "large", "default": "default"}


def test_few_rows_want_smaller_blocks_than_many():
    both = [attention(FORWARD, 2), attention(SMALLER, 5, {k: v / 2 for k, v in PLAIN.items()})]
    clocks = family_of("attention.forward", "D64 rows<=16384").clocks
    few, many = (clocks(f"D64 rows<={most}", both[0], RTX_4070) for most in (16384, 1048576))
    assert max(fill for _, fill in few[:2]) < 0.75 < min(fill for _, fill in many)


def test_a_persistent_kernel_is_given_no_more_programs_than_fit():
    config = {"rows": 2, "num_warps": 8, "programs_per_sm": 2, "num_stages": 2}
    found = [replace(rows(config), blocks_per_sm=2), replace(rows({**config, "programs_per_sm": 3}), blocks_per_sm=2)]
    order = rank(found, config, "layer_norm.backward", "C768")
    assert [r.facts.config["programs_per_sm"] for r in order] == [2]
