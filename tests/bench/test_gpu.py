"""bench.gpu without a GPU: every stage with its real arguments, what is cut, what is gone on with, what is left behind."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tarfile
import time
import traceback
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import ablation, gpu, kernels, memory, tune
from bench.compiler import tune_measure, tune_table
from bench.reports import markdown, page, results, session, timing, verdicts
from bench.reports.session import Child, Ended, Session
from bench.steps import ceilings, device, profile, turns
from bench.steps.ceilings import Ceilings
from fastgpt.common import UserError, write_json
from fastgpt.hardware import cards, requirements
from fastgpt.performance.flops import Work
from fastgpt.training import loop
from tests import conftest

ENVIRONMENT = {
    "device": "NVIDIA GeForce RTX 4070",
    "sms": 46,
    "arch": "sm_89",
    "memory_gib": 12.0,
    "kernels": "compiled",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "driver": "580.1",
    "commit": "abc123",
    "time": "2026-01-01T00:00:00+00:00",
}
CEILINGS = Ceilings("card", "host", "2.13", 0, copy_gbs=450.0, matmul_tflops={"bf16": 55.0, "fp8": None})
DEVICE = {
    "environment": ENVIRONMENT,
    "total_memory": 12 * 2**30,
    "under_load": {"clock_mhz": 2700, "power_w": 199.5, "temperature_c": 60},
    "ceilings": {"copy_gbs": 450.0, "matmul_tflops": {"bf16": 55.0, "fp8": None}},
    "failed_imports": {},
}
ALL_FILES = {"results.json", "summary.md", "report.md", "steps.png", "evidence.tar.gz"}


def step_result(variant, rate, preset="gpt2-124m", **other):
    return {
        "preset": preset,
        "variant": variant,
        "cap_gb": 0.0,
        "batch_size": 8,
        "grad_accum": 4,
        "tokens_per_second": rate,
        "ms": 32768e3 / rate,
        "iqr_ms": 0.5,
        "mfu": rate * 855e6 / 58.3e12,
        "peak_memory": 6 * 2**30,
        "first_loss": 10.9,
    } | other


def found(**more):
    return verdicts.empty() | {"environment": ENVIRONMENT, "device": DEVICE} | more


# ---------------------------------------------------------------- the dry run


@pytest.fixture
def machine(request, monkeypatch, tmp_path):
    """A machine with a card, whose measuring calls give made-up figures at once. Everything around them is real: each command
    parses its arguments, plans, and writes its files. Returns the commands that ran."""
    card = cards.lookup(getattr(request, "param", "rtx4070"))
    major, minor = divmod(int(card.arch[3:]), 10)
    properties = SimpleNamespace(
        name=card.name, total_memory=card.vram_gb * 2**30, multi_processor_count=card.sm_count, major=major, minor=minor,
        shared_memory_per_block_optin=card.chip.shared_per_block, L2_cache_size=card.l2_mb * 2**20, uuid="x",
    )  # fmt: skip
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: card.name,
        "get_device_capability": lambda device=None: (major, minor),
        "set_per_process_memory_fraction": lambda share: None,
        "is_bf16_supported": lambda *_: True,
        "empty_cache": lambda: None,
        "device": lambda device: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("triton.backends.nvidia.driver.CudaUtils", lambda: None)
    monkeypatch.setenv("FASTGPT_RESULTS", str(tmp_path / "kept"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ceilings, "measured_ceilings", lambda *_, **__: CEILINGS)
    monkeypatch.setattr(device, "measured_ceilings", lambda *_, **__: CEILINGS)
    monkeypatch.setattr(kernels, "measured_ceilings", lambda *_, **__: CEILINGS)
    monkeypatch.setattr(device, "under_load", lambda *_: DEVICE["under_load"])
    monkeypatch.setattr(loop, "train", fake_training)
    monkeypatch.setattr(kernels, "measure", fake_kernel)
    fake_steps(monkeypatch)
    monkeypatch.setattr(tune_measure, "time_configs", fake_configs)
    monkeypatch.setattr(tune_table, "facts_of", lambda family, *_: ([], family.configs()[0], "triton"))
    monkeypatch.setattr(tune_measure, "present", lambda: (torch.device("cuda", 0), card, tuning_target(card)))
    ran = []

    def children(self, jobs, limit, beside=()):
        assert limit > 0
        self.work.mkdir(parents=True, exist_ok=True)
        ran.extend(jobs)
        return [Ended(in_process(self.work / job.log, job, monkeypatch), True) for job in jobs]

    monkeypatch.setattr(Session, "children", children)
    return ran


def tuning_target(card):
    from bench import tune

    return tune.target_of(card)


def in_process(log, job, monkeypatch):
    """What a command prints, in this process."""
    if job.module == "pytest":
        log.write_text(TESTED)
        return TESTED
    with open(log, "w") as file, redirect_stdout(file), monkeypatch.context() as patch:
        for name, value in job.env.items():
            patch.setenv(name, value)
        try:
            importlib.import_module(job.module).main(list(job.args))
        except BaseException:
            traceback.print_exc(file=file)
            traceback.print_exc(file=sys.__stderr__)
    return log.read_text()


TESTED = """
[shard: 3 tests]
tests/kernels/test_a.py::test_one[fp32] PASSED          [ 33%]
tests/kernels/test_a.py::test_two[columns of one] PASSED [ 66%]
tests/kernels/test_b.py::test_three SKIPPED (cpu)       [100%]
"""


def fake_training(config, where):
    """Steps whose loss depends on nothing but their number."""
    out, resumed = Path(config.train.out), config.train.resume
    assert where.type == "cuda" and config.model.n_layer == 6 and len(list(Path(config.data.data).glob("*.bin"))) == 2
    assert resumed is None or (Path(resumed) / "tensors-00000.safetensors").exists()
    out.mkdir(parents=True)
    lines = [json.dumps({"run": "x"})]
    lines += [json.dumps({"step": n, "loss": 9.0 - n / 10, "ms": 20.0}) for n in range(15 if resumed else 0, 30)]
    (out / "metrics.jsonl").write_text("\n".join(lines))
    for step in (15, config.train.max_iters):
        folder = out / f"step-{step:08d}"
        folder.mkdir()
        (folder / "tensors-00000.safetensors").write_text(f"weights of {step}")
    return SimpleNamespace(world=SimpleNamespace(size=1)), 0


def fake_kernel(entry, device, ceilings, rounds, budget_s=20.0):
    time = kernels.rates(entry.work, timing.Timing(0.3, 0.01, 40), ceilings) | {"peak_memory": 2**24}
    variants = {"triton": time, "eager": time | {"ms": 0.6}}
    about = {"name": entry.name, "shape": entry.shape, "bytes": entry.work.bytes, "flops": entry.work.flops}
    return about | {"parity": "passed", "variants": variants}


def fake_configs(family, bucket, configs, device, budget_s):
    return [timing.Timing(1.0, 0.0, 3) for _ in configs], []


def fake_steps(monkeypatch):
    """Steps that are fastest at the largest batch, and a profile of one operation."""

    def start(self, name, make):
        self.runners[name] = SimpleNamespace()
        self.results[name] = {"first_loss": 10.9, "start_s": 1.0, "kept_memory": 10**9, "peak_memory": 6 * 10**9}

    def times(self, steps, budget_s=None, names=None):
        for name in names or self.runners:
            batch = re.search(r"batch (\d+)$", name)
            ms = 200.0 - int(batch[1] if batch else 0)
            self.results[name] |= {"ms": ms, "iqr_ms": 0.5, "runs": steps, "skipped_steps": 0}

    @contextmanager
    def turn(self, name):
        yield self.runners[name]

    row = dict.fromkeys(("flops", "bytes", "roof_ms", "bound", "achieved", "arithmetic"))
    rows = [row | {"name": "qkv forward", "calls": 12, "ms": 90.0, "share": 0.9, "gap_ms": 1.0}]
    traced = {"wall_ms": 100.0, "accounted": 1.0, "unaccounted_ms": {}, "overlap_ms": 0.0, "kernels": {}, "trace": "x"}
    for name, fake in (("start", start), ("check", lambda *_: None), ("time", times), ("turn", turn)):
        monkeypatch.setattr(turns.Turns, name, fake)
    monkeypatch.setattr(page.pictures, "draw", lambda *_: [])  # seconds, and tested with the page
    monkeypatch.setattr(turns.gc, "collect", lambda: 0)
    monkeypatch.setattr(profile, "profiled", lambda *_, **__: {"profile": traced, "launches": 400, "rows": rows})


@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="pretends that there is a card")
@pytest.mark.parametrize("machine", ["h200"], indirect=True)
def test_a_large_card_also_runs_the_large_models(machine, tmp_path, monkeypatch):
    stages = [stage for stage in gpu.STAGES if stage.name in ("device", "batch", "precisions", "sizes")]
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert gpu.main(["--out", str(tmp_path / "out"), "--minutes", "60", "--no-store"]) == 1, "no parity test ran"
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["batch"]["size"] == 128 and not any("error" in step for step in kept["steps"])
    assert {step["preset"] for step in kept["steps"]} == {"gpt2-124m", "gpt2-40m", "gpt2-350m", "gpt2-xl"}
    assert {step["variant"] for step in kept["steps"]} == {"triton", "triton fp8", "compile", "eager"}
    assert {step["cap_gb"] for step in kept["steps"]} == {0.0, 12.0}


@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="pretends that there is a card")
def test_every_stage_runs_with_its_real_arguments_and_leaves_its_evidence(machine, tmp_path, capsys):
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--minutes", "60", "--label", "mine"]) == 0
    printed = capsys.readouterr().out
    kept = json.loads((out / "results.json").read_text())
    assert {name: stage["ended"] for name, stage in kept["stages"].items()} == {s.name: True for s in gpu.STAGES}
    for number, stage in enumerate(gpu.STAGES, 1):
        assert re.search(rf"^{number}/12 {stage.name}: .+; until \d\d:\d\d:\d\d at the latest$", printed, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == ALL_FILES
    assert not any("error" in step for step in kept["steps"])
    batch = kept["batch"]["size"]
    assert batch == 8
    main = [step for step in kept["steps"] if step["preset"] == "gpt2-124m" and not step["cap_gb"]]
    assert {step["batch_size"] for step in main} == {1, batch}, "one batch for every stage, and one"
    names = {step["variant"] for step in main}
    assert {"eager", "triton", "compile", "nanogpt", "triton+compile", "triton+graphs", "triton, tuned"} <= names
    assert {"triton fp16-fast", "triton fp8"} <= names
    assert {step["preset"] for step in kept["steps"]} == {"gpt2-124m", "gpt2-40m"}
    assert (
        len(kept["kernels"]["entries"]) == len(gpu.ENTRIES)
        and kept["tuning"]["entries"] > 20
        and kept["projection"]["pairs"]
    )
    assert not kept["projection"].get("errors") and len(kept["ablation"]["rows"]) > 10
    assert {row["measured"].get("error", "")[:7] for row in kept["ablation"]["rows"]} <= {"", "not run"}
    with tarfile.open(out / "evidence.tar.gz") as archive:
        members = set(archive.getnames())
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in members)
    assert {job.log for job in machine} | {"profile-mfu.json", "profile-report.html", "results.json"} <= members
    summary = (out / "summary.md").read_text()
    assert "| A run resumed half way repeats the undisturbed one, bit for bit | confirmed |" in summary
    assert "2 passed, 0 failed" in summary and "Traceback" not in summary
    entries = results.find("mine")[0][1]["entries"]
    assert (
        entries[f"step gpt2-124m {batch} x 4 | nanogpt"]["ms"]
        and entries["layer_norm 8192 x 768 | triton"]["ms"] == 0.3
    )


# ---------------------------------------------------------------- time


def stage(name, share, run):
    return gpu.Stage(name, f"does {name}", share, run)


def begun(tmp_path, seconds=100.0, **more):
    return Session(tmp_path, time.monotonic() + seconds, found(**more))


SLEEP = ("-n", "1", "-r", "1", "print('begun', flush=True)\nimport time\ntime.sleep(60)")


def test_a_stage_that_hangs_is_cut_with_its_traceback_and_the_rest_goes_on(tmp_path, capsys):
    def hangs(run, limit):
        ended = run.child("timeit", *SLEEP, log="sleep.log", limit=6.0)
        assert not ended.finished or "KeyboardInterrupt" in ended.output
        raise gpu.Failed(gpu._reason("sleep.log", ended))

    run = begun(tmp_path)
    start = time.monotonic()
    gpu.run_stages(
        run, [stage("a", 0.5, hangs), stage("b", 0.5, lambda run, limit: run.results.update(batch={}))], 100.0
    )
    assert time.monotonic() - start < 50 and run.results["stages"]["b"]["ended"] is True
    assert "sleep.log" in run.results["stages"]["a"]["ended"] and "sleep.log" in capsys.readouterr().out
    log = (tmp_path / "work" / "sleep.log").read_text()
    assert "begun" in log and re.search(r"most recent call first.*timeit", log, re.DOTALL), log
    with tarfile.open(tmp_path / "evidence.tar.gz") as archive:
        assert "sleep.log" in archive.getnames()


def test_commands_run_at_once_and_those_beside_them_end_with_them(tmp_path):
    run = begun(tmp_path)
    jobs = [Child(f"{i}.log", "timeit", ["-n", "1", "-r", "1", f"print({i})"]) for i in range(2)]
    ended = run.children(jobs, 60.0, [Child("beside.log", "timeit", SLEEP)])
    assert [one.finished for one in ended] == [True, True] and "1" in ended[1].output


def test_each_stage_leaves_the_later_ones_their_share_and_gets_what_earlier_ones_left(tmp_path):
    limits = []
    stages = [
        stage(name, share, lambda run, limit: limits.append(limit)) for name, share in zip("abc", (0.5, 0.3, 0.2))
    ]
    gpu.run_stages(begun(tmp_path), stages, 100.0)
    assert limits == [pytest.approx(50, abs=5), pytest.approx(80, abs=5), pytest.approx(100, abs=5)]


def test_a_stage_that_fails_costs_only_itself(tmp_path):
    def fail(run, limit):
        raise RuntimeError("CUDA error")

    run = begun(tmp_path)
    gpu.run_stages(run, [stage("parity", 0.1, fail), stage("steps", 0.8, lambda run, limit: None)], 100.0)
    ends = {name: one["ended"] for name, one in json.loads((tmp_path / "results.json").read_text())["stages"].items()}
    assert ends == {"parity": "failed: RuntimeError: CUDA error", "steps": True}
    assert "Not complete: failed: RuntimeError: CUDA error" in (tmp_path / "report.md").read_text()


def test_a_second_run_goes_on_with_what_was_not_reached_and_then_with_what_was_cut(tmp_path):
    order = []
    stages = [stage(name, 0.2, lambda run, limit, name=name: order.append(name)) for name in ("device", *"abcd")]
    ended = {"a": True, "b": "stopped: took longer"}
    state = {name: {"ended": how, "seconds": 1.0} for name, how in ended.items()}
    run = begun(tmp_path, stages=state)
    gpu.run_stages(run, stages, 100.0)
    assert order == ["device", "c", "d", "b"] and all(one["ended"] is True for one in run.results["stages"].values())
    late = begun(tmp_path, seconds=5.0)
    gpu.run_stages(late, stages, 100.0)
    assert late.results["stages"] == {}, "what is not begun is reached by the next run"


def test_the_stages_are_in_the_order_of_their_evidence_and_share_the_whole_time():
    names = [stage.name for stage in gpu.STAGES]
    order = ["device", "train", "batch", "parity", "steps", "small", "precisions", "sizes", "kernels", "tuning"]
    assert names == [*order, "projection", "ablation"]
    assert sum(stage.share for stage in gpu.STAGES) == pytest.approx(1)


# ---------------------------------------------------------------- what is left behind


def test_the_archive_has_plain_names_a_limit_and_what_an_earlier_run_put_there(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "ARCHIVE_BYTES", 1000)
    run = begun(tmp_path)
    (run.work / "profile x").mkdir(parents=True)
    (run.work / "profile x" / "trace é+.json").write_text("a")
    (run.work / "large.bin").write_bytes(b"x" * 2000)
    run.close()
    assert {path.name for path in tmp_path.iterdir()} == ALL_FILES - {"steps.png"} and len(ALL_FILES) <= 8
    assert "Too large for the archive: large.bin (0.0 MB)" in (tmp_path / "summary.md").read_text()
    again = begun(tmp_path)
    again.work.mkdir()
    (again.work / "later.log").write_text("b")
    again.close()
    with tarfile.open(tmp_path / "evidence.tar.gz") as archive:
        assert set(archive.getnames()) == {
            "profile-x-trace-.json",
            "later.log",
            "results.json",
            "summary.md",
            "report.md",
        }
        assert archive.extractfile("profile-x-trace-.json").read() == b"a"


def test_the_report_names_device_ratios_and_errors(tmp_path):
    made_up = kernels.rates(Work(0, 10**8), timing.Timing(0.3, 0.01, 40), CEILINGS)
    variants = {"triton": made_up | {"peak_memory": 2**24}, "eager": made_up | {"ms": 0.6, "peak_memory": 2**25}}
    one = {"name": "layer_norm", "shape": "8192 x 768", "parity": "passed", "variants": variants}
    wrong = {"name": "attention", "shape": "", "parity": "crashed: see kernels-attention.log", "variants": {}}
    steps = [step_result("eager", 40_000.0), step_result("triton", 56_000.0)]
    steps += [step_result("compile", 1.0, cap_gb=12.0) | {"error": "oom"}]
    del steps[-1]["tokens_per_second"]
    tests = {"passed": 300, "failed": 1, "skipped": 2, "not_reached": 9, "failures": ["test_x"], "seconds": 61.0}
    everything = found(
        parity=tests | {"finished": False, "processes": 8, "compiled": 1200},
        kernels={
            "environment": ENVIRONMENT,
            "copy_gbs": 450.0,
            "matmul_tflops": {"bf16": 55.0},
            "entries": [one, wrong],
        },
        steps=steps,
    )
    text = markdown.gpu_markdown(everything)
    assert "NVIDIA GeForce RTX 4070, 46 SMs" in text and "2700 MHz" in text and "Failed: test_x" in text
    assert "300 passed, 1 failed, 2 skipped, 9 not_reached in 61 s (cut off by the time budget), in 8 processes" in text
    assert "| gpt2-124m | 8 x 4 | triton | 56,000 |" in text and "| 1.40x |" in text
    assert "gpt2-124m, 12 GB cap" in text and "| oom |" in text
    assert "2.00x" in text and "74% of measured copy bandwidth" in text and "no speed: crashed" in text
    assert "| gpt2-124m, triton, micro-batch 8 |" in text, "memory of the steps that ran"
    pytest.importorskip("matplotlib")
    assert markdown.plot_steps(everything, tmp_path / "steps.png") and (tmp_path / "steps.png").stat().st_size > 10_000
    kept = results.step_entries(steps)
    assert kept["step gpt2-124m 8 x 4 | compile | 12 GB cap"] == {"error": "oom"}


def test_a_figure_is_replaced_by_a_figure_and_not_by_an_error(tmp_path):
    run = begun(tmp_path)
    gpu.keep_steps(run, [step_result("triton", 1.0), step_result("eager", 1.0)])
    gpu.keep_steps(run, [step_result("triton", 2.0), step_result("eager", 3.0) | {"error": "cut"}])
    assert [step["tokens_per_second"] for step in run.results["steps"]] == [2.0, 1.0]


# ---------------------------------------------------------------- verdicts


def verdict_of(claim, **more):
    (one,) = [v for v in verdicts.verdicts(found(**more)) if claim in v.claim]
    return one.verdict.strip("*"), one.evidence


RUN = {"losses": {"1": 5.0, "16": 4.0}, "sha256": "a"}
WRONG = {key: value for key, value in step_result("triton", 1.0).items() if key != "tokens_per_second"}
WRONG["error"] = "no speed: its first loss is 9"
COMPILED = [step_result("compile", 50_000.0), step_result("nanogpt", 56_000.0)]


@pytest.mark.parametrize(
    "claim, more, verdict, evidence",
    [
        ("parity tests", {}, "not reached", ""),
        ("parity tests", {"parity": {"passed": 9, "failed": 0, "not_reached": 0}}, "confirmed", "9 passed"),
        ("parity tests", {"parity": {"passed": 9, "failed": 0, "not_reached": 5}}, "not reached", "5 not reached"),
        ("parity tests", {"parity": {"passed": 9, "failed": 1, "not_reached": 5}}, "refuted", "1 failed"),
        ("resumed", {"train": {"direct": RUN}}, "not reached", ""),
        ("resumed", {"train": {"direct": RUN, "resumed": RUN | {"losses": {"16": 4.0}}}}, "confirmed", "1 of 1 steps"),
        ("resumed", {"train": {"direct": RUN, "resumed": RUN | {"sha256": "b"}}}, "refuted", "moments differ"),
        ("CUDA graphs", {"train": {"direct": RUN, "graphs": RUN | {"losses": {"1": 5.1}}}}, "refuted", "0 of 1"),
        ("CUDA graphs", {"train": {"direct": RUN, "graphs": {"error": "crashed: see x"}}}, "refuted", "see x"),
        ("56,070", {"steps": COMPILED}, "confirmed", "56,000 tokens/s at batch 8"),
        ("56,070", {"steps": [step_result("nanogpt", 40_000.0)]}, "refuted", "40,000"),
        ("gpt2-124m, triton: ", {}, "not reached", ""),
        ("gpt2-124m, triton: ", {"steps": [step_result("triton", 60_000.0)]}, "confirmed", "60,000"),
        ("gpt2-124m, triton: ", {"steps": [step_result("triton", 80_000.0)]}, "refuted", "80,000"),
        ("gpt2-124m, triton: ", {"steps": [WRONG]}, "refuted", "its first loss is 9"),
        ("faster than torch.compile", {"steps": [*COMPILED, step_result("triton", 60_000.0)]}, "confirmed", "1.20 times"),
        ("faster than nanoGPT", {"steps": [*COMPILED, step_result("triton", 50_000.0)]}, "refuted", "0.89 times"),
        ("faster than torch.compile", {"steps": COMPILED}, "not reached", ""),
        ("smaller memory peak", {"steps": [*COMPILED, step_result("triton", 1.0, peak_memory=5)]}, "confirmed", "0.00 GB"),
        ("as counted", {"steps": [step_result("triton", 1.0, peak_memory=10**12)]}, "refuted", "-9"),
        ("at least 60,000", {"steps": [step_result("triton", 59_000.0)]}, "refuted", "59,000"),
    ],
)  # fmt: skip
def test_what_was_measured_confirms_or_refutes_a_claim(claim, more, verdict, evidence):
    assert verdict_of(claim, **more)[0] == verdict and evidence in verdict_of(claim, **more)[1]


def test_the_claims_are_those_of_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| (nanoGPT|fastgpt)", line)]
    assert len(rows) == 2, "a row that this test does not know"
    claims = [v.claim for v in verdicts.verdicts(found(steps=[step_result("triton", 1.0, grad_accum=64)]))]
    assert f"{verdicts.NANOGPT['NVIDIA GeForce RTX 4070']:,}" in rows[0]
    low, high = (round(float(n.replace(",", "")), -2) for n in re.search(
        r"([\d,]+) to ([\d,]+)", next(c for c in claims if c.startswith("gpt2-124m, triton: "))
    ).groups())  # fmt: skip
    assert f"({low:,.0f} to {high:,.0f})" in rows[1]


def test_another_card_has_its_own_claims():
    h200 = ENVIRONMENT | {"device": "NVIDIA H200", "sms": 132, "arch": "sm_90", "memory_gib": 140.0}
    claims = [v.claim for v in verdicts.verdicts(found() | {"environment": h200})]
    assert not any("56,070" in claim or "fp16-fast" in claim for claim in claims)
    assert any("498,000" in claim for claim in claims) and any("gpt2-xl" in claim for claim in claims)
    unknown = [v.verdict for v in verdicts.verdicts(found() | {"environment": ENVIRONMENT | {"device": "NVIDIA X"}})]
    assert set(unknown) == {"not reached"}


# ---------------------------------------------------------------- parts


def test_test_runs_are_read_even_if_cut_off():
    cut = """
