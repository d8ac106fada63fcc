"""Everything that a machine with a CUDA GPU can tell, in one command that fits its time:

    python -m bench.gpu --out runs/gpu                       # 8 minutes
    python -m bench.gpu --out runs/gpu --minutes 20 --label before

Most important first: the parity tests on the GPU; each kernel beside its peers; whole training steps of GPT-2 124M and 40M,
eager, compiled and triton, in the precisions that the card gains from, also under a 12 GB cap (and of 350M and XL where 80 GB
are); the profile of a step, operation by operation (bench.mfu), in bf16 and, while there is time, in those precisions; the step
with each fusion off (bench.ablation); peak memory, predicted and measured (bench.memory); and every time beside what the
projection says of it (bench.project).

Each runs in processes of its own, with a share of the time; results.json, results.md and steps.png in DIR are rewritten
after every one, so whatever cuts the run short costs only what was running. The times also go to bench/results/.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.ops import ENTRIES
from bench.reports import markdown, results
from bench.reports.session import Session, json_in, last_json
from bench.steps.build import updates_left_out, wrong_loss
from bench.steps.variants import VARIANTS
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, read_json
from fastgpt.config import EXPERIMENTAL, load_preset
from fastgpt.hardware import cards
from fastgpt.hardware.environment import environment
from fastgpt.performance.memory import memory

CAP_GB = 12.0
SHORTEST, SHORTEST_STEP = 8.0, 25.0
"""Seconds that no stage, and no training step or its profile, is worth starting in less than."""
LATE = "skipped: the time budget is used up"

TESTS = (
    "tests/kernels",
    "tests/optim/test_adamw.py",
    "tests/test_model.py",
    "tests/training/test_step.py",
    "tests/training/test_graphs.py",
)
WITHOUT_GPU = ("test_compile_gate",)
"""Tests that compile for a GPU that is not here: nothing that this one could add."""


MAIN = ("eager", "triton", "triton+graphs", "compile", "triton+compile")
FAST = ("triton fp8", "triton fp16-fast")
"""The variants in experimental precisions: for cards that gain from them."""
LARGE_GB = 70
"""From here on a card also runs 350M and XL, and all presets in larger micro-batches."""


# ---------------------------------------------------------------- stages


def run_tests(session: Session, limit: float) -> None:
    """The tests that compute, with --device cuda. Compiling takes most of the time, so several processes share it; tests
    that need gigabytes are of one group (``xdist_group``), so that no two of them run at once."""
    workers = min(8, os.cpu_count() or 1)
    parallel = ("-n", str(workers), "--dist", "loadgroup") if workers > 1 and find_spec("xdist") else ()
    start = time.monotonic()
    arguments = [*TESTS, "--device", "cuda", "-vv", "-p", "no:cacheprovider", *parallel]
    arguments += [f"--ignore=tests/kernels/{name}.py" for name in WITHOUT_GPU]
    output, finished = session.child("pytest", *arguments, log="tests.log", limit=limit)
    session.results["tests"] = read_tests(output) | {"seconds": time.monotonic() - start, "finished": finished}


def read_tests(output: str) -> dict[str, Any]:
    """Counts and names from pytest's verbose output, complete or cut off, with xdist or without."""
    # Names hold spaces (``[bf16-columns of a wider tensor]``): read to the end of the line, or two tests become one.
    with_xdist = re.findall(r"^\[gw\d+\].*?\b(PASSED|FAILED|ERROR|SKIPPED) (\S+::.*?) *$", output, re.MULTILINE)
    plain = [
        (verdict, name)
        for name, verdict in re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    ]
    verdicts: dict[str, str] = {}
    for verdict, name in with_xdist or plain:
        if verdicts.get(name) not in ("FAILED", "ERROR"):  # a test may pass and then fail to clean up
            verdicts[name] = verdict
    counts = Counter(verdicts.values())
    failures = sorted(name for name, verdict in verdicts.items() if verdict in ("FAILED", "ERROR"))
    return {"passed": counts["PASSED"], "failed": len(failures), "skipped": counts["SKIPPED"], "failures": failures}


