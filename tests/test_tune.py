"""bench.tune: ranking by what the compiler reports, tables that survive interruption, and bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import tune, tune_measure, tune_table
from bench.tune_cases import Family, families, table_cases
from fastgpt import hardware
from fastgpt.errors import UserError
from fastgpt.kernels import config_space, ranking, tuning
from fastgpt.kernels.ranking import Facts

RTX_4070 = hardware.lookup("rtx4070")
PLAIN = {"HMMA.16816.F32.BF16": 32, "MUFU.EX2": 64, "FFMA": 150, "LDSM.16.M88.4": 24}
MASKED = {**PLAIN, "FSEL": 128}
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
SMALLER = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
ROWS = {"tile": 4096, "num_warps": 8}
LOSS = next(family for family in families() if family.kernel == "cross_entropy.rows")


def attention(config, blocks_per_sm, plain=PLAIN, masked=MASKED, problem=""):
    return Facts(config, problem, 128, 32_768, config["num_warps"], blocks_per_sm, plain, masked)


def rows(config=ROWS, problem="", blocks_per_sm=6, shared=32):
    return Facts(config, problem, 38, shared, config["num_warps"], blocks_per_sm, {"LDG.E.128": 2, "FADD": 40}, None)


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    tuning.forget()
    yield
    tuning.forget()


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


def test_gpt2_124m_counts_in_its_bucket_and_no_other():
    bucket = config_space.attention_bucket(64, 8 * 12 * 1024, plain=True, dropout=False)
    assert ranking.sizes(bucket)[-1] == 96
    assert 96 not in ranking.sizes("D64 rows<=65536") and 96 not in ranking.sizes("D64 rows>1048576")


# ---------------------------------------------------------------- linear layers

TILES = {"block_m": 128, "block_n": 128, "block_k": 32, "group": 8, "num_warps": 8, "num_stages": 4}
STEP = {"HMMA.16816.F32.BF16": 32, "LDSM.16.M88.4": 12, "IADD3": 20}  # a warp's, for a block of 32 of K
FAST_STEP = {"HMMA.16816.F16": 32, "HADD2.F32": 64, "FADD": 64, "IADD3": 20}


def matmul(config=TILES, loop=STEP, blocks_per_sm=1, problem=""):
    return Facts(config, problem, 151, 49_152, config["num_warps"], blocks_per_sm, loop, loop)


def test_products_summed_in_fp16_take_half_the_tensor_cores_clocks_on_geforce_and_as_many_elsewhere():
    loops = [matmul(loop={op: 64}) for op in ("HMMA.16816.F32", "HMMA.16816.F16")]
    for name, ratio in (("rtx4070", 2), ("a100", 1)):
        card = hardware.lookup(name)
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
        bucket = config_space.linear_bucket(N, K, tokens)
        assert bucket is not None and ranking.typical_tokens(bucket) == tokens
    assert config_space.linear_bucket(C, C, 2047) is None


LINEARS = [family for family in families() if family.kernel.startswith("linear")]


@pytest.mark.parametrize("family", LINEARS, ids=lambda family: family.name)
def test_the_launcher_asks_for_the_bucket_that_is_measured(family, monkeypatch):
    from fastgpt.kernels import _linear_launch

    asked, choose = [], tuning.choose
    monkeypatch.setattr(tuning, "choose", lambda *args: asked.append(args[:3]) or choose(*args))
    monkeypatch.setattr(ranking, "typical_tokens", lambda bucket: 2048)
    bucket = "N128 K64"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear_launch, "_launch", lambda *_, **__: None)
        patch.setattr(_linear_launch, "_weight_grad_in_tiles", lambda *_: None)
        tune_measure.operation(family, bucket, torch.device("cpu"))()
    assert asked == [(family.kernel, family.dtype, bucket)]


@pytest.mark.parametrize("family", LINEARS, ids=lambda family: family.name)
def test_cublas_is_what_a_matmul_is_compared_with_and_is_not_compiled(family):
    has = config_space.CUBLAS in config_space.spaces()[family.kernel]
    assert has == config_space.has_library(family.kernel) == (not family.kernel.startswith("linear_fast"))
    assert config_space.CUBLAS not in family.configs()


def test_no_config_sums_more_products_in_fp16_than_the_error_allows():
    for kernel, space in config_space.spaces().items():
        if kernel.startswith("linear_fast"):
            limit = config_space.CHUNK_LIMITS["weight_grad" if "weight_grad" in kernel else "linear"]
            products = {config["chunk"] * config["block_k"] for config in space}
            assert max(products) == limit <= 128
    assert config_space.CHUNK_LIMITS == {"linear": 128, "weight_grad": 64}, "docs/precision-modes.md"


# ---------------------------------------------------------------- ranking


def rank(found, default=ROWS, kernel="cross_entropy.rows", bucket="V>=8192", gpu=RTX_4070):
    return ranking.rank(kernel, "bf16", bucket, found, default, gpu)


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


def test_few_rows_want_smaller_blocks_than_many():
    both = [attention(FORWARD, 2), attention(SMALLER, 5, {k: v / 2 for k, v in PLAIN.items()})]
    few = ranking.times("attention.forward", "bf16", "D64 rows<=16384", both[0], RTX_4070)
    many = ranking.times("attention.forward", "bf16", "D64 rows<=1048576", both[0], RTX_4070)
    assert max(fill for _, fill in few[:2]) < 0.75 < min(fill for _, fill in many)


def test_a_persistent_kernel_is_given_no_more_programs_than_fit():
    config = {"rows": 2, "num_warps": 8, "programs_per_sm": 2, "num_stages": 2}
    found = [replace(rows(config), blocks_per_sm=2), replace(rows({**config, "programs_per_sm": 3}), blocks_per_sm=2)]
    order = rank(found, config, "layer_norm.backward", "C768")
    assert [r.facts.config["programs_per_sm"] for r in order] == [2]


# ---------------------------------------------------------------- families


def test_family_names_are_unique_and_their_buckets_are_those_of_the_launchers():
    found = families()
    assert len({family.name for family in found}) == len(found)
    assert {family.kernel for family in found} == set(config_space.spaces())
    assert "D64 rows<=262144" in next(f for f in found if f.kernel == "attention.forward").buckets


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_family_has_configs_to_compare(family):
    assert len(family.configs()) >= 4
    assert all(config_space.contains(family.kernel, config) for config in family.configs())


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_the_audit_is_given_every_config_that_ships_once(arch, monkeypatch):
    monkeypatch.setattr(tuning, "SHIPPED", Path(tuning.__file__).parent / "tables")
    family_of = {(f.kernel, f.dtype_name, bucket): f.name for f in families() for bucket in f.buckets}
    tables = [tuning.read(path) for path in tuning.SHIPPED.glob(f"sm{arch}_*.json")]
    shipped = {(family_of[key], str(sorted(e.config.items()))) for table in tables for key, e in table.entries.items()}
    cases = table_cases(arch)
    assert len(cases) == len(shipped) >= 10 and len({name for name, _ in cases}) == len(cases)


# ---------------------------------------------------------------- bench.tune --rank


@pytest.fixture
def compiled(monkeypatch):
    """What compiling would find, without compiling: {family name: facts}; and the calls made."""
    calls = []

    def compile_(family: Family, arch: int):
        calls.append((family.name, arch))
        default = family.configs()[0]
        facts = [rows(config, blocks_per_sm=6) for config in family.configs()]
        facts[-1] = rows(family.configs()[-1], problem="spills 8 bytes")
        return {"default": default, "compiler": "triton 3.7.1", "facts": [one.to_json() for one in facts]}

    monkeypatch.setattr(tune_table, "_compile", compile_)
    return calls


def test_rank_writes_a_table_that_training_can_read(compiled, tmp_path, capsys):
    code = tune.main(
        ["--rank", "--kernel", "cross_entropy.*bf16", "--arch", "sm_89", "--sms", "46", "--out", str(tmp_path)]
    )
    table = tuning.read(tmp_path / "sm89_46.json")
    assert code == 0 and table.gpu == RTX_4070.name and table.compiler == "triton 3.7.1"
    (entry,) = table.entries.values()
    assert entry.origin == "ranked" and entry.evidence["compared"] == 8 and entry.resources["registers"] == 38
    shown = capsys.readouterr().out
    assert "9 configs compiled, 1 of them spill or do not fit" in shown and "Ranked, not measured" in shown


def test_what_was_compiled_is_kept_for_the_next_run_and_the_next_card(compiled, tmp_path):
    for sms in ("46", "128", "46"):
        tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--sms", sms, "--out", str(tmp_path)])
    assert compiled == [(LOSS.name, 89)]
    assert {path.name for path in tmp_path.glob("*.json")} == {"sm89_46.json", "sm89_128.json"}


def test_a_damaged_file_of_what_was_compiled_is_made_anew(compiled, tmp_path):
    tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
    (kept,) = (tuning.user_folder() / "compiled").iterdir()
    kept.write_text("{")
    tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
    assert len(compiled) == 2 and json.loads(kept.read_text())["facts"]


def test_a_budget_that_is_up_keeps_what_is_done_and_says_what_is_left(compiled, tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 1.0, 100.0, 100.0, 100.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    code = tune.main(["--rank", "--kernel", "cross_entropy", "--budget", "10s", "--out", str(tmp_path)])
    assert code == 1 and len(tuning.read(tmp_path / "sm89_46.json").entries) == 1
    assert "2 families are left; run the same command again" in capsys.readouterr().out


def test_a_card_is_told_from_others_of_its_sm_count_by_name(compiled, tmp_path):
    tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--gpu", "h200", "--out", str(tmp_path)])
    assert tuning.read(tmp_path / "sm90_132.json").gpu == "NVIDIA H200"


def test_ranking_leaves_measured_entries_alone(compiled, tmp_path):
    tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
    path = tmp_path / "sm89_46.json"
    table = tuning.read(path)
    ((key, entry),) = table.entries.items()
    table.entries[key] = replace(entry, origin="measured", evidence={"ms": 1.0})
    table.save(path)
    tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
    assert tuning.read(path).entries[key].origin == "measured"


def test_a_table_that_cannot_be_read_is_not_overwritten(compiled, tmp_path):
    path = tmp_path / "sm89_46.json"
    path.write_text("mine")
    with pytest.raises(UserError, match="cannot be used"):
        tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
    assert path.read_text() == "mine"


# ---------------------------------------------------------------- bad input

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--budget soon", "budget is 'soon': it must be a time such as 90s, 10m or 1h"),
        ("--budget 0m", "budget is '0m'"),
        ("--kernel softmax", "no kernel has that in its name: there are attention.forward"),
        ("--kernel (", "not a regular expression"),
        ("--rank --arch sm_70", "arch is 'sm_70': it must be one of sm_80, sm_86, sm_89, sm_90, sm_120"),
        ("--rank --arch ampere", "arch is 'ampere'"),
        ("--rank --arch sm_89 --sms 47", "sms is 47: cards of sm_89 in the table have"),
        ("--rank --gpu rtx9999", "gpu is 'rtx9999', which is not in the table: nearest are"),
        ("--rank --gpu v100", "kernels are compiled for sm_80 and later"),
        ("--rank --gpu h200 --sms 132", "leave out --arch and --sms"),
        ("--sms 46", "add --rank"),
        ("--gpu h200", "add --rank"),
        ("--rank --check-model", "leave one out"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as caught:
        tune.main(arguments.split())
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@no_gpu
@pytest.mark.parametrize("arguments", [[], ["--check-model"]])
def test_without_a_gpu_measuring_ends_with_a_sentence(arguments):
    with pytest.raises(UserError, match="sees no CUDA GPU to measure on"):
        tune.main(arguments)


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("10m", 600), ("1h", 3600), ("300", 300), ("1.5m", 90)])
def test_budgets(text, seconds):
    assert tune.parse_budget(text) == seconds


# ---------------------------------------------------------------- measuring, with the clock and the GPU replaced


@pytest.fixture
def measured(monkeypatch, compiled):
    """bench.tune's measuring with times from a table instead of a GPU: {tile: ms}; tiles without one do not fit."""
    milliseconds = {}
    here = tuning.Target(89, 46, 101_376)
    monkeypatch.setattr(tune_measure, "present", lambda: (torch.device("cpu"), RTX_4070, here))

    def time_configs(family, bucket, configs, device, budget_s):
        times = [milliseconds.get((c["tile"], c["num_warps"])) for c in configs]
        problems = [f"{tune_table.brief(c)}: OutOfResources" for c, t in zip(configs, times) if t is None]
        return [None if t is None else tune_measure.Timing(t, 0.0, 30) for t in times], problems

    monkeypatch.setattr(tune_measure, "time_configs", time_configs)
    milliseconds.update({(tile, warps): 2.0 for tile in (2048, 4096, 8192) for warps in (4, 8, 16)})
    return milliseconds


