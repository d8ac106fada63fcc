"""The benchmarks themselves: fair turns, no speed without parity, results that survive being cut off. No GPU needed."""

import json
import time
from collections import Counter

import pytest
import torch

from bench import entries, gpu, kernels, report, step, timing
from bench.entries import Entry
from bench.environment import environment
from fastgpt.flops import Work
from fastgpt.hardware import Ceilings

CPU = torch.device("cpu")
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


def entry(parity=lambda: None, **variants):
    """An operation whose variants are the given functions."""
    makers = {name: lambda work=work: work for name, work in variants.items()}
    return Entry("copy", "8", Work(flops=0, bytes=10**6), parity, makers)


# ---- timing


def test_variants_take_turns_and_take_turns_at_being_first():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = timing.interleave(variants, CPU, rounds=4, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"  # warm-up, submission time, four rounds
    assert {name: t.runs for name, t in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_budget_ends_the_rounds_but_not_before_three():
    found = timing.interleave({"a": lambda: time.sleep(0.01)}, CPU, rounds=1000, warmup=0, budget_s=0.0)
    assert found["a"].runs == 3 and found["a"].median_ms >= 10


def test_a_timing_is_a_median_and_the_distance_of_the_quartiles():
    found = timing.Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median_ms, found.runs) == (3.0, 5)
    assert timing.Timing.of([7.0]) == timing.Timing(7.0, 0.0, 1)


def test_inputs_rotate():
    seen = []
    work = timing.rotating(seen.append, [(1,), (2,)])
    for _ in range(3):
        work()
    assert seen == [1, 2, 1]


def test_peak_memory_of_a_gpu_and_of_no_gpu(device):
    peak = timing.peak_memory(lambda: torch.empty(2**20, dtype=torch.uint8, device=device), device)
    assert peak == (2**20 if device.type == "cuda" else None)


# ---- bench.kernels


def test_every_kernel_passes_parity_and_gets_times(device, tmp_path, capsys):
    # On a GPU the shapes are real ones and all of them take minutes.
    only = [] if device.type == "cpu" else ["--only", "layer_norm"]
    assert kernels.main(["--device", device.type, "--quick", "--out", str(tmp_path), *only]) == 0
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert {e["parity"] for e in results["entries"]} == {"passed"}
    for e in results["entries"]:
        assert e["bytes"] > 0 and {"triton"} < set(e["variants"]), e["name"]
        assert all(v["ms"] > 0 for v in e["variants"].values()), e
    if device.type == "cpu":
        assert len(results["entries"]) == 5 and results["environment"]["kernels"] == "interpreted"
        assert all(v["share"] is None for e in results["entries"] for v in e["variants"].values()), "no roof on a CPU"
    assert "layer_norm" in capsys.readouterr().out
    assert "| layer_norm" in (tmp_path / "kernels.md").read_text()


def test_a_kernel_that_fails_parity_gets_no_speed():
    def parity():
        raise AssertionError("out0: rms error 0.1")

    def timed():
        raise RuntimeError("was run")

    result = kernels.measure(entry(parity, triton=timed), CPU, None, rounds=3)
    assert result["parity"].startswith("failed: AssertionError: out0") and result["variants"] == {}
    table = report.kernels_markdown({"environment": ENVIRONMENT, "entries": [result]})
    assert "no speed: parity failed" in table


def test_a_peer_that_crashes_is_reported_and_the_others_are_timed():
    def crash():
        raise RuntimeError("no such backend")

    result = kernels.measure(entry(triton=lambda: None, cudnn=crash), CPU, None, rounds=3)
    assert "no such backend" in result["variants"]["cudnn"]["error"] and result["variants"]["triton"]["runs"] == 3
    assert "error: RuntimeError: no such backend" in report.kernels_markdown(
        {"environment": ENVIRONMENT, "entries": [result]}
    )


def test_a_share_is_of_the_measured_roof_that_binds():
    ceilings = Ceilings("card", "host", "2.13", 0, copy_gbs=500.0, matmul_tflops={"bf16": 50.0})
    one_ms = timing.Timing(1.0, 0.0, 9)
    memory = kernels.rates(Work(flops=0, bytes=400 * 10**6), one_ms, ceilings)
    assert memory["share"] == pytest.approx(0.8) and memory["of"] == "measured copy bandwidth"
    assert memory["gbs"] == pytest.approx(400)
    compute = kernels.rates(Work(flops=40 * 10**9, bytes=10**6), one_ms, ceilings)
    assert compute["share"] == pytest.approx(0.8) and compute["of"] == "measured bf16 matmul rate"
    assert compute["tflops"] == pytest.approx(40)


def test_the_environment_names_device_and_versions(device):
    found = environment(device)
    assert found["device"] and found["torch"] == torch.__version__ and found["triton"] and found["time"]
    json.dumps(found)


# ---- bench.step


def test_a_step_on_a_cpu_prints_its_figures(capsys):
    shape = ["--batch-size", "2", "--grad-accum", "2", "--steps", "2", "--seconds", "0"]
    assert step.main(["--device", "cpu", "--preset", "demo", "--kernels", "eager", *shape]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second"] > 0 and found["steps"] == 2 and found["mfu"] is None
    assert abs(found["first_loss"] - torch.log(torch.tensor(256.0))) < 0.2
    assert found["formula"].startswith("palm: 6N + 12LCT")


# ---- bench.gpu


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
def results():
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


def test_without_a_gpu_one_sentence_and_exit_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "needs a CUDA GPU" in captured.err
    assert not (tmp_path / "out").exists()
    assert kernels.main(["--device", "cuda"]) == 2


def test_the_markdown_names_device_parity_ratios_and_errors(results):
    text = report.gpu_markdown(results)
    assert "NVIDIA GeForce RTX 4070, 46 SMs" in text
    assert "300 passed, 1 failed, 2 skipped in 61 s (cut off by the time budget)" in text and "Failed: test_x" in text
    assert "| gpt2-124m | 8 x 4 | triton | 56,000 |" in text and "| 1.40x |" in text
    assert "gpt2-124m, 12 GB cap" in text and "| oom |" in text
    assert "2.00x" in text and "74% of measured copy bandwidth" in text


def test_results_are_written_after_every_stage_and_whole(results, tmp_path):
    session = gpu.Session(tmp_path, deadline=time.monotonic() + 10)
    for stage in ("environment", "tests", "kernels", "steps"):
        session.results[stage] = results[stage]
        session.save()
        assert json.loads((tmp_path / "results.json").read_text()) == session.results
    assert (tmp_path / "results.md").read_text().startswith("# fastgpt on NVIDIA GeForce RTX 4070")
    assert not list(tmp_path.glob("*.tmp"))


def test_the_plot_is_written(results, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.plot_steps(results, tmp_path / "steps.png") and (tmp_path / "steps.png").stat().st_size > 10_000
    assert not report.plot_steps({"environment": ENVIRONMENT}, tmp_path / "none.png")


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


def test_the_plan_starts_with_what_matters_and_caps_only_larger_cards():
    plan = list(gpu.step_plan(80 * 10**9))
    assert plan[:2] == [("gpt2-124m", "eager", 0.0), ("gpt2-124m", "triton", 0.0)]
    assert Counter(cap for _, _, cap in plan) == {0.0: 10, 12.0: 4}
    assert {cap for _, _, cap in gpu.step_plan(12 * 10**9)} == {0.0}


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

    monkeypatch.setattr(gpu.Session, "child", child)
    session = gpu.Session(tmp_path, time.monotonic() + 1000, {"environment": ENVIRONMENT})
    (tmp_path / "kernels" / "attention").mkdir(parents=True)
    (tmp_path / "kernels" / "attention" / "kernels.json").write_text('{"entries": []}')  # of an earlier run
    gpu.run_kernels(session, 300)
    parity = {e["name"]: e["parity"] for e in session.results["kernels"]["entries"]}
    assert parity.pop("attention") == "crashed: see kernels-attention.log" and set(parity.values()) == {"passed"}
    assert [("--keep-roofs" in args) for _, args in commands] == [False] + [True] * (len(commands) - 1)
    assert session.results["kernels"]["copy_gbs"] == 450.0
    assert "no speed: crashed" in (tmp_path / "results.md").read_text()


def test_the_parity_check_of_adamw_compares_separate_parameters(device, monkeypatch):
    from fastgpt import optim

    adamw = entries.adamw(entries.TINY, device, False)
    adamw.parity()

    class HalfStep(optim.FusedAdamW):
        def __init__(self, params, lr, **options):
            super().__init__(params, lr=lr / 2, **options)

    monkeypatch.setattr(optim, "FusedAdamW", HalfStep)
    with pytest.raises(AssertionError, match="parameter 0"):
        entries.adamw(entries.TINY, device, False).parity()


def test_a_step_that_does_not_fit_is_tried_at_half_the_batch(tmp_path, monkeypatch):
    answers = ['{"error": "out of memory", "oom": true}'] * 2 + ['noise\n{"tokens_per_second": 5.0}\nmore noise']
    commands = []

    def child(self, module, *args, log, limit):
        commands.append(args)
        return answers.pop(0), True

    monkeypatch.setattr(gpu.Session, "child", child)
    session = gpu.Session(tmp_path, time.monotonic() + 1000)
    found = gpu.run_step(session, "gpt2-124m", "eager", 12.0)
    assert (found["batch_size"], found["grad_accum"], found["tokens_per_second"]) == (4, 8, 5.0)
    assert list(commands[0][4:6]) == ["--compile", "none"] and len(commands) == 3
    assert "skipped" in gpu.run_step(gpu.Session(tmp_path, time.monotonic() + 5), "gpt2-124m", "eager", 0.0)["error"]


def test_a_step_with_another_loss_than_eager_gets_no_speed():
    steps = [step_result("eager", 1.0), step_result("triton", 9.0, first_loss=11.3), step_result("compile", 2.0)]
    steps += [
        step_result("triton", 9.0, cap_gb=12.0, first_loss=11.3),
        step_result("triton", 9.0) | {"skipped_steps": 3},
    ]
    gpu.withhold_wrong(steps)
    assert not any("tokens_per_second" in step for step in steps[3:]) and "3 updates were skipped" in steps[4]["error"]
    assert "tokens_per_second" not in steps[1] and "no speed: first loss 11.3000" in steps[1]["error"]
    assert steps[2]["tokens_per_second"] == 2.0


def test_a_child_that_takes_too_long_is_stopped(tmp_path):
    session = gpu.Session(tmp_path, time.monotonic() + 100)
    sleep = ("-n", "1", "-r", "1", "print('begun', flush=True)\nimport time\ntime.sleep(60)")
    output, finished = session.child("timeit", *sleep, log="sleep.log", limit=2)
    assert not finished and output == (tmp_path / "sleep.log").read_text() and "begun" in output
    assert session.child("timeit", "-n", "1", "pass", log="fast.log", limit=60)[1]
