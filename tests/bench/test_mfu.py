"""python -m bench.mfu: what it accepts, what it measures on a CPU, what it adds of a GPU that is not here."""

from __future__ import annotations

import gzip
import json
import re
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

from bench import mfu
from bench.reports import mfu_tables, timing
from bench.steps import profile, turns
from bench.steps.profile import mfu_figures
from bench.steps.turns import Setup
from bench.steps.variants import BACKENDS
from fastgpt import command, common
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, ModelConfig, Precision
from fastgpt.hardware import cards, requirements
from fastgpt.ops import usable_precision
from fastgpt.performance.operations import GAPS, operations
from tests.bench.mfu_run import CEILINGS, INTERPRETED, TINY, quick, quick_run, result, with_flags

__all__ = ["quick", "result"]  # fixtures

CPU = torch.device("cpu")


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("text", ["L2H6C192T128V1024", "l2-h6-c192-t128-v1024", "V1024 T128 C192 H6 L2"])
def test_a_shape_can_be_given_in_letters(text):
    config, batch = mfu.model(text, "cpu")
    assert Shape.of(config) == Shape(2, 6, 192, 128, 1024) and batch == 4


def test_what_is_interpreted_has_heads_like_gpt2s_and_matmuls_that_can_be_told_apart():
    config, _ = mfu.model(mfu.TINY, "cpu")
    rows, sizes = 2 * config.block_size, {config.n_embd, 3 * config.n_embd, 4 * config.n_embd, config.vocab_size}
    assert config.n_embd // config.n_head == 64 and len(sizes) == 4 and rows not in sizes


def test_a_preset_brings_its_batch():
    config, batch = mfu.model("gpt2-124m", "cuda")
    assert Shape.of(config) == GPT2_124M and batch == 8