def measure(tmp_path, deadline=float("inf"), again=False):
    return tune_measure.measure([LOSS], tmp_path, deadline, again=again)


def test_the_quickest_config_is_kept_with_its_and_the_defaults_time(measured, tmp_path):
    measured[4096, 4] = 1.5
    assert measure(tmp_path) == 0
    (entry,) = tuning.read(tmp_path / "sm89_46.json").entries.values()
    assert entry.origin == "measured" and entry.config == {"tile": 4096, "num_warps": 4}
    assert (entry.evidence["ms"], entry.evidence["default_ms"]) == (1.5, 2.0)


def test_a_config_that_does_not_fit_is_left_out_and_said(measured, tmp_path, capsys):
    del measured[4096, 4]
    assert measure(tmp_path) == 0
    assert "left out: cross_entropy.rows tile=4096 w4: OutOfResources" in capsys.readouterr().out
    assert tuning.read(tmp_path / "sm89_46.json").entries


def test_a_second_run_measures_only_what_is_missing_unless_told(measured, tmp_path):
    measure(tmp_path)
    measured[4096, 4] = 0.5
    measure(tmp_path)
    (entry,) = tuning.read(tmp_path / "sm89_46.json").entries.values()
    assert entry.evidence["ms"] == 2.0
    measure(tmp_path, again=True)
    (entry,) = tuning.read(tmp_path / "sm89_46.json").entries.values()
    assert entry.evidence["ms"] == 0.5


