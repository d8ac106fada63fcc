"""Everything that a machine with a CUDA GPU can tell, in one command that fits its time:

    python -m bench.gpu --out DIR [--minutes 8]

Most important first: the parity tests on the GPU; each kernel beside its peers; whole training steps of GPT-2 124M and 40M,
eager, compiled and triton, also under a 12 GB cap. Each runs in a process of its own, with a share of the time; results.json,
results.md and steps.png in DIR are rewritten after every one, so whatever cuts the run short costs only what was running.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.entries import ENTRIES
from bench.environment import ROOT, environment
from fastgpt.config import load_preset

CAP_GB = 12.0
STEP_TOLERANCE = 0.02
"""Largest difference between the first loss of a variant and that of eager, same weights and tokens, both in bf16."""

TESTS = ("tests/kernels", "tests/test_optim.py", "tests/test_model.py", "tests/training/test_step.py")
WITHOUT_GPU = ("test_compile_gate", "test_offline")
"""Tests that compile for a GPU that is not here: nothing that this one could add."""

VARIANTS = {
    "eager": ("eager", "none"),
    "triton": ("triton", "none"),
    "compile": ("eager", "default"),
    "triton+compile": ("triton", "default"),
    "compile max-autotune": ("eager", "max-autotune-no-cudagraphs"),
}
"""Name -> (--kernels, --compile mode)."""


@dataclass
class Session:
    """The results so far, where they go, and how long there is."""

    out: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        _replace(self.out / "results.json", json.dumps(self.results, indent=1))
        _replace(self.out / "results.md", report.gpu_markdown(self.results))
        try:
            report.plot_steps(self.results, self.out / "steps.png")
        except Exception as error:  # a picture is not worth the stages that are still to come
            print(f"steps.png is not drawn: {type(error).__name__}: {error}", file=sys.stderr)

    def child(self, module: str, *args: str, log: str, limit: float) -> tuple[str, bool]:
        """Run ``python -m module``: its standard output, which is also kept in a file, and whether it ended in time.

        It gets a process group of its own, which is ended as a whole: a pytest-xdist worker that outlives its controller
        would keep the GPU busy while the next stage is timed.
        """
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        env["PYTHONUNBUFFERED"] = "1"  # what was printed before a child is stopped counts
        path = self.out / log
        with open(path, "w", encoding="utf-8") as file:
            command = [sys.executable, "-m", module, *args]
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(timeout=max(limit, 1))
                finished = True
            except subprocess.TimeoutExpired:
                finished = False
            finally:  # also on Ctrl-C, which a group of its own does not get
                _end(process)
        return path.read_text(encoding="utf-8", errors="replace"), finished


def _end(process: subprocess.Popen) -> None:
    """End a child with everything that it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
        arguments = ["--device", "cuda", "--out", str(folder), "--only", name]
        arguments += ["--quick"] if limit < 90 else []
        arguments += ["--keep-roofs"] if "kernels" in session.results else []
        log, left = f"kernels-{name}.log", deadline - time.monotonic()
        if left < 10:
            found = _unfinished(name, "skipped: the time budget is used up")
        else:
            (folder / "kernels.json").unlink(missing_ok=True)  # an earlier run's must not pass for this one's
            _, finished = session.child("bench.kernels", *arguments, log=log, limit=left)
            reason = "crashed: see " + log if finished else "stopped: took longer than its share of the time"
            found = _read(folder / "kernels.json") or _unfinished(name, reason)
        kernels = session.results.setdefault("kernels", {"environment": session.results["environment"], "entries": []})
        kernels |= {key: found[key] for key in ("copy_gbs", "matmul_tflops") if found.get(key)}
        kernels["entries"] += found["entries"]
        session.save()


