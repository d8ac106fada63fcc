"""bench.tune: ranking by what the compiler reports, tables that survive interruption, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench import tune
from bench.compiler import ranking, tune_measure, tune_table
from bench.ops import families, linear, table_cases
from bench.ops.common import Family
from bench.reports import timing
from fastgpt import anatomy
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.kernels import runtime, tuning
from tests.bench.compiler.test_ranking import LINEARS, TILES, matmul, rows

RTX_4070 = cards.lookup("rtx4070")
LOSS = next(family for family in families() if family.kernel == "cross_entropy.rows")
UNDER = dict.fromkeys(ranking.ASSUMPTIONS, 1.0)


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    tuning.forget()
    yield
    tuning.forget()


# ---------------------------------------------------------------- families


def test_family_names_are_unique_and_their_buckets_are_those_of_the_launchers():
    found = families()
    assert len({family.name for family in found}) == len(found)
    assert {family.kernel for family in found} == set(tuning.spaces())
    assert "D64 rows<=262144" in next(f for f in found if f.kernel == "attention.forward").buckets


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_family_has_configs_to_compare(family):
    assert len(family.configs()) >= 4
    assert all(tuning.contains(family.kernel, config) for config in family.configs())


@pytest.mark.parametrize("family", LINEARS, ids=lambda family: family.name)
def test_the_launcher_asks_for_the_bucket_that_is_measured(device, family, monkeypatch):
    from fastgpt.kernels import matmul as matmul_module

    asked, choose = [], tuning.choose
    monkeypatch.setattr(tuning, "choose", lambda *args: asked.append(args[:3]) or choose(*args))
    monkeypatch.setattr(linear, "typical_tokens", lambda bucket: 2048)
    bucket = "N128 K64"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_module, "_launch", lambda *_, **__: None)
        patch.setattr(matmul_module, "_weight_grad_in_tiles", lambda *_: None)
        tune_measure.operation(family, bucket, device)()
    assert asked == [(family.kernel, family.dtype, bucket)]


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

    def compile_(family: Family, arch: int, children: tune_table.Children):
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
    tune_table.save(table, path)
    tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
    assert tuning.read(path).entries[key].origin == "measured"


def test_tiles_that_are_ranked_beside_cublas_are_hints_and_in_no_table(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "default_at", lambda family, bucket, default, sms: default)
    monkeypatch.setattr(ranking, "rank", lambda found, *_: [ranking.Ranked(found[0], 1, 1, 1, UNDER)])
    monkeypatch.setattr(ranking, "linear_step", lambda facts: ({}, 0.0))
    tune.main(["--rank", "--kernel", "linear.gelu bf16", "--out", str(tmp_path / "out")])
    (hinted,) = (tmp_path / "out").rglob("*.json")
    assert hinted == tmp_path / "out" / "hints" / "sm89_46.json"
    assert {key.kernel for key in tuning.read(hinted).entries} == {"linear.gelu"}


@pytest.mark.parametrize("path", sorted(tune_table.HINTS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_hints_are_of_matmuls_that_cublas_can_compute(path):
    table = tuning.read(path)
    assert len(table.entries) == 18
    for key, entry in table.entries.items():
        table.check(key.kernel)
        assert tuning.has_library(key.kernel) and entry.origin == "ranked" and entry.config != tuning.CUBLAS


def test_hinted_tiles_are_timed_before_the_models_first():
    here, bucket = tuning.Target(89, 46, 101_376), "N3072 K768"
    (hint, _), *_ = tuning.entries_for(tuning.Key("linear.gelu", "bf16", bucket), here, tune_table.HINTS)
    order = [ranking.Ranked(matmul(config), 1.0, 1.0, 1.0, UNDER) for config in GELU.configs()]
    assert order[0].facts.config != hint.config
    found = tune_measure.candidates(GELU, bucket, order, here, Path("nowhere"))
    assert found[0] == hint.config and found[1] == order[0].facts.config and len(found) == tune_measure.CANDIDATES


@pytest.mark.parametrize("text", ["mine", "softmax"])
def test_a_table_that_cannot_be_read_is_not_overwritten(compiled, tmp_path, text):
    path = tmp_path / "sm89_46.json"
    if text == "softmax":
        tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
        text = path.read_text().replace("cross_entropy.rows", "softmax")
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be used"):
        tune.main(["--rank", "--kernel", "cross_entropy.*bf16", "--out", str(tmp_path)])
    assert path.read_text() == text


# ---------------------------------------------------------------- bad input

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--budget soon", "budget is 'soon': it must be a time such as 90s, 10m or 1h"),
        ("--budget 0m", "budget is '0m'"),
        ("--kernel softmax", "no kernel has that in its name: there are qk_norm_rope.forward"),
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
    with pytest.raises(UserError, match=r"no GPU to measure on, as torch .* sees no CUDA GPU: "):
        tune.main(arguments)


# ---------------------------------------------------------------- measuring, with the clock and the GPU replaced


@pytest.fixture
def measured(monkeypatch, compiled):
    """bench.tune's measuring with times from a table instead of a GPU: {tile: ms}; tiles without one do not fit."""
    milliseconds = {}
    here = tuning.Target(89, 46, 101_376)
    monkeypatch.setattr(tune_measure, "present", lambda: (torch.device("cpu"), RTX_4070, here))

    def time_configs(family, bucket, configs, device, budget_s):
        times = [milliseconds.get((c["tile"], c["num_warps"])) for c in configs]
        problems = [f"{tuning.brief(c)}: OutOfResources" for c, t in zip(configs, times) if t is None]
        return [None if t is None else timing.Timing(t, 0.0, 30) for t in times], problems

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
def test_both_engines_give_the_same_results_where_they_are_timed(device, kernel, monkeypatch):
    """At a small size: the configs are really forced, and the comparison of results sees them."""
    family = next(family for family in LINEARS if family.kernel == kernel)
    tiles = {**TILES, "block_m": 64, "block_n": 32} | ({"splits": 2} if "grad" in kernel else {})
    tiles |= {"chunk": 2} if "fast" in kernel else {}
    first = tuning.CUBLAS if tuning.has_library(kernel) else {**tiles, "block_k": 16}
    monkeypatch.setattr(linear, "typical_tokens", lambda bucket: 128)
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(tune_measure, "interleave", lambda ready, *_, **__: dict.fromkeys(ready, 1.0))
    times, problems = tune_measure.time_configs(family, "N96 K64", [first, tiles], device, 1.0)
    assert times == [1.0, 1.0] and not problems
    monkeypatch.setattr(tune_measure, "TOLERANCE", -1.0)
    _, problems = tune_measure.time_configs(family, "N96 K64", [first, tiles], device, 1.0)
    assert "results differ by" in problems[-1]