def run_kernels(session: Session, limit: float) -> None:
    """bench.kernels, each entry in a process of its own: a kernel that crashes takes the CUDA context with it."""
    deadline = time.monotonic() + limit
    for entry in ENTRIES:
        name, folder = entry.__name__, session.out / "kernels" / entry.__name__
        arguments = ["--device", "cuda", "--no-sweep", "--no-store", "--out", str(folder), "--only", name]
        arguments += ["--quick"] if limit < 90 else []
        arguments += ["--keep-roofs"] if "kernels" in session.results else []
        log, left = f"kernels-{name}.log", deadline - time.monotonic()
        if left < 10:
            found = _unfinished(name, LATE)
        else:
            (folder / "kernels.json").unlink(missing_ok=True)  # an earlier run's must not pass for this one's
            _, finished = session.child("bench.kernels", *arguments, log=log, limit=left)
            found = read_json(folder / "kernels.json") or _unfinished(name, _reason(log, finished))
        kernels = session.results.setdefault("kernels", {"environment": session.results["environment"], "entries": []})
        kernels |= {key: found[key] for key in ("copy_gbs", "matmul_tflops") if found.get(key)}
        kernels["entries"] += found["entries"]
        session.save()


def _unfinished(name: str, reason: str) -> dict[str, Any]:
    return {"entries": [{"name": name, "shape": "", "parity": reason, "variants": {}}]}


def gaining(gpu: cards.Gpu | None) -> list[str]:
    """Those of FAST whose precision is faster on ``gpu`` than bf16, most important first."""
    return [variant for variant in FAST if cards.gains(VARIANTS[variant].precision, gpu)]


def step_plan(total_memory: int, gpu: cards.Gpu | None) -> Iterator[tuple[str, str, float]]:
    """(preset, variant, cap in GB), most important first. Where the card itself has 12 GB there is nothing to cap; a
    precision that gains nothing on ``gpu`` is left out."""
    large = total_memory > 1e9 * LARGE_GB
    fast = gaining(gpu)
    for preset in ("gpt2-124m", "gpt2-40m"):
        yield from ((preset, variant, 0.0) for variant in (*MAIN, *fast))
    if large:
        yield from (("gpt2-xl", variant, 0.0) for variant in ("compile", "triton"))
        yield from (("gpt2-350m", variant, 0.0) for variant in ("compile", "triton", *fast))
    if total_memory > 1.1 * CAP_GB * 1e9:
        yield from (("gpt2-124m", variant, CAP_GB) for variant in MAIN if variant != "triton+graphs")
    yield "gpt2-124m", "compile max-autotune", 0.0
    yield "gpt2-40m", "compile max-autotune", 0.0


def batch_for(preset: str, total_memory: int) -> int:
    """Sequences per micro-batch: the preset's, which are the RTX 4070's; on a large card, where few would leave gaps, as many
    times two as plain PyTorch, the hungriest, fits into 85% of it."""
    config = load_preset(preset, "cuda")
    batch = config.data.batch_size
    if total_memory <= 1e9 * LARGE_GB:
        return batch
    while memory(config.model, micro_batch=2 * batch, kernels="eager").total <= 0.85 * total_memory:
        batch *= 2
    return batch


def run_step(session: Session, preset: str, variant: str, cap_gb: float, batch_size: int) -> dict[str, Any]:
    """One training step of four micro-batches. Under a cap it starts with two of twice the size, and halves them until they
    fit."""
    batch_size, grad_accum = (2 * batch_size, 2) if cap_gb else (batch_size, 4)
    while True:
        step: dict[str, Any] = {"preset": preset, "variant": variant, "cap_gb": cap_gb}
        step |= {"batch_size": batch_size, "grad_accum": grad_accum}
        if session.left < SHORTEST_STEP:
            return step | {"error": LATE}
        arguments = ["--preset", preset, "--variants", variant, "--cap-gb", str(cap_gb)]
        arguments += ["--batch-size", str(batch_size), "--grad-accum", str(grad_accum)]
        log = f"step-{preset}-{variant.replace(' ', '-')}-{cap_gb:g}.log"
        output, finished = session.child("bench.steps.step", *arguments, log=log, limit=min(session.left - 10, 180))
        found = last_json(output)
        if found is None:
            return step | {"error": _reason(log, finished)}
        found = found["steps"][0]
        if not (found.get("oom") and batch_size > 1):
            return step | found
        batch_size, grad_accum = batch_size // 2, grad_accum * 2


def withhold_wrong(steps: list[dict[str, Any]]) -> None:
    """A step whose first loss is not plain PyTorch's gets no speed, nor does one that left out updates."""
    expected: dict[tuple[str, int], float] = {}
    for reference in ("compile", "eager"):  # eager where there is one
        expected |= {_tokens(s): s["first_loss"] for s in steps if s["variant"] == reference and "first_loss" in s}
    for step in steps:
        if "tokens_per_second" not in step:
            continue
        reason = updates_left_out(step.get("skipped_steps", 0))
        if _tokens(step) in expected and reason is None:
            reason = wrong_loss(step["first_loss"], expected[_tokens(step)], "plain PyTorch's")
        if reason:
            step["error"] = reason
            del step["tokens_per_second"]


