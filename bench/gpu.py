"""The evidence that a machine with a CUDA GPU can give, in one command that fits its time:

    python -m bench.gpu --out runs/gpu                # 12 minutes
    python -m bench.gpu --out runs/gpu --minutes 9    # again, in the same folder: goes on with what was not reached

Most evidence first: does it start, does it train, are the kernels right, how fast is a step beside PyTorch,
torch.compile and nanoGPT, in which precisions and sizes, each kernel beside its peers, tuned, beside what was predicted.

Each stage says what it does and when it will end, runs in processes of its own, and is written down at once; one that takes too
long is interrupted, with what it had found and a traceback of where it was. The folder then holds summary.md (one page: each
claim of the README confirmed, refuted or not reached), report.md, results.json, steps.png, and everything else in
evidence.tar.gz. The times also go to bench/results/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from bench.ops import ENTRIES
from bench.reports import results, verdicts
from bench.reports.session import UNFIT, Child, Ended, Session, json_in, last_json
from bench.steps.build import updates_left_out
from bench.steps.turns import NOT_REACHED
from bench.steps.variants import VARIANTS
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, duration, file_sha256, read_json
from fastgpt.config import EXPERIMENTAL, load_preset
from fastgpt.hardware import cards
from fastgpt.hardware.requirements import check_kernels, no_gpu
from fastgpt.performance.memory import memory

CAP_GB = 12.0
LARGE_GB = 70
"""From here on a card also runs 350M and XL, and larger micro-batches."""
SHORTEST_S = 12.0
"""Seconds that no command is worth starting in less than."""
FAST = ("triton fp8", "triton fp16-fast")
"""The variants in experimental precisions: for cards that gain from them."""
TESTS = (
    "tests/kernels",
    "tests/optim/test_adamw.py",
    "tests/test_model.py",
    "tests/training/test_step.py",
    "tests/training/test_graphs.py",
)
WITHOUT_GPU = ("test_compile_gate",)
"""Tests that compile for a GPU that is not here: nothing that this one could add."""


class Failed(Exception):
    """A stage could not do what it is for; the message says why."""


def gpu_of(session: Session) -> cards.Gpu | None:
    """The card that is here, if it is in the table. Asked of the results: this process itself keeps off the device."""
    about = session.results["environment"]
    return cards.lookup(about["device"], sm_count=about.get("sms"), vram_gb=about.get("memory_gib"))


def gaining(gpu: cards.Gpu | None) -> list[str]:
    """Those of FAST whose precision is faster on ``gpu`` than bf16, most important first."""
    return [variant for variant in FAST if cards.gains(VARIANTS[variant].precision, gpu)]


def _reason(log: str, ended: Ended) -> str:
    return f"crashed: see {log}" if ended.finished else f"stopped: took longer than its time; {log} says where it was"


# ---------------------------------------------------------------- 1. device


def run_device(session: Session, limit: float) -> None:
    limit = max(limit, 90.0)  # a cold disk may take long over the imports, and without this there is no run
    ended = session.child("bench.steps.device", log="device.log", limit=limit)
    found = last_json(ended.output)
    if found is None:
        raise Failed(_reason("device.log", ended))
    here, before = found["environment"], session.results.get("environment", found["environment"])
    for key in ("device", "commit"):
        if before[key] != here[key]:
            raise UserError(
                f"out is {session.out}, which holds results of {key} {before[key]!r}, and this is {here[key]!r}: name another"
            )
    session.results |= {"environment": here, "device": found}


# ---------------------------------------------------------------- 2. train


def run_train(session: Session, limit: float) -> None:
    """30 steps of the demo; the same with CUDA graphs; and the last 15 again, resumed from the first run's checkpoint."""
    data, end = session.work / "data", time.monotonic() + limit
    _write_text(data)
    shared = ["--data", str(data), "--kernels", "triton", "--grad-accum", "1", "--max-iters", "30"]
    shared += ["--checkpoint-interval", "15", "--eval-interval", "0", "--eval-iters", "2", "--log-interval", "5"]
    shared += ["--no-tensorboard", "--warmup-iters", "5"]
    runs: dict[str, list[str]] = {
        "direct": [],
        "graphs": ["--cuda-graphs", "on"],
        "resumed": ["--resume", str(session.work / "train-direct" / "step-00000015")],
    }
    found: dict[str, Any] = {}
    session.results["train"] = found
    try:
        for name, flags in runs.items():
            out, log = session.work / f"train-{name}", f"train-{name}.log"
            share = (end - time.monotonic()) * (1.0 if name == "resumed" else 0.6)  # the first also compiles
            ended = session.child("fastgpt.train", *shared, *flags, "--out", str(out), log=log, limit=share)
            last = out / "step-00000030" / "tensors-00000.safetensors"
            found[name] = (
                _run_of(out) | {"sha256": file_sha256(last)} if last.exists() else {"error": _reason(log, ended)}
            )
            if name == "direct" and "error" in found[name]:
                raise Failed(found[name]["error"])
    finally:
        for folder in (data, *(session.work / f"train-{name}" for name in runs)):
            for large in (*folder.glob("step-*"), *folder.glob("*.bin")):
                shutil.rmtree(large) if large.is_dir() else large.unlink()