def test_a_large_model_gets_a_small_batch_on_a_cpu_unless_told_otherwise():
    def batch(*flags):
        return mfu.setup_of(command.parse(mfu.MfuConfig, flags, "bench.mfu"), CPU, "fp32").batch_size

    assert (batch(), batch("--model", "gpt2-40m"), batch("--model", "gpt2-40m", "--batch", "3")) == (4, 1, 3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "gpt5"], r"model is 'gpt5': it can be demo, .*gpt2-124m.*, or a shape such as L2H6C192T128V1024"),
        (["--model", "L2H6C192"], r"model is 'L2H6C192': it can be"),
        (["--model", "L2L6C192T128V1024"], r"model is 'L2L6C192T128V1024': it can be"),
        (["--model", "L1H3C32T32V160"], r"n_embd is 32, which n_head 3 does not divide"),
        (["--model", "L1H2C32T32V70000"], r"vocab_size is 70000: token files hold 16 bits"),
        (["--backends", "eager,tpu"], r"backends has 'tpu': it can hold eager, compile, .*triton"),
        (["--backends", ","], r"backends is empty: name some of eager"),
        (["--backends", "triton+compile"], r"backends has 'triton\+compile', which needs a CUDA GPU"),
        (
            ["--backends", "triton,eager", "--precision", "fp8"],
            r"backends has 'eager', which does not have precision 'fp8': triton and triton\+compile have it",
        ),
        (["--backends", "triton+compile", "--precision", "fp16-fast"], r"'triton\+compile', which needs a CUDA GPU"),
        (["--batch", "0"], r"batch is 0: it must be at least 1"),
        (["--seq", "-1"], r"seq is -1: it must be at least 1"),
        (["--steps", "0"], r"steps is 0: it must be at least 1"),
        (["--grad-accum", "0"], r"grad-accum is 0: it must be at least 1"),
        (["--gpu", "rtx4071"], r"gpu is 'rtx4071', which is not in the table: nearest are .*4070"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_anything_is_measured(flags, sentence, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UserError, match=sentence):
        mfu.main(with_flags(quick, flags))
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_ends_in_one_sentence(quick, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device is 'cuda' but torch .* sees no CUDA GPU"):
        mfu.main(with_flags(quick, ["--device", "cuda"]))


def test_where_the_kernels_cannot_run_the_remedy_is_a_flag_that_this_command_has(quick, monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: use --backends eager,compile [(]plain PyTorch[)], or"):
        mfu.main(with_flags(quick, ["--backends", "triton"]))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    with pytest.raises(UserError, match=r"use --backends eager,compile --precision fp16$"):
        mfu.main(with_flags(quick, ["--device", "cuda", "--backends", "triton+compile"]))


@pytest.mark.parametrize("flag", ["--out", "--trace"])
def test_a_folder_that_cannot_be_written_ends_in_one_sentence_and_exit_code_2(
    flag, quick, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["bench.mfu", *with_flags(quick, [flag, str(tmp_path / "file" / "traces")])])
    with pytest.raises(SystemExit) as end:
        common.run(mfu.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "which cannot be written (Not a directory): name another" in error
    assert len(error.splitlines()) == 1


def test_precisions_are_those_of_training():
    with pytest.raises(UserError, match=f"it can be {', '.join(get_args(Precision))}"):
        mfu.main(["--precision", "fp17"])


def test_help_names_every_flag_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        mfu.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.count("python -m bench.mfu") >= 5
    flags = (
        "--model",
        "--precision",
        "--batch",
        "--seq",
        "--backends",
        "--steps",
        "--out",
        "--device",
        "--json",
        "--trace",
        "--from",
        "--gpu",
    )
    assert all(flag in text for flag in flags)


# ---------------------------------------------------------------- what is measured


def test_the_result_says_what_was_measured_where_and_by_which_formula(result):
    found, out = result
    assert (found["schema"], found["schema_version"], found["status"]) == ("fastgpt.mfu", 1, "measured")
    assert found["environment"]["torch"] == torch.__version__ and found["environment"]["device"]
    assert {"commit", "python", "triton", "time"} <= set(found["environment"])
    assert found["setup"]["shape"]["n_embd"] == 32 and found["setup"]["tokens_per_step"] == 64
    eager = found["backends"]["eager"]
    assert eager["ms"] > 0 and eager["iqr_ms"] >= 0 and eager["runs"] == 3
    assert eager["tokens_per_second"] == pytest.approx(64 / eager["ms"] * 1e3)
    assert eager["peak_memory"] is None and eager["launches"] is None, "a CPU has neither"
    assert [f["name"] for f in eager["mfu"]] == ["of the nominal peak", "of the measured ceiling", "nanoGPT's own"]
    assert eager["mfu"][0]["value"] is None, "no nominal peak is known of a CPU"
    assert all(f["formula"].startswith("palm: 6N + 12LCT") and f["denominator"] for f in eager["mfu"])


def test_97_percent_of_the_wall_time_has_a_name_and_shares_add_up(result):
    for profiled in (result[0]["backends"]["eager"], result[0]["interpreted"]):
        assert profiled["profile"]["accounted"] >= 0.97, profiled["profile"]["unaccounted_ms"]
        assert sum(row["share"] for row in profiled["rows"]) == pytest.approx(1)
        assert sum(row["ms"] for row in profiled["rows"]) == pytest.approx(profiled["profile"]["wall_ms"])


def test_a_backend_that_fails_is_reported_and_the_others_go_on(result):
    found, _ = result
    assert found["backends"]["compile"] == {"error": "RuntimeError: InvalidCxxCompiler: No working C++ compiler found"}
    assert "ms" in found["backends"]["eager"] and found["interpreted"]["rows"]
    assert mfu_tables.failures(found) == ["compile: RuntimeError: InvalidCxxCompiler: No working C++ compiler found"]


def test_our_kernels_are_attributed_in_the_interpreter_and_get_no_speed_there(result):
    found, _ = result
    assert "triton" not in found["backends"] and "ms" not in found["interpreted"]
    names = {row["name"] for row in found["interpreted"]["rows"]}
    assert {"attention forward", "attention backward", "norms forward", "norms backward", "loss", "optimizer"} < names


def test_files_are_json_traces_pictures_and_a_page(result):
    _, out = result
    written = {path.name for path in out.iterdir()}
    assert written == {
        "mfu.json",
        "report.html",
        "time.png",
        "roofline-eager.png",
        "trace-eager.json.gz",
        "trace-triton-interpreted.json.gz",
    }
    assert json.loads(gzip.decompress((out / "trace-eager.json.gz").read_bytes()))["traceEvents"]


def test_nothing_measured_is_exit_code_1(quick, capsys):
    assert mfu.main([*quick, "--backends", "compile", "--no-projection"]) == 1
    assert "failed compile: RuntimeError: InvalidCxxCompiler" in capsys.readouterr().out


def test_json_on_standard_output_is_json_and_nothing_else(quick, tmp_path, capsys):
    traces = tmp_path / "traces"
    flags = [
        "--backends",
        "eager",
        "--no-projection",
        "--json",
        "--grad-accum",
        "2",
        "--seq",
        "16",
        "--trace",
        str(traces),
    ]
    assert mfu.main([*quick, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["setup"]["tokens_per_step"] == 2 * 16 * 2 and found["projection"] is None is found["audit"]
    assert (traces / "trace-eager.json.gz").exists() and not (tmp_path / "out" / "trace-eager.json.gz").exists()
    calls = {row["name"]: row["calls"] for row in found["backends"]["eager"]["rows"]}
    assert calls["data"] == 2 and calls["qkv forward"] == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_step_that_does_not_fit_ends_in_one_sentence(monkeypatch, tmp_path, error):
    def no_memory(*_, **__):
        raise error

    monkeypatch.setattr(timing, "interleave", no_memory)
    setup = Setup(TINY, ModelConfig(1, 2, 32, 32, 160), 2, 1, "fp32")
    with pytest.raises(
        UserError, match="batch is 2: a step that fitted this GPU a moment ago no longer does; give a smaller --batch"
    ):
        profile.measure(["eager"], setup, CPU, CEILINGS, steps=3, traces=tmp_path)


@pytest.mark.parametrize(
    ("shape", "tokens_per_second", "nanogpts", "own"),
    [(GPT2_40M, 134_060, 0.129, 0.69), (GPT2_124M, 56_070, 0.154, 0.82)],
)
def test_the_two_real_runs_are_69_and_82_percent_of_an_rtx_4070(shape, tokens_per_second, nanogpts, own, monkeypatch):
    peak = cards.lookup("rtx4070").peak_flops("bf16")
    monkeypatch.setattr(cards, "peak_flops", lambda device, precision: peak)
    nominal, measured, theirs = mfu_figures(tokens_per_second, shape, "bf16", CPU, CEILINGS)
    assert (round(nominal["value"], 2), round(theirs["value"], 3)) == (own, nanogpts)
    assert round(nominal["denominator_tflops"], 1) == 58.3 and theirs["denominator_tflops"] == 312
    assert measured["value"] == pytest.approx(nominal["value"] * 58.3 / 0.05, rel=1e-2)


# ---------------------------------------------------------------- an earlier result


def test_an_earlier_result_is_shown_again_without_measuring(result, tmp_path, monkeypatch, capsys):
    _, out = result
    monkeypatch.setattr(profile, "measure", lambda *_, **__: pytest.fail("measured"))
    assert mfu.main(["--from", str(out / "mfu.json"), "--out", str(tmp_path / "again")]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"report.html", "time.png", "roofline-eager.png"}
    shown = capsys.readouterr().out
    assert "where a step's time goes" in shown and "measured on" in shown


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a results file of bench.mfu: schema is not 'fastgpt.mfu'"),
        ('{"schema": "other"}', "is not a results file of bench.mfu"),
        ('{"schema": "fastgpt.mfu", "schema_version": 99}', "has schema_version 99: this version reads 1, so measure again"),
        ('{"schema": "fastgpt.mfu", "schema_version": 1}', r"is damaged \(KeyError: 'environment'\): measure again"),
    ],
)  # fmt: skip
def test_a_corrupt_results_file_ends_in_one_sentence(content, sentence, tmp_path):
    (tmp_path / "mfu.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        mfu.main(["--from", str(tmp_path / "mfu.json"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("part", ["environment", "setup", "ceilings", "backends"])
@pytest.mark.parametrize("damage", [None, {"eager": 1}, "text", 3])
def test_a_results_file_with_a_damaged_part_ends_in_one_sentence(part, damage, result, tmp_path):
    (tmp_path / "mfu.json").write_text(json.dumps({**result[0], part: damage}))
    with pytest.raises(UserError, match=r"results file .* is damaged \(.*\): measure again with python -m bench.mfu"):
        mfu.main(["--from", str(tmp_path / "mfu.json"), "--out", str(tmp_path / "out")])


def test_a_results_file_that_is_not_there_ends_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        mfu.main(["--from", str(tmp_path / "mfu.json"), "--out", str(tmp_path / "out")])


# ---------------------------------------------------------------- --precision fp16-fast and fp8


@pytest.mark.parametrize(
    ("precision", "card", "used"),
    [
        ("fp16-fast", "rtx4070", "fp16-fast"),
        ("fp16-fast", "h100", "bf16"),
        ("auto", "h100", "bf16"),
        ("fp16", "a100", "fp16"),
    ],
)
def test_a_card_that_gains_nothing_is_measured_in_what_training_would_use_and_it_is_said(
    precision, card, used, monkeypatch
):
    cuda = torch.device("cuda")
    monkeypatch.setattr(cards, "present", lambda device=None: cards.lookup(card))
    found, notes = mfu.in_force(precision, cuda)
    refused = usable_precision(precision, cuda, "triton")[1]
    experimental = f"precision {used} is experimental: no GPU has confirmed it yet" if used in EXPERIMENTAL else None
    assert (found, notes) == (used, [note for note in (refused, experimental) if note])


@pytest.fixture(scope="module", params=["fp16-fast", "fp8"])
def experimental(request, tmp_path_factory):
    """(precision, the whole command with nothing but it, as a CPU runs it, and its report)."""
    if request.config.getoption("--device") == "cuda":
        pytest.skip("with --device cuda this process does not interpret kernels")
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        flags = quick_run(patch, folder)
        code = mfu.main([*flags, "--no-projection", "--precision", request.param])
    assert code == 0, "nothing was to be timed, and the interpreter got through"
    found = json.loads((folder / "out" / "mfu.json").read_text())
    return request.param, found, (folder / "out" / "report.html").read_text()


def test_an_experimental_precision_is_interpreted_and_the_report_says_what_is_left_out_and_why(experimental, capsys):
    precision, found, page = experimental
    notes = [
        f"precision {precision} is experimental: no GPU has confirmed it yet",
        f"eager and compile are left out: they do not have {precision}",
        f"nothing is timed: our kernels need a GPU for that; what they do is shown interpreted, with {INTERPRETED}",
    ]
    assert found["notes"] == notes and found["backends"] == {}
    assert found["setup"] == found["interpreted"]["setup"] and found["setup"]["precision"] == precision
    mfu_tables.show(found)
    terminal = capsys.readouterr().out
    for shown in (page, terminal):
        assert all(note in shown for note in notes) and f"{precision} (experimental)" in shown
        assert "No backend could be measured" not in shown and "matplotlib" not in shown and "Roofs" not in shown


def test_the_operations_of_an_experimental_step_are_those_that_the_projection_counts(experimental):
    precision, found, _ = experimental
    expected = {op.group for op in operations(Shape(**found["setup"]["shape"]), "triton", 2, precision=precision)}
    rows = {row["name"]: row for row in found["interpreted"]["rows"]}
    assert rows.keys() - {GAPS, "data"} == expected
    assert found["interpreted"]["profile"]["accounted"] >= 0.97
    assert rows["mlp up dW"]["arithmetic"] == ("bf16" if precision == "fp8" else "fp16_fp16acc")


@pytest.fixture
def two_turns(monkeypatch):
    """Timing that takes no time, so long that one step is profiled."""
    fixed = timing.Timing.of([3000.0, 3000.0, 3000.0])
    monkeypatch.setattr(timing, "interleave", lambda runners, *_, **__: dict.fromkeys(runners, fixed))


@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="this process does not interpret kernels then")
def test_an_experimental_step_is_timed_against_the_peak_of_its_arithmetic(two_turns, monkeypatch, tmp_path):
    """The interpreter in the place of a GPU."""
    monkeypatch.setattr(cards, "peak_flops", lambda device, precision: cards.lookup("4070").peak_flops(arithmetic))
    arithmetic, rates = "fp16_fp16acc", {"fp16": 0.05, "fp16_fp16acc": 0.1}
    setup = Setup(TINY, ModelConfig(1, 2, 32, 32, 160), 2, 1, "fp16-fast")
    ceilings = replace(CEILINGS, matmul_tflops=rates)
    found = profile.measure(["triton"], setup, CPU, ceilings, steps=3, traces=tmp_path)["triton"]
    note = "fp16-fast: part of the step is computed in fp16, so nothing could reach 100% of the fp16_fp16acc peak"
    assert mfu_tables.mfu_notes({"setup": setup.to_json(), "backends": {"triton": found}})[-1] == note
    nominal, measured, _ = found["mfu"]
    assert nominal["denominator_tflops"] == pytest.approx(116.6, abs=0.05) and measured["denominator_tflops"] == 0.1
    assert nominal["denominator"].startswith("nominal dense fp16_fp16acc peak of ")
    assert found["skipped_steps"] == 0 and found["profile"]["accounted"] >= 0.97
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["head dW"]["roof_ms"] == pytest.approx(1e3 * 2 * 64 * 32 * 160 / 0.1e12)


@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="this process does not interpret kernels then")
def test_without_eager_a_wrong_first_loss_is_found_too(two_turns, monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "plain_loss", lambda *_: 4.0)
    setup = Setup(TINY, ModelConfig(1, 2, 32, 32, 160), 2, 1, "fp8")
    found = profile.measure(["triton"], setup, CPU, CEILINGS, steps=3, traces=tmp_path)["triton"]
    assert re.fullmatch(r"no speed: its first loss is 5\.\d+, eager's 4\.0000", found.pop("error")) and not found


@pytest.mark.parametrize("precision", ["fp16-fast", "fp8"])
def test_the_loss_to_compare_with_is_the_mean_over_the_step_in_plain_16_bits(precision, tmp_path):
    setup = Setup(TINY, ModelConfig(1, 2, 32, 32, 160), 2, 3, precision)
    with turns.random_tokens(setup) as tokens:
        found = turns.plain_loss(setup, CPU, tokens)
        plain = replace(setup, precision={"fp16-fast": "fp16", "fp8": "bf16"}[precision])
        assert found == pytest.approx(turns.Runner(BACKENDS["eager"], plain, CPU, tokens)(), abs=2e-3)


def test_updates_that_were_skipped_while_they_were_timed_are_said():
    found = {"backends": {"triton": {"ms": 1.0, "skipped_steps": 2}, "eager": {"ms": 1.0, "skipped_steps": 0}}}
    assert mfu_tables.failures(found) == [
        "triton: 2 updates skipped while it was timed, for a gradient that is not finite: such a step does less"
    ]