def test_no_time_left_measures_nothing_and_says_so(measured, tmp_path, capsys):
    assert measure(tmp_path, deadline=0.0) == 1
    assert "1 buckets are left" in capsys.readouterr().out
    assert not (tmp_path / "sm89_46.json").exists()


GELU = next(family for family in LINEARS if family.name == "linear.gelu bf16")


@pytest.mark.parametrize("kernel", ["linear.gelu", "linear.dgelu", "linear.weight_grad_bias", "linear_fast.none"])
def test_both_engines_give_the_same_results_where_they_are_timed(kernel, monkeypatch):
    """In the interpreter, at a small size: the configs are really forced, and the comparison of results sees them."""
    family = next(family for family in LINEARS if family.kernel == kernel)
    tiles = {**TILES, "block_m": 64, "block_n": 32} | ({"splits": 2} if "grad" in kernel else {})
    tiles |= {"chunk": 2} if "fast" in kernel else {}
    first = config_space.CUBLAS if config_space.has_library(kernel) else {**tiles, "block_k": 16}
    monkeypatch.setattr(ranking, "typical_tokens", lambda bucket: 128)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(tune_measure, "interleave", lambda ready, *_, **__: dict.fromkeys(ready, 1.0))
    times, problems = tune_measure.time_configs(family, "N96 K64", [first, tiles], torch.device("cpu"), 1.0)
    assert times == [1.0, 1.0] and not problems
    monkeypatch.setattr(tune_measure, "TOLERANCE", -1.0)
    _, problems = tune_measure.time_configs(family, "N96 K64", [first, tiles], torch.device("cpu"), 1.0)
    assert "results differ by" in problems[-1]


