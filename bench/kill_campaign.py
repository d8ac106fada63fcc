"""Kill a training run again and again at random moments, and see whether it ends as if nothing had happened.

A small run on this machine's CPU (real text, dropout on, a checkpoint every other step, saved in the background) is killed
with SIGKILL while it trains, saves, starts or loads, and started again with ``--resume auto`` until it is done. Then weights,
optimizer state, loader position and random states of its last checkpoint, and the loss of every step in metrics.jsonl, are
compared bit for bit with those of the same run left alone.

Examples:
  python -m bench.kill_campaign                        30 kills
  python -m bench.kill_campaign --tries 3 --steps 60   a quick look
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from fastgpt import command, common
from fastgpt.checkpoints import checkpoint
from fastgpt.checkpoints.folder import existing, newest_valid, step_of
from fastgpt.checkpoints.tree import split
from fastgpt.command import Arg
from fastgpt.common import UserError

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "kernels": "eager",
    "device": "cpu",
    "data": "stdlib",
    "tokenizer": "bytes",
    "vocab-size": 256,
    "n-layer": 2,
    "n-head": 4,
    "n-embd": 128,
    "block-size": 64,
    "dropout": 0.1,
    "batch-size": 4,
    "grad-accum": 2,
    "warmup-iters": 10,
    "eval-interval": 20,
    "eval-iters": 2,
    "checkpoint-interval": 2,
    "keep-checkpoints": 2,
    "log-interval": 1,
}


@dataclass
class Tally:
    kills: int = 0
    survived: int = 0
    in_save: int = 0
    """Kills that left a half-written or half-deleted checkpoint behind."""
    before_training: int = 0
    """Kills while the run was starting or loading."""
    finished: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class KillConfig:
    tries: int = 30
    """Kills."""
    steps: int = 300
    """Optimizer steps of the run."""
    window: Annotated[float, Arg("SECONDS")] = 3.0
    """A kill comes within so many seconds of training."""
    seed: int = 0
    """Another seed kills at other moments."""
    out: Annotated[Path | None, Arg("FOLDER")] = None
    """A folder for the runs, kept afterwards. Without it: a temporary one."""

    def __post_init__(self) -> None:
        for name in ("tries", "steps", "window"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be more than 0")
        if self.out is not None and self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"out is {self.out}, which is not empty: name a new one")


def main(args: list[str]) -> int:
    options = command.parse(KillConfig, args, "bench.kill_campaign", __doc__)
    with tempfile.TemporaryDirectory() as temporary:
        tally = campaign(options.out or Path(temporary), options)
    for problem in tally.problems:
        print(f"PROBLEM: {problem}")
    print(
        f"survived {tally.survived}/{tally.kills} kills ({tally.in_save} of them during a save, {tally.before_training} before "
        f"training had begun again); {tally.identical}/{tally.finished} runs ended bit-identical to the undisturbed one"
    )
    return 0 if tally.survived == tally.kills and tally.identical == tally.finished and not tally.problems else 1


def campaign(folder: Path, options: KillConfig) -> Tally:
    """Kill ``options.tries`` times, in as many runs as that takes, and let the last one finish."""
    moments = random.Random(options.seed)
    began = time.monotonic()
    _, finished, log = attempt(folder / "undisturbed", options.steps, None, None)
    print(f"undisturbed: {options.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    if not finished:
        return Tally(problems=[f"the undisturbed run failed: {_tail(log)}"])
    wanted = fingerprint(folder / "undisturbed")
    tally, number, unproven = Tally(), 1, 0
    while tally.kills < options.tries or unproven:
        run = folder / f"killed-{number}"
        in_training = moments.random() < 0.8
        delay = moments.uniform(0, options.window if in_training else 4.0) if tally.kills < options.tries else None
        before = leftovers(run)
        trained, finished, log = attempt(
            run, options.steps, delay if in_training else None, None if in_training else delay
        )
        if trained or finished:  # the kills before this start were survived
            tally.survived, unproven = tally.survived + unproven, 0
        if not finished and log is not None:
            tally.problems.append(f"{run} did not go on after {unproven} kills: {_tail(log)}")
            number, unproven = number + 1, 0
            if len(tally.problems) > 3:
                break
        elif not finished:
            tally.kills, unproven = tally.kills + 1, unproven + 1
            saving = bool(leftovers(run) - before)
            tally.in_save += saving
            tally.before_training += not trained
            kept = existing(run)
            where = f"last checkpoint {kept[-1].name}" if kept else "no checkpoint yet"
            print(f"kill {tally.kills}/{options.tries}: {where}{', during a save' if saving else ''}", flush=True)
            if kept and step_of(newest_valid(run)[0]) == options.steps:
                finished = True  # the kill came after the last save: nothing is left to resume
                tally.survived, unproven = tally.survived + unproven, 0
        if finished:
            tally.finished += 1
            differs = [what for what, value in fingerprint(run).items() if value != wanted[what]]
            tally.identical += not differs
            if differs:
                tally.problems.append(f"{run} ended with other {', '.join(differs)}")
            print(f"{run.name} finished: {'other ' + ', '.join(differs) if differs else 'bit-identical'}", flush=True)
            number += 1
    return tally


def leftovers(run: Path) -> set[tuple[str, int]]:
    """What half-written or half-deleted checkpoints lie in a run's folder, told apart from earlier ones of that name."""
    found = [path for path in run.glob("*") if path.name.endswith((".partial", ".deleted"))]
    return {(path.name, path.stat().st_ino) for path in found}


def attempt(
    run: Path, steps: int, after_training: float | None, after_start: float | None
) -> tuple[bool, bool, Path | None]:
    """Start or resume ``run``; kill it so many seconds after its first step in this process, or after its start, or (both
    None) not at all. Returns (it trained, it finished, its output if it ended by itself)."""
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    settings = {**SETTINGS, "max-iters": steps, "out": run, "resume": "auto"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        start, trained_at = time.monotonic(), None
        try:
            while process.poll() is None:
                now = time.monotonic()
                if trained_at is None and metrics.exists() and metrics.stat().st_size > before:
                    trained_at = now
                if after_start is not None and now - start >= after_start:
                    break
                if after_training is not None and trained_at is not None and now - trained_at >= after_training:
                    break
                time.sleep(0.002)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    ended = code != -signal.SIGKILL
    return trained_at is not None, code == 0, log if ended else None


def fingerprint(run: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how often it was interrupted, by name, exactly."""
    path, damaged = newest_valid(run)
    saved = checkpoint.load(path, verify=False)
    parts: dict[str, Any] = {"step": saved["step"], "damaged checkpoints": damaged}
    generators = {f"random state of {name}": state for name, state in saved.pop("rng").items()}
    named = {**{name: saved[name] for name in ("model", "optimizer", "loader")}, **generators}
    for name, part in named.items():
        tree, tensors = split(part, name)
        parts[name] = (
            tree,
            {key: value.reshape(-1).view(torch.uint8).numpy().tobytes() for key, value in tensors.items()},
        )
    losses: dict[int, set[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record and "step" in record:
            losses.setdefault(record["step"], set()).add(record["loss"])  # a step done twice must repeat its loss
    return {**parts, "losses": losses}


def _tail(log: Path | None) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:]) if log is not None else "no output"


if __name__ == "__main__":
    common.run(main)