def _tokens(step: dict[str, Any]) -> tuple[str, int]:
    """Steps with the same key train the same model on the same tokens, in whatever micro-batches."""
    return step["preset"], step["batch_size"] * step["grad_accum"]


def run_steps(session: Session, limit: float) -> None:
    """Whole training steps, each in a process of its own."""
    steps = session.results["steps"] = []
    total_memory = torch.cuda.get_device_properties(0).total_memory
    for preset, variant, cap_gb in step_plan(total_memory, cards.present(torch.device("cuda"))):
        batch_size = load_preset(preset, "cuda").data.batch_size if cap_gb else batch_for(preset, total_memory)
        steps.append(run_step(session, preset, variant, cap_gb, batch_size))
        withhold_wrong(steps)
        session.save()


def run_profile(session: Session, limit: float) -> None:
    """bench.mfu: where the time of a GPT-2 124M step goes; in bf16, then in each precision that the card gains from, for which
    there is time. The reports stay in DIR/profile."""
    deadline = time.monotonic() + limit
    for earlier in (session.out / "profile").rglob("mfu.json"):
        earlier.unlink()  # an earlier run's must not pass for this one's
    profile = session.results["profile"] = _profiled(session, "profile", "bf16", "eager,compile,triton", limit)
    if "error" in profile:
        return
    for variant in gaining(cards.present(torch.device("cuda"))):
        session.save()
        precision, left = VARIANTS[variant].precision, deadline - time.monotonic()
        if left < SHORTEST_STEP:
            profile["backends"][variant] = {"error": LATE}
            continue
        found = _profiled(session, f"profile/{precision}", precision, "triton", left)
        profile["backends"][variant] = found if "error" in found else found["backends"]["triton"]
        if "error" not in found:
            profile |= {key: f"{profile[key]}, {found[key]}" for key in ("file", "report")}


def _profiled(session: Session, folder: str, precision: str, backends: str, limit: float) -> dict[str, Any]:
    """bench.mfu in one precision: where its files are, and the time of each backend; or why there is none."""
    arguments = ["--model", "gpt2-124m", "--precision", precision, "--backends", backends, "--steps", "5"]
    arguments += ["--device", "cuda", "--out", str(session.out / folder)]
    log = folder.replace("/", "-") + ".log"
    _, finished = session.child("bench.mfu", *arguments, log=log, limit=limit)
    found = read_json(session.out / folder / "mfu.json")
    if found is None:
        return {"error": _reason(log, finished)}
    return {
        "file": f"{folder}/mfu.json",
        "report": f"{folder}/report.html",
        "backends": {
            name: {key: backend[key] for key in ("ms", "iqr_ms", "error") if key in backend}
            for name, backend in found["backends"].items()
        },
    }


def run_ablation(session: Session, limit: float) -> None:
    """bench.ablation: the step of GPT-2 124M with each fusion off. Most of it is compiled by then."""
    path = session.out / "ablation.json"
    path.unlink(missing_ok=True)
    arguments = ["--measure", "--models", "gpt2-124m", "--budget", f"{max(1.0, limit - 5):.0f}s", "--no-store"]
    _, finished = session.child("bench.ablation", *arguments, "--json", str(path), log="ablation.log", limit=limit)
    found = read_json(path)
    reason = {"error": _reason("ablation.log", finished)}
    session.results["ablation"] = reason if found is None else {"rows": found["rows"]}


def run_memory(session: Session, limit: float) -> None:
    """bench.memory: predicted and measured peak memory; what is there when the time is up counts."""
    path = session.out / "memory.json"
    path.unlink(missing_ok=True)
    arguments = ["--presets", "gpt2-124m", "--kernels", "triton", "eager", "--out", str(path)]
    _, finished = session.child("bench.memory", *arguments, log="memory.log", limit=limit)
    found = read_json(path)
    session.results["memory"] = {"error": _reason("memory.log", finished)} if found is None else {"rows": found["rows"]}