def _write_text(folder: Path) -> None:
    """Real text without a tokenizer: Python's own library sources as bytes, the first 4 MB to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in sources)[: 5 * 2**20], np.uint8).astype("<u2")
    text[: 4 * len(text) // 5].tofile(folder / "train.bin")
    text[4 * len(text) // 5 :].tofile(folder / "val.bin")


def _run_of(out: Path) -> dict[str, Any]:
    """The losses by step that a run has logged, and its median milliseconds."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step" in line and "loss" in line]
    times = [line["ms"] for line in steps if line.get("ms")]
    return {
        "losses": {str(line["step"]): line["loss"] for line in steps},
        "ms": float(np.median(times)) if times else None,
    }


# ---------------------------------------------------------------- 3. batch


def batches(total_memory: int) -> list[int]:
    """Micro-batches of GPT-2 124M that plain PyTorch, the hungriest, fits into the card by count; on a small one, half of the
    preset's at least."""
    config = load_preset("gpt2-124m", "cuda")
    sizes = [config.data.batch_size // 2]
    while memory(config.model, micro_batch=2 * sizes[-1], kernels="eager").total <= 0.85 * total_memory:
        sizes.append(2 * sizes[-1])
    return sizes[-4:]


def run_batch(session: Session, limit: float) -> None:
    sizes = batches(session.results["device"]["total_memory"])
    rows = _steps(session, "gpt2-124m", ["triton"], ",".join(map(str, sizes)), limit, grad_accum=1, keep=False)
    timed = {row["batch_size"]: row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    if not timed:
        raise Failed(rows[0]["error"])
    session.results["batch"] = {"size": max(timed, key=lambda size: timed[size]), "tokens_per_second": timed}


def accumulation(batch_size: int) -> int:
    """Micro-batches per step: four, or fewer large ones, so that a step takes less than a second."""
    return max(2, min(4, 64 // batch_size))


def batch_of(session: Session) -> int:
    """Sequences per micro-batch of GPT-2 124M, for every stage: the best, or the preset's where that was not found."""
    found = session.results.get("batch", {}).get("size")
    return found or load_preset("gpt2-124m", "cuda").data.batch_size


# ---------------------------------------------------------------- 4. parity


def run_parity(session: Session, limit: float) -> None:
    """The tests that compute, with --device cuda, in as many processes as there are cores and memory for: most of their time
    is compiling. Each process has every n-th test of an order in which all functions come before any second parameter, so that
    a run that is cut has seen every kernel. Where memory allows it, torch.compile's cache is filled beside them."""
    total, before = session.results["device"]["total_memory"], _compiled()
    workers = max(1, min(os.cpu_count() or 1, int(total / 1.5e9)))
    arguments = [*TESTS, "--device", "cuda", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    arguments += [f"--ignore=tests/kernels/{name}.py" for name in WITHOUT_GPU]
    jobs = [Child(f"parity-{i}.log", "pytest", [*arguments, f"--shard={i}/{workers}"]) for i in range(workers)]
    beside = []
    if total > 20e9:
        flags = _step_flags("gpt2-124m", ["compile", "nanogpt", "triton+compile"], str(batch_of(session)), 1)
        beside = [Child("inductor.log", "bench.steps.step", [*flags, "--steps", "1"])]
    start = time.monotonic()
    ended = session.children(jobs, limit, beside)
    found = read_tests([one.output for one in ended])
    found |= {"seconds": time.monotonic() - start, "finished": all(one.finished for one in ended)}
    session.results["parity"] = found | {"processes": workers, "compiled": _compiled() - before}
    if not found["passed"] and not found["failed"]:
        raise Failed(_reason("parity-0.log", ended[0]))


def _compiled() -> int:
    """Kernels in Triton's cache."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for _ in folder.rglob("*.cubin"))


def read_tests(outputs: Sequence[str]) -> dict[str, Any]:
    """Counts and names from pytest's verbose outputs, complete or cut off."""
    verdicts_of: dict[str, str] = {}
    collected = 0
    for output in outputs:
        found = re.search(r"^\[shard: (\d+) tests\]", output, re.MULTILINE)
        collected += int(found[1]) if found else 0
        # Names hold spaces (``[bf16-columns of a wider tensor]``): read up to the verdict, or two tests become one.
        for name, verdict in re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE):
            if verdicts_of.get(name) not in ("FAILED", "ERROR"):  # a test may pass and then fail to clean up
                verdicts_of[name] = verdict
    counts = Counter(verdicts_of.values())
    failures = sorted(name for name, verdict in verdicts_of.items() if verdict in ("FAILED", "ERROR"))
    found_all = {"passed": counts["PASSED"], "failed": len(failures), "skipped": counts["SKIPPED"]}
    return found_all | {"failures": failures, "not_reached": max(0, collected - len(verdicts_of))}


# ---------------------------------------------------------------- 5. to 8. steps


def _step_flags(preset: str, variants: Sequence[str], batch_size: str, grad_accum: int) -> list[str]:
    flags = ["--preset", preset, "--variants", ",".join(variants), "--batch-size", batch_size]
    return [*flags, "--grad-accum", str(grad_accum)]


def _steps(
    session: Session, preset: str, variants: Sequence[str], batch_size: str, limit: float, *,
    grad_accum: int | None = None, cap_gb: float = 0.0, keep: bool = True, name: str = "", env: Mapping[str, str] = {},
) -> list[dict[str, Any]]:  # fmt: skip
    """Training steps in turns, in one process: their rows, which ``keep`` adds to the results under ``name``."""
    grad_accum = grad_accum or accumulation(int(batch_size))
    cap = f"-cap-{cap_gb:g}" if cap_gb else ""
    log = UNFIT.sub("-", f"step-{preset}-batch-{batch_size}{cap}-{len(variants)}-variants{name}.log")
    flags = [*_step_flags(preset, variants, batch_size, grad_accum), "--cap-gb", str(cap_gb)]
    flags += ["--seconds", f"{max(5.0, limit / 3):.0f}"]
    about: dict[str, Any] = {"preset": preset, "batch_size": int(batch_size.split(",")[0]), "grad_accum": grad_accum}
    about["cap_gb"] = cap_gb
    if limit < SHORTEST_S:
        session.cut.append(log)
        rows = [about | {"variant": variant, "error": NOT_REACHED} for variant in variants]
    else:
        ended = session.child("bench.steps.step", *flags, log=log, limit=limit, env=env)
        found = last_json(ended.output)
        error = {"error": _reason(log, ended)}
        rows = found["steps"] if found else [about | {"variant": variant} | error for variant in variants]
    if keep:
        keep_steps(session, [row | {"variant": row["variant"] + name} for row in rows])
    return rows


def keep_steps(session: Session, rows: list[dict[str, Any]]) -> None:
    """Add rows to the results; one that has been there is replaced, but not a figure by an error."""
    steps = session.results.setdefault("steps", [])
    for row in rows:
        same = [i for i, step in enumerate(steps) if verdicts.key(step) == verdicts.key(row)]
        if not same:
            steps.append(row)
        elif "error" not in row or "error" in steps[same[0]]:
            steps[same[0]] = row
    session.save()


def run_steps(session: Session, limit: float) -> None:
    """bench.mfu in bf16: eager, triton, nanoGPT and both under torch.compile, in turns and then profiled."""
    names = "eager,triton,compile,nanogpt,triton+compile"
    found = _profiled(session, "profile", "bf16", names, batch_of(session), limit)
    session.results["profile"] = _backends_of(found, "profile")
    rows = []
    for name, backend in found["backends"].items():
        row: dict[str, Any] = {"preset": "gpt2-124m", "variant": name, "cap_gb": 0.0}
        row |= {"batch_size": batch_of(session), "grad_accum": accumulation(batch_of(session))}
        row |= {key: value for key, value in backend.items() if key not in ("rows", "profile", "mfu")}
        if "mfu" in backend:
            row["mfu"] = backend["mfu"][0]["value"]
        if reason := updates_left_out(row.get("skipped_steps", 0)):
            row = {key: value for key, value in row.items() if key != "tokens_per_second"} | {"error": reason}
        rows.append(row)
    keep_steps(session, rows)
    if not any("ms" in row for row in rows):
        raise Failed("no step could be timed: see profile.log")


def _profiled(
    session: Session, folder: str, precision: str, backends: str, batch_size: int, limit: float
) -> dict[str, Any]:
    """The results file of bench.mfu, whose files stay in ``folder``. Raises Failed where there is none."""
    arguments = ["--model", "gpt2-124m", "--precision", precision, "--backends", backends, "--steps", "8"]
    arguments += ["--batch", str(batch_size), "--grad-accum", str(accumulation(batch_size))]
    arguments += ["--device", "cuda", "--out", str(session.work / folder)]
    ended = session.child("bench.mfu", *arguments, log=f"{folder}.log", limit=limit)
    found = read_json(session.work / folder / "mfu.json")
    if found is None:
        raise Failed(_reason(f"{folder}.log", ended))
    return found


def _backends_of(found: dict[str, Any], folder: str) -> dict[str, Any]:
    """What the report says of a profile."""
    shown = ("ms", "iqr_ms", "error", "profile_error")
    backends = {name: {key: b[key] for key in shown if key in b} for name, b in found["backends"].items()}
    return {"file": f"{folder}-mfu.json", "report": f"{folder}-report.html", "backends": backends}


def run_small(session: Session, limit: float) -> None:
    """A micro-batch of one, with and without CUDA graphs: graphs are faster where the host is not hidden."""
    _steps(session, "gpt2-124m", ["triton", "triton+graphs"], "1", limit, grad_accum=1)


def run_precisions(session: Session, limit: float) -> None:
    """The experimental precisions beside bf16, then, while there is time, the profile of each."""
    fast, end = gaining(gpu_of(session)), time.monotonic() + limit
    if not fast:
        session.results["precisions"] = {"note": "this card gains from none"}
        return
    _steps(session, "gpt2-124m", ["triton", *fast], str(batch_of(session)), limit)
    for variant in fast:
        precision, left = VARIANTS[variant].precision, end - time.monotonic()
        profile = session.results.setdefault("profile", {"file": "", "report": "", "backends": {}})
        if left < SHORTEST_S:
            session.cut.append(f"profile-{precision}.log")
            profile["backends"].setdefault(variant, {"error": NOT_REACHED})
            continue
        try:
            found = _profiled(session, f"profile-{precision}", precision, "triton", batch_of(session), left)
        except Failed as error:
            profile["backends"][variant] = {"error": str(error)}
            continue
        one = _backends_of(found, f"profile-{precision}")
        profile["backends"][variant] = one["backends"]["triton"]
        for key in ("file", "report"):
            profile[key] = ", ".join(filter(None, (profile[key], one[key])))
        session.save()


def size_plan(total_memory: int, gpu: cards.Gpu | None) -> Iterator[tuple[str, list[str], float]]:
    """(preset, variants, cap in GB), most important first."""
    yield "gpt2-40m", ["triton", "compile", "eager", *gaining(gpu)], 0.0
    if total_memory > 1e9 * LARGE_GB:
        yield "gpt2-xl", ["triton", "compile"], 0.0
        yield "gpt2-350m", ["triton", "compile", *gaining(gpu)], 0.0
    if total_memory > 1.1 * CAP_GB * 1e9:
        yield "gpt2-124m", ["triton", "compile", "eager"], CAP_GB


def run_sizes(session: Session, limit: float) -> None:
    end, total = time.monotonic() + limit, session.results["device"]["total_memory"]
    plan = list(size_plan(total, gpu_of(session)))
    for number, (preset, variants, cap_gb) in enumerate(plan):
        config = load_preset(preset, "cuda")
        size = config.data.batch_size
        while not cap_gb and memory(config.model, micro_batch=2 * size, kernels="eager").total <= 0.5 * total:
            size *= 2
        share = (end - time.monotonic()) / (len(plan) - number)
        _steps(session, preset, variants, str(size), share, cap_gb=cap_gb)


# ---------------------------------------------------------------- 9. kernels


def run_kernels(session: Session, limit: float) -> None:
    """bench.kernels, all entries in one process; those behind one that took the CUDA context with it, in another."""
    end = time.monotonic() + limit
    kernels = session.results.setdefault("kernels", {"entries": [], "measured": []})
    kernels["environment"] = session.results["environment"]
    shared = ["--device", "cuda", "--no-sweep", "--no-store", "--keep-roofs"]
    while todo := [entry.__name__ for entry in ENTRIES if entry.__name__ not in kernels["measured"]]:
        left = end - time.monotonic()
        folder, log = session.work / f"kernels-{todo[0]}", f"kernels-{todo[0]}.log"
        if left < SHORTEST_S:
            session.cut.append(log)
            return
        arguments = [*shared, "--out", str(folder), "--only", ",".join(todo)]
        ended = session.child("bench.kernels", *arguments, log=log, limit=left)
        found = read_json(folder / "kernels.json") or {"entries": []}
        entries = found["entries"]
        lost = [i for i, entry in enumerate(entries) if "CUDA error" in entry["parity"]]
        entries = entries[: lost[0] + 1] if lost else entries
        if not lost and len(entries) < len(todo) and ended.finished:
            entries.append({"name": todo[len(entries)], "shape": "", "parity": _reason(log, ended), "variants": {}})
        kernels |= {key: found[key] for key in ("copy_gbs", "matmul_tflops") if found.get(key)}
        kernels["entries"] += entries
        kernels["measured"] += todo[: len(entries)]
        session.save()
        if not ended.finished:
            return


# ---------------------------------------------------------------- 10. to 12. tuning, projection, ablation


def run_tuning(session: Session, limit: float) -> None:
    """bench.tune, then the step without and with the table that it wrote."""
    cache, step_s = session.work / "cache", min(40.0, limit / 4)
    most = limit - 2 * step_s
    own = {"XDG_CACHE_HOME": str(cache)}
    budget = f"{max(5.0, most - 30):.0f}s"  # what it compiles or times when that is up goes on for a while
    ended = session.child("bench.tune", "--budget", budget, log="tune.log", limit=most, env=own)
    table = next(cache.glob("fastgpt/tuning/sm*.json"), None)
    if table is None:
        raise Failed(_reason("tune.log", ended))
    entries = json.loads(table.read_text(encoding="utf-8"))["entries"]
    session.results["tuning"] = {"table": table.name, "entries": len(entries)}
    for name, env in ((", untuned", {}), (", tuned", own)):
        _steps(session, "gpt2-124m", ["triton"], str(batch_of(session)), step_s, name=name, env=env)
    shutil.rmtree(cache / "fastgpt" / "tuning" / "compiled", ignore_errors=True)


def run_projection(session: Session, limit: float) -> None:
    """bench.project on what was measured: the steps and kernels, and the profiles' operations."""
    end = time.monotonic() + limit
    found: dict[str, Any] = {"pairs": []}
    session.save()
    measured = {session.out / "results.json": ""}
    measured |= {session.work / "profile" / "mfu.json": ""}
    measured |= {session.work / f"profile-{mode}" / "mfu.json": mode for mode in EXPERIMENTAL}
    files = [path for path in measured if path.exists()]
    for done, path in enumerate(files):
        name = path.parent.name if path.name == "mfu.json" else "results"
        log, share = f"projection-{name}.log", (end - time.monotonic()) / (len(files) - done)
        ended = session.child("bench.project", "--measured", str(path), "--json", log=log, limit=share)
        answer = json_in(ended.output)
        if answer is None:
            last = ended.output.strip().splitlines()[-1:]
            found.setdefault("errors", []).append(f"{name}: {last[0] if last else _reason(log, ended)}")
        else:
            found["calibration_error"] = answer.get("calibration_error")
            pairs = [pair | {"variant": f"{pair['variant']} {measured[path]}".strip()} for pair in answer["pairs"]]
            found["pairs"] += [pair for pair in pairs if pair not in found["pairs"]]
    session.results["projection"] = found


def run_ablation(session: Session, limit: float) -> None:
    """bench.ablation: the step of GPT-2 124M with each fusion off. Most of it is compiled by then."""
    path = session.work / "ablation.json"
    arguments = ["--measure", "--models", "gpt2-124m", "--budget", f"{max(1.0, limit - 20):.0f}s", "--no-store"]
    arguments += ["--batch-size", str(batch_of(session)), "--json", str(path)]
    ended = session.child("bench.ablation", *arguments, log="ablation.log", limit=limit)
    found = read_json(path)
    if found is None:
        raise Failed(_reason("ablation.log", ended))
    session.results["ablation"] = {"rows": found["rows"]}


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Stage:
    name: str
    does: str
    """What is printed before it."""
    share: float
    """Its share of the time. What a stage leaves over goes to the next."""
    run: Callable[[Session, float], None]
    """Runs it in so many seconds. Raises Failed, or anything else."""


STAGES = (
    Stage("device", "imports, versions, rates and clock under load", 0.04, run_device),
    Stage("train", "30 steps, with CUDA graphs, and resumed half way: the same bits?", 0.13, run_train),
    Stage("batch", "the micro-batch at which GPT-2 124M is fastest", 0.06, run_batch),
    Stage("parity", "the tests on this GPU, in a process per core", 0.21, run_parity),
    Stage("steps", "GPT-2 124M: eager, triton, torch.compile, nanoGPT, in turns, profiled", 0.20, run_steps),
    Stage("small", "a micro-batch of one, with and without CUDA graphs", 0.06, run_small),
    Stage("precisions", "the experimental precisions beside bf16", 0.07, run_precisions),
    Stage("sizes", "other sizes of GPT-2, and 12 GB", 0.08, run_sizes),
    Stage("kernels", "each kernel beside its peers", 0.08, run_kernels),
    Stage("tuning", "launch configs measured, and the step with them", 0.05, run_tuning),
    Stage("projection", "predicted beside measured", 0.02, run_projection),
    Stage("ablation", "the step with each fusion off", 0.0, run_ablation),
)
"""Most evidence first."""


def run_stages(session: Session, stages: Sequence[Stage], budget: float) -> None:
    """One after the other, those that an earlier run in this folder has not begun before those that it began and did not end.
    Each may take what is left beyond the shares of those behind it. A stage that fails is a reason in the results, and no more.
    """
    state = session.results.setdefault("stages", {})
    todo = [stage for stage in stages if stage.name not in state]
    todo += [stage for stage in stages if state.get(stage.name, {"ended": True})["ended"] is not True]
    todo.sort(key=lambda stage: stage.name != "device")  # first, whatever was reached: is this the same card?
    for number, stage in enumerate(todo):
        session.reserved = budget * sum(later.share for later in todo[number + 1 :])
        if session.left < SHORTEST_S:
            continue
        limit, begun = session.left, time.monotonic()
        until = datetime.now() + timedelta(seconds=limit)
        print(f"{number + 1}/{len(todo)} {stage.name}: {stage.does}; until {until:%H:%M:%S} at the latest", flush=True)
        try:
            session.cut.clear()
            stage.run(session, limit)
            ended: bool | str = f"cut: {', '.join(session.cut)}" if session.cut else True
        except UserError:
            raise
        except Failed as error:
            ended = str(error)
        except Exception as error:
            ended = f"failed: {results.sentence(error)}"
        if "environment" not in session.results:
            raise UserError(f"the GPU cannot be used: {ended} in {session.work}")
        seconds = time.monotonic() - begun
        state[stage.name] = {"ended": ended, "seconds": round(seconds, 1)}
        print(f"    {duration(seconds)}{'' if ended is True else ': ' + str(ended)}", flush=True)
        session.publish()


@dataclass(frozen=True)
class GpuConfig:
    out: Annotated[Path, Arg("FOLDER")]
    """Folder for the summary and the archive. One that an earlier run has left is gone on with."""
    minutes: float = 12.0
    """Time budget."""
    label: str | None = None
    """A name under which bench.compare finds this run."""
    no_store: bool = False
    """Do not keep the results in bench/results/."""


def main(argv: list[str]) -> int:
    """Run all stages. Exit code 1 if a parity test failed or none ran. Raises UserError without a GPU or a folder."""
    args = command.parse(GpuConfig, argv, "bench.gpu", __doc__)
    if not torch.cuda.is_available():
        raise UserError(f"bench.gpu needs a CUDA GPU, but {no_gpu()}")
    if not args.minutes > 0:
        raise UserError(f"minutes is {args.minutes:g}: it must be above 0, and 12 is what most stages need")
    results.check_writable(args.out)
    budget, out = 60 * args.minutes, args.out.resolve()  # children run in the repository's root
    found = {}
    if (out / "results.json").exists():
        found = results.read(out / "results.json", "bench.gpu", verdicts.SCHEMA, verdicts.SCHEMA_VERSION)
        if not all(isinstance(found.get(key), dict) for key in ("stages", "environment")):
            raise UserError(
                f"{out / 'results.json'} is damaged: stages and environment are not both there; name another --out"
            )
        found["stages"].pop("device", None)
    check_kernels("bench.gpu")
    session = Session(out, time.monotonic() + budget, found or verdicts.empty())
    try:
        run_stages(session, STAGES, budget)
    finally:
        if "environment" in session.results:
            session.close()
    print(verdicts.summary(session.results))
    print(f"{args.out / 'summary.md'} is what you have just read; {args.out / 'evidence.tar.gz'} has everything.")
    if not args.no_store:
        print(f"Kept in {keep(session.results, args.label)}.")
    tests = session.results.get("parity", {})
    return 1 if tests.get("failed") or not tests.get("passed") else 0  # none passed: pytest itself did not come up


def keep(found: dict[str, Any], label: str | None) -> Path:
    """Put the times into bench/results/."""
    entries = results.kernel_entries(found["kernels"]) if "kernels" in found else {}
    entries |= results.step_entries(found.get("steps", []))
    entries |= {
        f"ablation {row['model']} | {row['precision']}: {row['variant']}": row["measured"]
        for row in found.get("ablation", {}).get("rows", ())
        if row["measured"]
    }
    return results.store("gpu", found["environment"], entries, label)


if __name__ == "__main__":
    common.run(main)