@pytest.mark.parametrize("cublas_ms, engine", [(1.0, "cublas"), (3.0, "triton")])
def test_a_matmul_is_measured_beside_cublas_and_the_quicker_one_is_kept(
    measured, tmp_path, monkeypatch, cublas_ms, engine, capsys
):
    def time_configs(family, bucket, configs, device, budget_s):
        assert configs[0] == config_space.CUBLAS and len(configs) == 1 + tune_measure.CANDIDATES
        times = [cublas_ms] + [2.0] * (len(configs) - 1)
        return [tune_measure.Timing(ms, 0.0, 30) for ms in times], []

    monkeypatch.setattr(tune_measure, "time_configs", time_configs)
    monkeypatch.setattr(tuning, "target", lambda device: tuning.Target(89, 46, 101_376))
    family = replace(GELU, buckets=("N3072 K768",))
    monkeypatch.setattr(tune_table, "_compile", lambda family, arch: {
        "default": TILES, "compiler": "triton 3.7.1",
        "facts": [matmul(config).to_json() for config in family.configs()],
    })  # fmt: skip
    assert tune_measure.measure([family], tuning.user_folder(), float("inf"), again=False) == 0
    (entry,) = tuning.read(tuning.user_folder() / "sm89_46.json").entries.values()
    assert entry.origin == "measured" and entry.evidence["default_ms"] == cublas_ms
    assert (entry.config == config_space.CUBLAS) == (engine == "cublas")
    tuning.forget()
    from fastgpt.kernels import _linear_launch

    cpu = torch.device("cpu")
    assert _linear_launch.engine(8192, 3072, 768, torch.bfloat16, "gelu", cpu) == engine
    assert "cublas=1" in capsys.readouterr().out


