"""bench.gpu: what its stages run and read, and results that survive being cut off. No GPU needed."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import gpu, kernels
from bench.reports import markdown, results, session, timing
from bench.reports.session import Session
from bench.steps import variants
from bench.steps.ceilings import Ceilings
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.performance.flops import Work

ENVIRONMENT = {
    "device": "NVIDIA GeForce RTX 4070",
    "sms": 46,
    "kernels": "compiled",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "driver": "580.1",
    "commit": "abc123",
    "time": "2026-01-01T00:00:00+00:00",
}


def step_result(variant, rate, preset="gpt2-124m", cap_gb=0.0, first_loss=10.9):
    return {
        "preset": preset,
        "variant": variant,
        "cap_gb": cap_gb,
        "batch_size": 8,
        "grad_accum": 4,
        "tokens_per_second": rate,
        "ms": 32768e3 / rate,
        "iqr_ms": 0.5,
        "mfu": rate * 855e6 / 58.3e12,
        "peak_memory": 6 * 2**30,
        "first_loss": first_loss,
    }


@pytest.fixture
def found():
    """What a run on a GPU would leave behind, invented."""
    made_up = kernels.rates(
        Work(0, 10**8), timing.Timing(0.3, 0.01, 40), Ceilings("c", "h", "t", 0, 450.0, {"bf16": 55.0})
    )
    one = {
        "name": "layer_norm",
        "shape": "8192 x 768",
        "parity": "passed",
        "variants": {"triton": made_up | {"peak_memory": 2**24}, "eager": made_up | {"ms": 0.6, "peak_memory": 2**25}},
    }
    return {
        "environment": ENVIRONMENT,
        "tests": {"passed": 300, "failed": 1, "skipped": 2, "failures": ["test_x"], "seconds": 61.0, "finished": False},
        "kernels": {"environment": ENVIRONMENT, "copy_gbs": 450.0, "matmul_tflops": {"bf16": 55.0}, "entries": [one]},
        "steps": [
            step_result("eager", 40_000.0),
            step_result("triton", 56_000.0),
            step_result("triton", 50_000.0, cap_gb=12.0),
            {
                "preset": "gpt2-124m",
                "variant": "compile",
                "cap_gb": 12.0,
                "batch_size": 1,
                "grad_accum": 32,
                "error": "oom",
            },
        ],
    }


def test_without_a_gpu_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^bench[.]gpu needs a CUDA GPU, and torch .* sees none here"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_markdown_names_device_parity_ratios_and_errors(found):
    text = markdown.gpu_markdown(found)
    assert "NVIDIA GeForce RTX 4070, 46 SMs" in text
    assert "300 passed, 1 failed, 2 skipped in 61 s (cut off by the time budget)" in text and "Failed: test_x" in text
    assert "| gpt2-124m | 8 x 4 | triton | 56,000 |" in text and "| 1.40x |" in text
    assert "gpt2-124m, 12 GB cap" in text and "| oom |" in text
    assert "2.00x" in text and "74% of measured copy bandwidth" in text


def test_results_are_written_after_every_stage_and_whole(found, tmp_path):
    run = Session(tmp_path, deadline=time.monotonic() + 10)
    for stage in ("environment", "tests", "kernels", "steps"):
        run.results[stage] = found[stage]
        run.save()
        assert json.loads((tmp_path / "results.json").read_text()) == run.results
    assert (tmp_path / "results.md").read_text().startswith("# fastgpt on NVIDIA GeForce RTX 4070")
    assert not list(tmp_path.glob("*.tmp"))


def test_the_plot_is_written(found, tmp_path):
    pytest.importorskip("matplotlib")
    assert markdown.plot_steps(found, tmp_path / "steps.png") and (tmp_path / "steps.png").stat().st_size > 10_000
    assert not markdown.plot_steps({"environment": ENVIRONMENT}, tmp_path / "none.png")


XDIST = """
[gw0] [  1%] PASSED tests/kernels/test_a.py::test_one[fp32]
[gw1] [  2%] FAILED tests/kernels/test_a.py::test_two[columns of one]
[gw1] [  2%] PASSED tests/kernels/test_a.py::test_two[columns of two]
[gw1] [  3%] SKIPPED tests/kernels/test_b.py::test_three
"""
PLAIN = """
tests/kernels/test_a.py::test_one[fp32] PASSED          [ 33%]
tests/kernels/test_a.py::test_two[columns of one] FAILED [ 50%]
tests/kernels/test_a.py::test_two[columns of two] PASSED [ 66%]
tests/kernels/test_b.py::test_three SKIPPED (cpu)       [100%]
tests/kernels/test_b.py::test_four """


@pytest.mark.parametrize("output", [XDIST, PLAIN], ids=["xdist", "plain"])
def test_a_test_run_is_read_even_if_cut_off(output):
    assert gpu.read_tests(output) == {
        "passed": 2,
        "failed": 1,
        "skipped": 1,
        "failures": ["tests/kernels/test_a.py::test_two[columns of one]"],
    }


def plan(gigabytes, card):
    return list(gpu.step_plan(gigabytes * 10**9, cards.lookup(card)))


def test_the_plan_starts_with_what_matters_and_caps_only_larger_cards():
    for found in (plan(12, "rtx4070"), plan(24, "rtx4090"), plan(141, "h200")):
        assert found[:2] == [("gpt2-124m", "eager", 0.0), ("gpt2-124m", "triton", 0.0)]
        assert len(set(found)) == len(found)
    assert {cap for _, _, cap in plan(12, "rtx4070")} == {0.0}
    assert Counter(cap for _, _, cap in plan(24, "rtx4090"))[12.0] == 4


def test_each_card_runs_the_precisions_that_it_gains_from_and_the_models_that_fit():
    def fast(found):
        return {variant for _, variant, _ in found if variants.VARIANTS[variant].precision != "bf16"}

    assert fast(plan(12, "rtx4070")) == {"triton fp8", "triton fp16-fast"}
    assert fast(plan(141, "h200")) == {"triton fp8"} and fast(plan(80, "a100")) == set()
    assert {preset for preset, _, _ in plan(24, "rtx4090")} == {"gpt2-124m", "gpt2-40m"}
    assert {preset for preset, _, _ in plan(80, "a100")} == {"gpt2-124m", "gpt2-40m", "gpt2-350m", "gpt2-xl"}
    assert not fast(list(gpu.step_plan(12 * 10**9, None)))


def test_large_cards_get_the_largest_micro_batches_that_eager_fits():
    assert [gpu.batch_for("gpt2-124m", gb * 10**9) for gb in (12, 24, 80, 150)] == [8, 8, 64, 128]
    assert gpu.batch_for("gpt2-xl", 80 * 10**9) == 8


def test_each_kernel_has_its_own_process_and_a_crash_costs_only_that_one(tmp_path, monkeypatch):
    commands = []

    def child(self, module, *args, log, limit):
        commands.append((module, args))
        name = args[args.index("--only") + 1]
        if name != "attention":
            folder = tmp_path / "kernels" / name
            folder.mkdir(parents=True)
            one = {"name": name, "shape": "", "parity": "passed", "variants": {}}
            (folder / "kernels.json").write_text(json.dumps({"copy_gbs": 450.0, "entries": [one]}))
        return "", True

    monkeypatch.setattr(Session, "child", child)
    run = Session(tmp_path, time.monotonic() + 1000, {"environment": ENVIRONMENT})
    (tmp_path / "kernels" / "attention").mkdir(parents=True)
    (tmp_path / "kernels" / "attention" / "kernels.json").write_text('{"entries": []}')  # of an earlier run
    gpu.run_kernels(run, 300)
    parity = {e["name"]: e["parity"] for e in run.results["kernels"]["entries"]}
    assert parity.pop("attention") == "crashed: see kernels-attention.log" and set(parity.values()) == {"passed"}
    assert [("--keep-roofs" in args) for _, args in commands] == [False] + [True] * (len(commands) - 1)
    assert run.results["kernels"]["copy_gbs"] == 450.0
    assert "no speed: crashed" in (tmp_path / "results.md").read_text()


def test_a_step_that_does_not_fit_is_tried_at_half_the_batch(tmp_path, monkeypatch):
    answers = ['{"steps": [{"error": "out of memory", "oom": true}]}'] * 2
    answers += ['noise\n{"steps": [{"tokens_per_second": 5.0}]}\nmore noise']
    commands = []

    def child(self, module, *args, log, limit):
        commands.append(args)
        return answers.pop(0), True

    monkeypatch.setattr(Session, "child", child)
    run = Session(tmp_path, time.monotonic() + 1000)
    found = gpu.run_step(run, "gpt2-124m", "eager", 12.0, 8)
    assert (found["batch_size"], found["grad_accum"], found["tokens_per_second"]) == (4, 8, 5.0)
    assert after(commands[0], "--variants") == "eager" and len(commands) == 3
    late = Session(tmp_path, time.monotonic() + 5)
    assert "skipped" in gpu.run_step(late, "gpt2-124m", "eager", 0.0, 8)["error"]


def test_a_step_with_another_loss_than_eager_gets_no_speed():
    steps = [step_result("eager", 1.0), step_result("triton", 9.0, first_loss=11.3), step_result("compile", 2.0)]
    steps += [
        step_result("triton", 9.0, cap_gb=12.0, first_loss=11.3),
        step_result("triton", 9.0) | {"skipped_steps": 3},
    ]
    gpu.withhold_wrong(steps)
    assert not any("tokens_per_second" in step for step in steps[3:]) and "3 updates were skipped" in steps[4]["error"]
    assert "tokens_per_second" not in steps[1] and "no speed: its first loss is 11.3000" in steps[1]["error"]
    assert steps[2]["tokens_per_second"] == 2.0


def test_where_eager_did_not_run_the_compiled_step_is_the_reference():
    steps = [step_result("compile", 1.0, "gpt2-xl"), step_result("triton", 2.0, "gpt2-xl", first_loss=11.3)]
    gpu.withhold_wrong(steps)
    assert "tokens_per_second" in steps[0] and "plain PyTorch's 10.9000" in steps[1]["error"]
    other_tokens = [step_result("eager", 1.0), step_result("triton", 2.0, first_loss=11.3) | {"batch_size": 16}]
    gpu.withhold_wrong(other_tokens)
    assert all("tokens_per_second" in step for step in other_tokens)


def test_a_child_that_takes_too_long_is_stopped(tmp_path):
    run = Session(tmp_path, time.monotonic() + 100)
    sleep = ("-n", "1", "-r", "1", "print('begun', flush=True)\nimport time\ntime.sleep(60)")
    output, finished = run.child("timeit", *sleep, log="sleep.log", limit=2)
    assert not finished and output == (tmp_path / "sleep.log").read_text() and "begun" in output
    assert run.child("timeit", "-n", "1", "pass", log="fast.log", limit=60)[1]


# ---- profile, memory, projection


def children(monkeypatch, answers):
    """Stand-ins for the child processes: module -> function of its arguments, which returns what it prints."""
    commands = []

    def child(self, module, *args, log, limit):
        commands.append((module, args))
        return answers[module](args), True

    monkeypatch.setattr(Session, "child", child)
    return commands


def after(args, flag):
    return args[args.index(flag) + 1]


def test_the_profile_is_read_from_its_folder(tmp_path, monkeypatch):
    def mfu(args):
        (tmp_path / "profile").mkdir(exist_ok=True)
        backends = {"triton": {"ms": 61.5, "iqr_ms": 0.2, "rows": []}, "compile": {"error": "out of memory"}}
        (tmp_path / "profile" / "mfu.json").write_text(json.dumps({"backends": backends}))

    commands = children(monkeypatch, {"bench.mfu": mfu})
    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    gpu.run_profile(run, 60)
    assert after(commands[0][1], "--out") == str(tmp_path / "profile")
    assert run.results["profile"]["backends"] == {
        "triton": {"ms": 61.5, "iqr_ms": 0.2},
        "compile": {"error": "out of memory"},
    }
    text = markdown.gpu_markdown(run.results)
    assert "| triton | 61.5 |" in text and "error: out of memory" in text and "profile/report.html" in text


def test_an_earlier_runs_profile_does_not_pass_for_this_ones(tmp_path, monkeypatch):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "mfu.json").write_text('{"backends": {}}')
    children(monkeypatch, {"bench.mfu": lambda args: "Traceback"})
    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    gpu.run_profile(run, 60)
    assert run.results["profile"] == {"error": "crashed: see profile.log"}
    assert "No figures: crashed: see profile.log" in markdown.gpu_markdown(run.results)


def profiled(tmp_path, monkeypatch, card, answers=(), limit=60.0):
    """The profile on a card, where a step takes 60 ms in bf16, 40 in fp8 and 41 in fp16-fast, or gives ``answers``."""
    answers = {"bf16": {"ms": 60.0}, "fp8": {"ms": 40.0}, "fp16-fast": {"ms": 41.0}} | dict(answers)

    def mfu(args):
        answer, folder = answers[after(args, "--precision")], Path(after(args, "--out"))
        if answer is not None:
            folder.mkdir(parents=True, exist_ok=True)
            backends = {name: answer for name in after(args, "--backends").split(",")}
            (folder / "mfu.json").write_text(json.dumps({"backends": backends}))

    monkeypatch.setattr(cards, "present", lambda device=None: cards.lookup(card))
    commands = children(monkeypatch, {"bench.mfu": mfu})
    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    gpu.run_profile(run, limit)
    return (
        run.results["profile"],
        [after(args, "--precision") for _, args in commands],
        markdown.gpu_markdown(run.results),
    )


@pytest.mark.parametrize(
    "card, precisions", [("rtx4070", ["bf16", "fp8", "fp16-fast"]), ("h200", ["bf16", "fp8"]), ("a100", ["bf16"])]
)
def test_the_profile_is_repeated_in_the_precisions_that_the_card_gains_from(card, precisions, tmp_path, monkeypatch):
    found, asked, text = profiled(tmp_path, monkeypatch, card)
    assert asked == precisions
    names = [variant.removeprefix("triton ") for variant in found["backends"] if variant not in gpu.MAIN]
    assert names == precisions[1:], "as in the steps: named after the variant"
    for name in names:
        assert f"profile/{name}/report.html" in text and f"profile/{name}/mfu.json" in text
        assert (tmp_path / "profile" / name / "mfu.json").exists()
    assert "| compile | 60.0 |" in text
    assert ("| triton fp8 | 40.0 |" in text) == ("fp8" in text) == ("fp8" in names)


def test_no_further_precision_is_begun_when_the_time_is_up(tmp_path, monkeypatch):
    found, asked, text = profiled(tmp_path, monkeypatch, "rtx4070", limit=gpu.SHORTEST_STEP - 1)
    assert asked == ["bf16"] and found["backends"]["triton"] == {"ms": 60.0}
    assert found["backends"]["triton fp8"] == found["backends"]["triton fp16-fast"] == {"error": gpu.LATE}
    assert "| triton fp8 | error: skipped: the time budget is used up |" in text


def test_a_precision_that_fails_costs_only_itself(tmp_path, monkeypatch):
    (tmp_path / "profile" / "fp8").mkdir(parents=True)
    (tmp_path / "profile" / "fp8" / "mfu.json").write_text('{"backends": {"triton": {"ms": 1.0}}}')  # of an earlier run
    found, _, text = profiled(tmp_path, monkeypatch, "rtx4070", {"fp8": None, "fp16-fast": {"error": "no speed: loss"}})
    assert found["backends"]["triton"] == {"ms": 60.0}
    assert found["backends"]["triton fp8"] == {"error": "crashed: see profile-fp8.log"}
    assert found["backends"]["triton fp16-fast"] == {"error": "no speed: loss"}
    assert "profile/fp8" not in text and "profile/fp16-fast/report.html" in text


def test_where_bf16_has_no_profile_nothing_else_is_tried(tmp_path, monkeypatch):
    found, asked, _ = profiled(tmp_path, monkeypatch, "rtx4070", {"bf16": None})
    assert asked == ["bf16"] and found == {"error": "crashed: see profile.log"}


def test_memory_is_read_even_if_its_run_was_cut_short(tmp_path, monkeypatch):
    point = {"preset": "gpt2-124m", "kernels": "triton", "micro_batch": 8, "predicted": {"allocated": 6 * 2**30}}
    rows = [
        point | {"measured": {"allocated": 5 * 2**30}, "off": {"allocated": 0.2}, "error": None},
        point | {"kernels": "eager", "measured": None, "off": None, "error": "out of memory"},
    ]

    def child(self, module, *args, log, limit):
        (tmp_path / "memory.json").write_text(json.dumps({"rows": rows}))
        return "", False

    monkeypatch.setattr(Session, "child", child)
    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    gpu.run_memory(run, 60)
    text = markdown.gpu_markdown(run.results)
    assert "| gpt2-124m, triton, micro-batch 8 | 6.44 | 5.37 | +20.0% |" in text and "| 6.44 | out of memory |" in text


def test_the_projection_stands_beside_every_time_and_comes_last(found, tmp_path, monkeypatch):
    pair = {"what": "step", "variant": "triton", "measured_ms": 60.0, "projected_ms": 66.0, "error": 0.1}
    pair |= {"note": "", "status": "calibrated"}

    def project(args):
        if "mfu.json" in after(args, "--measured"):
            return "error: measured file holds no time"
        return "a warning\n" + json.dumps({"calibration_error": 0.034, "pairs": [pair]}, indent=1) + "\nmore"

    children(monkeypatch, {"bench.project": project})
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "mfu.json").write_text("{}")
    run = Session(tmp_path, time.monotonic() + 100, found)
    gpu.run_projection(run, 60)
    assert json.loads((tmp_path / "results.json").read_text())["steps"], "bench.project reads what is written"
    text = markdown.gpu_markdown(run.results)
    last = text[text.index("## Predicted beside measured") :]
    assert (
        "| step | triton | 60.000 | 66.000 | +10% | calibrated |" in last and "Error of its calibration: 3.4%" in last
    )
    assert "Not projected: profile/mfu.json: error: measured file holds no time" in last


def test_the_projection_of_each_profile_is_named_after_its_precision(tmp_path, monkeypatch):
    def project(args):
        pair = {"what": "mlp up", "variant": "triton", "measured_ms": 6.0, "projected_ms": 6.6, "error": 0.1}
        return json.dumps({"calibration_error": 0.034, "pairs": [pair | {"note": "", "status": "calibrated"}]})

    commands = children(monkeypatch, {"bench.project": project})
    for folder in ("profile", "profile/fp8"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mfu.json").write_text("{}")
    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    gpu.run_projection(run, 60)
    measured = [str(Path(after(args, "--measured")).relative_to(tmp_path)) for _, args in commands]
    assert measured == ["results.json", "profile/mfu.json", "profile/fp8/mfu.json"]
    assert [pair["variant"] for pair in run.results["projection"]["pairs"]] == ["triton", "triton fp8"]
    assert "| mlp up | triton fp8 | 6.000 | 6.600 | +10% | calibrated |" in markdown.gpu_markdown(run.results)


# ---- all stages


def stage(name, share, run, module="json"):
    return gpu.Stage(name, run, share, module)


def test_each_stage_leaves_the_later_ones_their_share_and_gets_what_earlier_ones_left(tmp_path):
    limits = []
    stages = [
        stage(name, share, lambda run, limit: limits.append(limit)) for name, share in zip("abc", (0.5, 0.3, 0.2))
    ]
    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    gpu.run_stages(run, stages, 100.0)
    assert limits == [pytest.approx(50, abs=2), pytest.approx(80, abs=2), pytest.approx(100, abs=2)]


def test_a_stage_that_cannot_run_costs_only_itself(tmp_path):
    def fail(run, limit):
        raise RuntimeError("CUDA error")

    def work(run, limit):
        run.results["memory"] = {"rows": []}

    stages = [stage("tests", 0.1, fail), stage("profile", 0.1, work, "bench.no_such"), stage("memory", 0.8, work)]
    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    gpu.run_stages(run, stages, 100.0)
    assert run.results["tests"] == {"error": "failed: RuntimeError: CUDA error"}
    assert run.results["profile"] == {"error": "skipped: bench.no_such is not here"}
    assert run.results["memory"] == {"rows": []}
    assert json.loads((tmp_path / "results.json").read_text()) == run.results
    assert "No figures: skipped: bench.no_such is not here" in (tmp_path / "results.md").read_text()


def test_out_of_time_is_a_reason(tmp_path):
    run = Session(tmp_path, time.monotonic() + 5, {"environment": ENVIRONMENT})
    gpu.run_stages(run, [stage("memory", 1.0, lambda run, limit: pytest.fail("ran"))], 480.0)
    assert run.results["memory"] == {"error": "skipped: the time budget is used up"}


def test_the_stages_are_all_there_in_order_and_share_the_whole_time():
    assert [s.name for s in gpu.STAGES] == ["tests", "kernels", "steps", "profile", "ablation", "memory", "projection"]
    assert sum(s.share for s in gpu.STAGES) == pytest.approx(1) and list(markdown.SECTIONS) == [
        s.name for s in gpu.STAGES
    ]


def test_times_are_kept_in_the_store_and_a_failed_stage_has_none(found, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_RESULTS", str(tmp_path))
    kept = results.load(gpu.keep(found, "mine"))
    assert kept["kind"] == "gpu" and kept["label"] == "mine"
    assert kept["entries"]["layer_norm 8192 x 768 | triton"]["ms"] == 0.3
    assert kept["entries"]["step gpt2-124m 8 x 4 | triton"]["tokens_per_second"] == 56_000.0
    assert kept["entries"]["step gpt2-124m 1 x 32 | compile | 12 GB cap"] == {"error": "oom"}
    failed = {"environment": ENVIRONMENT, "kernels": {"error": "x"}, "steps": {"error": "y"}}
    assert results.load(gpu.keep(failed, None))["entries"] == {}


def test_the_command_runs_all_stages_reports_and_keeps_the_times(found, tmp_path, monkeypatch, capsys):
    def copies(name):
        return lambda run, limit: run.results.update({name: found[name]})

    stages = [stage(name, 0.3, copies(name)) for name in ("tests", "kernels", "steps")]
    monkeypatch.setattr(gpu, "STAGES", [*stages, stage("memory", 0.1, copies("memory"), "bench.no_such")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: ENVIRONMENT)
    monkeypatch.setenv("FASTGPT_RESULTS", str(tmp_path / "kept"))
    assert gpu.main(["--out", str(tmp_path / "out"), "--label", "mine"]) == 1, "a parity test failed"
    printed = capsys.readouterr().out
    assert "Failed: test_x" in printed and "skipped: bench.no_such is not here" in printed and "Kept in" in printed
    assert results.find("mine")[0][1]["environment"] == ENVIRONMENT
    found["tests"] |= {"failed": 0}
    assert gpu.main(["--out", str(tmp_path / "out"), "--no-store"]) == 0
    assert len(results.find("mine")) == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--minutes", "0"], "minutes is 0: it must be above 0"),
        (["--minutes", "-1"], "minutes is -1"),
        (["--minutes", "nan"], "--minutes is 'nan': it must be a finite number"),
        (["--out", "{file}/x"], "which cannot be written [(]Not a directory[)]: name another"),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: ENVIRONMENT)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=sentence):
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        gpu.main([*out, *(a.format(file=tmp_path / "file") for a in arguments)])


def test_the_ablation_is_reported_measured_beside_projected(tmp_path, monkeypatch):
    def row(variant, measured, change=0.2):
        return {
            "model": "gpt2-124m",
            "precision": "bf16",
            "variant": variant,
            "meaning": "x",
            "projected_change": change,
        } | {"measured": measured}

    rows = [row("as shipped", {"ms": 50.0, "change": 0.0}), row("loss off", {"ms": 60.0, "change": 0.2})]
    rows += [row("norms off", {"error": "out of memory"}), row("CUDA graphs on", None, None)]

    def child(module, *arguments, log, limit):
        (tmp_path / "ablation.json").write_text(json.dumps({"rows": rows}))
        assert module == "bench.ablation" and "--measure" in arguments and "--no-store" in arguments
        return "", True

    run = Session(tmp_path, time.monotonic() + 100, {"environment": ENVIRONMENT})
    monkeypatch.setattr(run, "child", child)
    gpu.run_ablation(run, 60.0)
    text = markdown.gpu_markdown(run.results)
    assert "| bf16 | as shipped | 50.0 ms | - | x |" in text and "| bf16 | loss off | +20.0% | +20.0% | x |" in text
    assert (
        "| bf16 | norms off | out of memory | +20.0% | x |" in text and "| bf16 | CUDA graphs on | - | - | x |" in text
    )
    monkeypatch.setattr(run, "child", lambda *_, **__: ("", False))
    gpu.run_ablation(run, 60.0)
    assert "error" in run.results["ablation"]


def test_json_is_found_between_other_lines():
    assert session.json_in('warning {x}\n{\n "a": [1,\n 2]}\nend') == {"a": [1, 2]}
    assert session.json_in('{"a": 1}') == {"a": 1} and session.json_in("Traceback") is None
    assert session.last_json('{"a": 1}\n{"b": 2}\n{broken') == {"b": 2}