@pytest.mark.parametrize("cublas_ms, engine", [(1.0, "cublas"), (3.0, "triton")])
def test_a_matmul_is_measured_beside_cublas_and_the_quicker_one_is_kept(
    measured, tmp_path, monkeypatch, cublas_ms, engine, capsys
):
    def time_configs(family, bucket, configs, device, budget_s):
        assert configs[0] == tuning.CUBLAS and len(configs) == 1 + tune_measure.CANDIDATES
        times = [cublas_ms] + [2.0] * (len(configs) - 1)
        return [timing.Timing(ms, 0.0, 30) for ms in times], []

    monkeypatch.setattr(tune_measure, "time_configs", time_configs)
    monkeypatch.setattr(tuning, "target", lambda device: tuning.Target(89, 46, 101_376))
    family = replace(GELU, buckets=("N3072 K768",))
    monkeypatch.setattr(tune_table, "_compile", lambda family, arch, children: {
        "default": TILES, "compiler": "triton 3.7.1",
        "facts": [matmul(config).to_json() for config in family.configs()],
    })  # fmt: skip
    assert tune_measure.measure([family], tuning.user_folder(), float("inf"), again=False) == 0
    (entry,) = tuning.read(tuning.user_folder() / "sm89_46.json").entries.values()
    assert entry.origin == "measured" and entry.evidence["default_ms"] == cublas_ms
    assert (entry.config == tuning.CUBLAS) == (engine == "cublas")
    tuning.forget()
    from fastgpt.kernels import matmul as matmul_module

    cpu = torch.device("cpu")
    chosen = matmul_module.choose("gelu", 8192, 3072, 768, torch.bfloat16, cpu).config
    assert chosen == entry.config and (chosen == tuning.CUBLAS) == (engine == "cublas")
    assert "cuBLAS" in capsys.readouterr().out


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


def test_backward_runs_in_the_green_context_too(monkeypatch):
    """A context belongs to a thread, and autograd has one of its own."""
    context = Mock()
    monkeypatch.setattr("torch.cuda.green_contexts.GreenContext", Mock(create=lambda **_: context))
    with tune_measure.confined(46, torch.device("cuda", 0), tuning.Target(90, 132, 232_448)) as granted:
        assert granted == runtime.sm_count(torch.device("cuda", 0)) == 48
        assert not torch.autograd.is_multithreading_enabled()
    assert torch.autograd.is_multithreading_enabled()
    assert [name for name, *_ in context.mock_calls] == ["set_context", "pop_context"]


def test_a_card_that_is_too_small_is_told_in_a_sentence():
    here = tuning.Target(89, 46, 101_376)
    with pytest.raises(UserError, match="this GPU has 46"), tune_measure.confined(46, torch.device("cuda", 0), here):
        pass


def test_linears_that_are_tuned_are_those_of_gpt2s_blocks():
    from fastgpt.kernels.matmul import FEWEST_TOKENS, linear_bucket

    widths = [anatomy.of(anatomy.Shape(1, 1, C, 1, 1)).block_linears for C in linear.LINEAR_WIDTHS]
    linears = [linear for width in widths for linear in width]
    forward = {linear_bucket(linear.n_out, linear.n_in, FEWEST_TOKENS) for linear in linears}
    input_grads = {linear_bucket(linear.n_in, linear.n_out, FEWEST_TOKENS) for linear in linears}
    tuned = {family.kernel: set(family.buckets) for family in families() if family.kernel.startswith("linear")}
    assert set().union(*tuned.values()) == forward | input_grads
    assert tuned["linear.weight_grad"] == forward
    up = {linear_bucket(one.n_out, one.n_in, FEWEST_TOKENS) for one in linears if one.sink == "activation"}
    down_grad = {linear_bucket(one.n_in, one.n_out, FEWEST_TOKENS) for one in linears if one.source == "activation"}
    assert (tuned["linear.gelu"], tuned["linear.dgelu"]) == (up, down_grad)


def test_families_are_compiled_ahead_and_what_still_compiles_at_the_end_is_ended(monkeypatch, tmp_path):
    begun, chosen = {}, families()[:4]

    def compile_(family, arch, children):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        begun[family.name] = child
        children.add(child)
        raise RuntimeError(f"ended with {child.wait()}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune_table, "_compile", compile_)
    monkeypatch.setattr(tune_table.os, "cpu_count", lambda: 3)
    with tune_table.compiled_ahead(chosen, 89) as compiled:
        while len(begun) < 2:
            time.sleep(0.01)
        begun[chosen[0].name].kill()
        with pytest.raises(RuntimeError, match="ended with -"):
            compiled(chosen[0])
    assert all(child.poll() is not None for child in begun.values()) and len(begun) <= 3