def _unfinished(name: str, reason: str) -> dict[str, Any]:
    return {"entries": [{"name": name, "shape": "", "parity": reason, "variants": {}}]}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def step_plan(total_memory: int) -> Iterator[tuple[str, str, float]]:
    """(preset, variant, cap in GB), most important first. Where the card itself has 12 GB there is nothing to cap."""
    main = [name for name in VARIANTS if "max-autotune" not in name]
    for preset in ("gpt2-124m", "gpt2-40m"):
        yield from ((preset, variant, 0.0) for variant in main)
    if total_memory > 1.1 * CAP_GB * 1e9:
        yield from (("gpt2-124m", variant, CAP_GB) for variant in main)
    yield "gpt2-124m", "compile max-autotune", 0.0
    yield "gpt2-40m", "compile max-autotune", 0.0


def run_step(session: Session, preset: str, variant: str, cap_gb: float) -> dict[str, Any]:
    """One training step. Under a cap it starts at twice the preset's batch, and halves it until it fits."""
    kernels, mode = VARIANTS[variant]
    batch_size = load_preset(preset, "cuda").data.batch_size
    batch_size, grad_accum = (2 * batch_size, 2) if cap_gb else (batch_size, 4)
    while True:
        step: dict[str, Any] = {"preset": preset, "variant": variant, "cap_gb": cap_gb}
        step |= {"batch_size": batch_size, "grad_accum": grad_accum}
        if session.left < 25:
            return step | {"error": "skipped: the time budget is used up"}
        arguments = ["--preset", preset, "--kernels", kernels, "--compile", mode, "--cap-gb", str(cap_gb)]
        arguments += ["--batch-size", str(batch_size), "--grad-accum", str(grad_accum), "--seconds", "4"]
        log = f"step-{preset}-{variant.replace(' ', '-')}-{cap_gb:g}.log"
        output, finished = session.child("bench.step", *arguments, log=log, limit=min(session.left - 10, 180))
        found = _last_json(output)
        if found is None:
            return step | {
                "error": "crashed: see " + log if finished else "stopped: took longer than its share of the time"
            }
        if not (found.get("oom") and batch_size > 1):
            return step | found
        batch_size, grad_accum = batch_size // 2, grad_accum * 2


def _last_json(output: str) -> dict[str, Any] | None:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def withhold_wrong(steps: list[dict[str, Any]]) -> None:
    """A step whose first loss is not eager's gets no speed, nor does one that left out updates."""
    eager = {
        s["preset"]: s["first_loss"] for s in steps if s["variant"] == "eager" and "first_loss" in s and not s["cap_gb"]
    }
    for step in steps:
        if step.get("skipped_steps") and "tokens_per_second" in step:
            step["error"] = f"no speed: {step['skipped_steps']} updates were skipped for a gradient that is not finite"
            del step["tokens_per_second"]
        expected = eager.get(step["preset"])
        # Under a cap too: the micro-batches may be smaller, but step for step they hold the same tokens.
        if expected is None or "tokens_per_second" not in step:
            continue
        if not abs(step["first_loss"] - expected) <= STEP_TOLERANCE:
            step["error"] = f"no speed: first loss {step['first_loss']:.4f}, eager's {expected:.4f}"
            del step["tokens_per_second"]


def main(argv: list[str] | None = None) -> int:
    """Parity tests, kernel benchmarks and training steps on this machine's GPU, within a time budget."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json, results.md, steps.png and logs"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"bench.gpu needs a CUDA GPU, and torch {torch.__version__} sees none here.", file=sys.stderr)
        return 2
    budget = 60 * args.minutes
    session = Session(args.out.resolve(), time.monotonic() + budget)  # children run in the repository's root
    session.results["environment"] = environment(torch.device("cuda"))
    session.save()
    run_tests(session, 0.3 * budget)
    session.save()
    run_kernels(session, min(0.3 * budget, session.left - 30))
    session.save()
    steps = session.results["steps"] = []
    for preset, variant, cap_gb in step_plan(torch.cuda.get_device_properties(0).total_memory):
        steps.append(run_step(session, preset, variant, cap_gb))
        withhold_wrong(steps)
        session.save()
    print(report.gpu_markdown(session.results))
    print(f"Results are in {args.out}.")
    tests = session.results["tests"]
    return 1 if tests["failed"] or not tests["passed"] else 0  # none passed: pytest itself did not come up


if __name__ == "__main__":
    sys.exit(main())