[shard: 4 tests]
tests/kernels/test_a.py::test_two[columns of one] FAILED [ 50%]
tests/kernels/test_b.py::test_four PASSED
tests/kernels/test_b.py::test_four ERROR
tests/kernels/test_b.py::test_five """
    read = gpu.read_tests([TESTED, cut])
    failures = ["tests/kernels/test_a.py::test_two[columns of one]", "tests/kernels/test_b.py::test_four"]
    assert read == {"passed": 1, "failed": 2, "skipped": 1, "failures": failures, "not_reached": 3}


def test_shards_have_every_test_once_and_every_function_before_any_second_parameter():
    names = [f"t.py::{function}[{i}]" for function in "abc" for i in range(4)] + ["t.py::d", "t.py::large"]
    items = [SimpleNamespace(nodeid=n, get_closest_marker=lambda mark, n=n: "large" in n or None) for n in names]
    shards = [[item.nodeid for item in conftest.shard(items, i, 2)] for i in range(2)]
    assert sorted(shards[0] + shards[1]) == sorted(names) and shards[0][-1] == "t.py::large"
    first = {name[:7] for shard in shards for name in shard[:2]}
    assert first == {"t.py::a", "t.py::b", "t.py::c", "t.py::d"}


def test_the_tests_run_in_shards(tmp_path, monkeypatch):
    """The real pytest, on one small file, collecting only."""
    monkeypatch.setattr(gpu, "TESTS", ("tests/optim/test_build.py", "--collect-only"))
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    run = begun(tmp_path)
    with pytest.raises(gpu.Failed):
        gpu.run_parity(run, 120.0)
    log = (tmp_path / "work" / "parity-0.log").read_text()
    assert re.search(r"^\[shard: [1-9]\d* tests\]", log, re.MULTILINE), log
    assert run.results["parity"]["not_reached"] > 0 and run.results["parity"]["finished"]


def test_the_batches_and_sizes_are_those_that_fit():
    assert [gpu.batches(gb * 10**9) for gb in (12, 24, 150)] == [[4, 8], [4, 8, 16], [16, 32, 64, 128]]
    plans = {name: list(gpu.size_plan(gb * 10**9, cards.lookup(name))) for name, gb in (("rtx4070", 12), ("h200", 141))}
    assert [preset for preset, _, _ in plans["rtx4070"]] == ["gpt2-40m"]
    assert [preset for preset, _, _ in plans["h200"]] == ["gpt2-40m", "gpt2-xl", "gpt2-350m", "gpt2-124m"]
    assert plans["h200"][-1][2] == 12.0 and "triton fp16-fast" in plans["rtx4070"][0][1]


def test_a_kernel_that_crashes_costs_only_itself_and_a_cut_run_is_gone_on_with(tmp_path, monkeypatch):
    asked, answers = [], [
        (len(gpu.ENTRIES) - 4, "passed", True),  # the next one ended the process
        (2, "failed: AcceleratorError: CUDA error: an illegal memory access", True),  # the first took the context along
        (1, "passed", False),
    ]  # fmt: skip

    def child(self, module, *args, log, limit):
        names = args[args.index("--only") + 1].split(",")
        asked.append(len(names))
        count, parity, finished = answers.pop(0)
        entries = [{"name": name, "shape": "", "parity": parity, "variants": {}} for name in names[:count]]
        write_json(self.work / f"kernels-{names[0]}" / "kernels.json", {"copy_gbs": 450.0, "entries": entries})
        return Ended("", finished)

    monkeypatch.setattr(Session, "child", child)
    run = begun(tmp_path)
    gpu.run_kernels(run, 300)
    parity = [entry["parity"].split(":")[0] for entry in run.results["kernels"]["entries"]]
    assert asked == [len(gpu.ENTRIES), 3, 2]
    assert parity == ["passed"] * (len(gpu.ENTRIES) - 4) + ["crashed", "failed", "passed"]
    answers.append((1, "passed", True))
    gpu.run_kernels(run, 300)
    assert asked[3:] == [1] and len(run.results["kernels"]["entries"]) == len(gpu.ENTRIES) and not run.cut
    gpu.run_kernels(run, 5)
    run.results["kernels"]["measured"].pop()
    gpu.run_kernels(run, 5)
    assert run.cut == [f"kernels-{gpu.ENTRIES[-1].__name__}.log"], "so that the next run goes on with it"


def test_json_is_found_between_other_lines():
    assert session.json_in('warning {x}\n{\n "a": [1,\n 2]}\nend') == {"a": [1, 2]}
    assert session.json_in('{"a": 1}') == {"a": 1} and session.json_in("Traceback") is None
    assert session.last_json('{"a": 1}\n{"b": 2}\n{broken') == {"b": 2}


# ---------------------------------------------------------------- what cannot be


def test_without_a_gpu_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^bench[.]gpu needs a CUDA GPU, but torch .* sees no CUDA GPU"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--minutes", "0"], "minutes is 0: it must be above 0"),
        (["--minutes", "nan"], "minutes is 'nan'"),
        (["--out", "{out}/file/x"], "which cannot be written [(]Not a directory[)]: name another"),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "file").touch()
    arguments = [argument.format(out=tmp_path) for argument in arguments]
    with pytest.raises(UserError, match=sentence):
        gpu.main(arguments if "--out" in arguments else ["--out", str(tmp_path / "out"), *arguments])


@pytest.mark.parametrize(
    "output, sentence",
    [
        (
            json.dumps(DEVICE | {"environment": ENVIRONMENT | {"device": "NVIDIA H200"}}),
            "holds results of device 'NVIDIA Ge",
        ),
        (json.dumps(DEVICE | {"environment": ENVIRONMENT | {"commit": "f00"}}), "commit 'abc123', and this is 'f00'"),
    ],
)
def test_results_of_another_card_or_commit_are_not_gone_on_with(monkeypatch, tmp_path, output, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "check_kernels", lambda command: None)
    monkeypatch.setattr(Session, "child", lambda *_, **__: Ended(output, True))
    write_json(tmp_path / "results.json", found())
    with pytest.raises(UserError, match=sentence):
        gpu.main(["--out", str(tmp_path), "--no-store"])


def test_damaged_results_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    write_json(tmp_path / "results.json", found(stages=None))
    with pytest.raises(UserError, match=r"results\.json is damaged: stages and environment are not both there"):
        gpu.main(["--out", str(tmp_path)])


def test_a_gpu_that_cannot_be_used_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "check_kernels", lambda command: None)
    monkeypatch.setattr(Session, "child", lambda *_, **__: Ended("Traceback", True))
    with pytest.raises(UserError, match=r"the GPU cannot be used: crashed: see device\.log"):
        gpu.main(["--out", str(tmp_path), "--no-store"])


def test_the_page_has_the_stages_and_their_shares():
    text = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| .+ \| (\d+%|what is left) \|$", text, re.MULTILINE)
    assert rows == [(stage.name, f"{stage.share:.0%}" if stage.share else "what is left") for stage in gpu.STAGES]
    assert all(f"`{name}`" in text for name in ALL_FILES)


@pytest.mark.parametrize("module, flags, command", [
    (gpu, ["--out", "{}/out", "--no-store"], "gpu"), (kernels, ["--out", "{}/out"], "kernels"),
    (memory, [], "memory"), (ablation, ["--measure"], "ablation --measure"), (tune, ["--out", "{}/out"], "tune"),
])  # fmt: skip
def test_a_card_that_the_kernels_cannot_run_on_is_one_sentence_before_anything_begins(
    monkeypatch, tmp_path, module, flags, command
):
    flags = [flag.format(tmp_path) for flag in flags]
    for name, value in {"is_available": True, "get_device_capability": (7, 5), "get_device_name": "Tesla T4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
    with pytest.raises(
        UserError, match=rf"^bench\.{command} measures Triton's kernels, but the Tesla T4 has .* shared memory$"
    ):
        module.main(flags)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(requirements, "no_compiler", lambda plain: "Triton finds no C compiler")
    with pytest.raises(UserError, match=r"but Triton finds no C compiler$"):
        module.main(flags)