# ---------------------------------------------------------------- the check of the model


def test_the_share_of_cases_in_which_the_model_is_right():
    cases = [{"first_ms": 1.04, "best_ms": 1.0}, {"first_ms": 1.06, "best_ms": 1.0}, {"first_ms": 1.0, "best_ms": 1.0}]
    found = tune_measure.summary(cases, 48)
    assert found["close"] == 2 and found["share"] == pytest.approx(2 / 3)
    assert found["sentence"].startswith(
        "On 48 SMs the model's first choice is within 5% of the best measured in 2 of 3"
    )


@pytest.mark.parametrize("asked, arch, granted", [(46, 89, 46), (45, 80, 46), (46, 90, 48), (48, 90, 48)])
def test_a_green_context_gets_sms_in_the_units_of_its_architecture(asked, arch, granted):
    assert tune_measure.granted_sms(asked, arch) == granted


@no_gpu
def test_a_torch_without_green_contexts_is_told_in_a_sentence():
    here = tuning.Target(90, 132, 232_448)
    with pytest.raises(UserError, match="green context"), tune_measure.confined(46, torch.device("cuda", 0), here):
        pass


def test_a_card_that_is_too_small_is_told_in_a_sentence(monkeypatch):
    from torch.cuda import green_contexts

    monkeypatch.setattr(green_contexts, "SUPPORTED", True)
    here = tuning.Target(89, 46, 101_376)
    with pytest.raises(UserError, match="this GPU has 46"), tune_measure.confined(46, torch.device("cuda", 0), here):
        pass