def run_projection(session: Session, limit: float) -> None:
    """bench.project on what was just measured: the steps and kernels, and the profiles' operations."""
    deadline = time.monotonic() + limit
    found: dict[str, Any] = {"pairs": []}
    session.save()
    measured = {"results.json": "", "profile/mfu.json": ""} | {
        f"profile/{mode}/mfu.json": mode for mode in EXPERIMENTAL
    }
    files = [name for name in measured if (session.out / name).exists()]
    for done, name in enumerate(files):
        log = f"projection-{Path(name).with_suffix('').as_posix().replace('/', '-')}.log"
        arguments = ("--measured", str(session.out / name), "--json")
        share = (deadline - time.monotonic()) / (len(files) - done)
        output, finished = session.child("bench.project", *arguments, log=log, limit=share)
        answer = json_in(output)
        if answer is None:
            last = output.strip().splitlines()[-1:]
            found.setdefault("errors", []).append(f"{name}: {last[0] if last else _reason(log, finished)}")
        else:
            found["calibration_error"] = answer.get("calibration_error")
            pairs = [pair | {"variant": f"{pair['variant']} {measured[name]}".strip()} for pair in answer["pairs"]]
            found["pairs"] += [pair for pair in pairs if pair not in found["pairs"]]
    session.results["projection"] = found


def _reason(log: str, finished: bool) -> str:
    return f"crashed: see {log}" if finished else "stopped: took longer than its share of the time"


@dataclass(frozen=True)
class Stage:
    name: str
    run: Callable[[Session, float], None]
    share: float
    """Its share of the time. What a stage leaves over goes to the next."""
    module: str
    """What it runs: a stage whose module is not here is skipped."""


STAGES = (
    Stage("tests", run_tests, 0.22, "pytest"),
    Stage("kernels", run_kernels, 0.17, "bench.kernels"),
    Stage("steps", run_steps, 0.27, "bench.steps.step"),
    Stage("profile", run_profile, 0.13, "bench.mfu"),
    Stage("ablation", run_ablation, 0.10, "bench.ablation"),
    Stage("memory", run_memory, 0.06, "bench.memory"),
    Stage("projection", run_projection, 0.05, "bench.project"),
)


def run_stages(session: Session, stages: Sequence[Stage], budget: float) -> None:
    """One after the other; each may take what is left beyond the shares of those behind it. A stage that cannot run, or
    fails, is a reason in the results, and no more."""
    for i, stage in enumerate(stages):
        session.reserved = budget * sum(later.share for later in stages[i + 1 :])
        if find_spec(stage.module) is None:
            session.results[stage.name] = {"error": f"skipped: {stage.module} is not here"}
        elif session.left < SHORTEST:
            session.results[stage.name] = {"error": LATE}
        else:
            try:
                stage.run(session, session.left)
            except Exception as error:
                session.results[stage.name] = {"error": f"failed: {results.sentence(error)}"}
        session.save()


@dataclass(frozen=True)
class GpuConfig:
    out: Annotated[Path, Arg("FOLDER")]
    """Folder for results, reports, pictures and logs."""
    minutes: float = 8.0
    """Time budget."""
    label: str | None = None
    """A name under which bench.compare finds this run."""
    no_store: bool = False
    """Do not keep the results in bench/results/."""


def main(argv: list[str]) -> int:
    """Run all stages. Exit code 1 if a parity test failed or none ran. Raises UserError without a GPU or a folder."""
    args = command.parse(GpuConfig, argv, "bench.gpu", __doc__)
    if not torch.cuda.is_available():
        raise UserError(f"bench.gpu needs a CUDA GPU, and torch {torch.__version__} sees none here")
    if not args.minutes > 0:
        raise UserError(f"minutes is {args.minutes:g}: it must be above 0, and 8 is what all stages need")
    budget = 60 * args.minutes
    session = Session(args.out.resolve(), time.monotonic() + budget)  # children run in the repository's root
    session.results["environment"] = environment(torch.device("cuda"))
    results.check_writable(session.out)
    session.save()
    run_stages(session, STAGES, budget)
    print(markdown.gpu_markdown(session.results))
    print(f"Results are in {args.out}.")
    if not args.no_store:
        print(f"Kept in {keep(session.results, args.label)}.")
    tests = session.results["tests"]
    return 1 if tests.get("failed") or not tests.get("passed") else 0  # none passed: pytest itself did not come up


def keep(found: dict[str, Any], label: str | None) -> Path:
    """Put the times into bench/results/."""
    kernels, steps, ablation = found["kernels"], found["steps"], found.get("ablation", {})
    entries = results.kernel_entries(kernels) if "entries" in kernels else {}
    entries |= results.step_entries(steps) if isinstance(steps, list) else {}
    entries |= {
        f"ablation {row['model']} | {row['precision']}: {row['variant']}": row["measured"]
        for row in ablation.get("rows", ())
        if row["measured"]
    }
    return results.store("gpu", found["environment"], entries, label)


if __name__ == "__main__":
    common.run(main)
