"""Do to a training run what happens to runs, at random moments, and see whether it ends as if nothing had happened.

A small run on this machine's CPU (real text, dropout on, a checkpoint every other step, saved in the background) is begun again
and again. What happens to it:

  kill     SIGKILL while it trains, saves, starts or loads; then --resume auto, until it is done
  signal   SIGTERM, Ctrl-C or SIGHUP while it trains, resumed; the same in a long evaluation, resumed
  start    Ctrl-C in the seconds in which Python imports it: silence, and code 130
  disk     its file system (a tmpfs, where this user may mount one) is full for a while
  two      two more processes with the same --out while it runs: both are refused

Weights, optimizer state, loader position and random states of the last checkpoint, and the records of all steps in
metrics.jsonl, each exactly once, are compared bit for bit with those of the same run left alone. Printed are the tries of each
kind, and how many fell short.

Examples:
  python -m bench.kill_campaign                        30 kills, and of the others in proportion: some minutes
  python -m bench.kill_campaign --tries 1 --steps 30   one of each kind
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import torch

from fastgpt import command, common
from fastgpt.checkpoints import checkpoint
from fastgpt.checkpoints.folder import existing, newest_valid, step_of
from fastgpt.checkpoints.tree import split
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.training import metrics

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "kernels": "eager",
    "device": "cpu",
    "data": "stdlib",
    "tokenizer": "bytes",
    "vocab-size": 256,
    "n-layer": 2,
    "n-head": 4,
    "n-embd": 64,
    "block-size": 64,
    "dropout": 0.1,
    "batch-size": 4,
    "grad-accum": 2,
    "warmup-iters": 10,
    "eval-interval": 20,
    "eval-iters": 2,
    "checkpoint-interval": 2,
    "keep-checkpoints": 2,
    "log-interval": 3,
    "resume": "auto",
}
SIGNALS = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 0}
"""Signal -> exit code."""
FORKING = multiprocessing.get_context("forkserver")
NOISE = ("Traceback", "KeyboardInterrupt", "Exception ignored")


@dataclass(frozen=True)
class KillConfig:
    tries: int = 30
    """Kills; a third as many signals and starts, a tenth as many full disks and second processes."""
    steps: int = 300
    """Optimizer steps of the run."""
    window: Annotated[float, Arg("SECONDS")] = 3.0
    """What happens to a run comes within so many seconds of training."""
    seed: int = 0
    """Another seed does it at other moments."""
    out: Annotated[Path | None, Arg("FOLDER")] = None
    """A folder for the runs, kept afterwards. Without it: a temporary one."""

    def __post_init__(self) -> None:
        for name in ("tries", "steps", "window"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be more than 0")
        if self.out is not None and self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"out is {self.out}, which is not empty: name a new one")


@dataclass
class Tally:
    tried: int = 0
    problems: list[str] = field(default_factory=list)
    """One for each try that fell short."""
    note: str = ""


def main(args: list[str]) -> int:
    options = command.parse(KillConfig, args, "bench.kill_campaign", __doc__)
    with tempfile.TemporaryDirectory() as temporary:
        tallies = Campaign(options.out or Path(temporary), options).run()
    for name, tally in tallies.items():
        for problem in tally.problems:
            print(f"PROBLEM ({name}): {problem}")
        print(f"{name}: tried {tally.tried}, fell short {len(tally.problems)}{tally.note}")
    return 1 if any(tally.problems for tally in tallies.values()) else 0


class Campaign:
    """All of it, in ``folder``. Methods that try something return what is wrong with the end of it, or ""."""

    def __init__(self, folder: Path, options: KillConfig) -> None:
        self.folder, self.options = folder, options
        self.moments = random.Random(options.seed)
        folder.mkdir(parents=True, exist_ok=True)
        for number in SIGNALS:  # ignored in a job in the background, or under nohup, and so in the processes begun here
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        FORKING.set_forkserver_preload(["fastgpt.train", "fastgpt.training.loop", "tensorboard.compat.proto.event_pb2"])

    def run(self) -> dict[str, Tally]:
        """What was tried, by kind."""
        began, alone = time.monotonic(), self.folder / "undisturbed"
        process = self.start(alone)
        process.join()
        print(f"undisturbed: {self.options.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        if process.exitcode:
            return {"undisturbed": Tally(1, [tail(self.log(alone))])}
        self.wanted = fingerprint(alone)
        tallies = {"kill": self.kills()}
        others = {
            "signal": (self.signalled, 3),
            "start": (self.interrupted_start, 3),
            "disk": (self.full_disk, 10),
            "two": (self.second_process, 10),
        }
        for name, (attempt, share) in others.items():
            tally = tallies[name] = Tally()
            for number in range(math.ceil(self.options.tries / share)):
                problem = attempt(self.folder / f"{name}-{number}", number)
                if problem is None:
                    tally.note = "; this user may mount no tmpfs"
                    break
                tally.tried += 1
                tally.problems += [problem] if problem else []
                print(f"{name} {number + 1}: {problem or 'as if nothing had happened'}", flush=True)
        return tallies

    def start(self, run: Path, log: Path | None = None, **changes: object) -> BaseProcess:
        """Begin or resume ``run`` in a process that is forked from one that has imported it all."""
        changes = {name.replace("_", "-"): value for name, value in changes.items()}
        settings = {**SETTINGS, "max-iters": self.options.steps, "out": run, **changes}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        process = FORKING.Process(target=_train, args=(words, log or self.log(run)))
        process.start()
        return process

    def log(self, run: Path) -> Path:
        return self.folder / f"{run.name}.log"

    def end(self, run: Path) -> str:
        """Resume ``run`` to its end."""
        process = self.start(run)
        process.join()
        return self.judge(run, process.exitcode)

    def judge(self, run: Path, code: int | None) -> str:
        if code:
            return f"{run} ended with code {code}: {tail(self.log(run))}"
        differs = [what for what, value in fingerprint(run).items() if value != self.wanted[what]]
        return f"{run} ended with other {', '.join(differs)}" if differs else ""

    def kills(self) -> Tally:
        """Kill as often as asked, in as many runs as that takes, and let the last one finish."""
        tally, tries, runs, in_save, in_start = Tally(), self.options.tries, 1, 0, 0
        run = self.folder / "killed-1"
        while tally.tried < tries:
            before, trained = leftovers(run), False
            process = self.start(run)
            if self.moments.random() < 0.8:
                trained = self.trains(process, run)
                process.join(self.moments.uniform(0, self.options.window))
            else:
                process.join(self.moments.uniform(0, 1))
            if process.exitcode is None:
                process.kill()
                process.join()
                tally.tried += 1
                in_save += bool(leftovers(run) - before)
                in_start += not trained
                kept = existing(run)
                print(f"kill {tally.tried}/{tries}: {kept[-1].name if kept else 'no checkpoint yet'}", flush=True)
                if tally.tried < tries and not (kept and step_of(newest_valid(run)[0]) == self.options.steps):
                    continue
                problem = self.end(run)
            else:
                problem = self.judge(run, process.exitcode)
            tally.problems += [problem] if problem else []
            print(f"{run.name} finished: {problem or 'as if nothing had happened'}", flush=True)
            if tally.tried < tries:
                runs += 1
                run = self.folder / f"killed-{runs}"
        tally.note = f" ({in_save} during a save, {in_start} before training had begun again; {runs} runs)"
        return tally

    def trains(self, process: BaseProcess, run: Path) -> bool:
        """Wait until the process has done a step; False if it ended before."""
        size = _size(run)
        return wait(process, lambda: _size(run) > size)

    def signalled(self, run: Path, number: int) -> str:
        which = list(SIGNALS)[number % len(SIGNALS)]
        process = self.start(run)
        if not wait(process, lambda: _steps(run) > 1):
            return f"it did not begin: {tail(self.log(run))}"
        process.join(self.moments.uniform(0, min(self.options.window, 0.01 * self.options.steps)))
        if problem := self.obeys(process, which, run):
            return problem
        done = _steps(run)
        if done >= self.options.steps:  # it came too late
            return self.judge(run, 0)
        process = self.start(run, eval_iters=10**6, eval_interval=1)  # evaluations of minutes
        if not wait(process, lambda: _steps(run) > done):
            return f"it did not go on: {tail(self.log(run))}"
        if problem := self.obeys(process, which, run):
            return problem
        if any(record.get("step") == done + 1 and "val_loss" in record for record in records(run)):
            return f"{which.name} was not obeyed in the evaluation"
        return self.end(run)

    def obeys(self, process: BaseProcess, which: signal.Signals, run: Path) -> str:
        """Send a signal and wait for the end."""
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(process.pid, which)
        process.join(60)
        if process.exitcode is None:
            process.kill()
            return f"{which.name} was not obeyed in a minute"
        text = self.log(run).read_text(errors="replace")
        late = process.exitcode == 0 and _steps(run) == self.options.steps
        if not (late or process.exitcode == SIGNALS[which]) or any(word in text for word in NOISE):
            return f"{which.name} ended it with code {process.exitcode}: {tail(self.log(run))}"
        return ""

    def interrupted_start(self, run: Path, number: int) -> str:
        """Python itself has to have started: what it prints when it is interrupted before, no program can change."""
        words = [["train.py"], ["-m", "fastgpt.train"], ["-m", "fastgpt", "train"]][number % 3]
        flags = ["--kernels", "eager", "--device", "cpu", "--out", str(run), "--max-iters", "100000"]
        with open(self.log(run), "wb") as log:
            process = subprocess.Popen([sys.executable, *words, *flags], cwd=ROOT, stdout=log, stderr=log)
        maps = Path(f"/proc/{process.pid}/maps")
        try:
            while process.poll() is None and maps.exists() and "libtorch" not in maps.read_text():
                time.sleep(0.005)
            time.sleep(self.moments.uniform(0, self.options.window))
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            return "Ctrl-C was not obeyed in a minute"
        finally:
            process.kill()
        text = self.log(run).read_text(errors="replace")
        silent = code == 130 and not any(word in text for word in NOISE)
        return "" if silent else f"Ctrl-C ended it with code {code}: {tail(self.log(run))}"

    def full_disk(self, run: Path, number: int) -> str | None:
        """None where it cannot be tried."""
        size = 8 * sum(path.stat().st_size for path in existing(self.folder / "undisturbed")[-1].iterdir())
        with tmpfs(run, size) as mounted:
            if not mounted:
                return None
            out, ballast = run / run.name, run / "ballast"
            process = self.start(out, log_interval=1)
            wait(process, lambda: _steps(out) > 3)

            def has_said() -> bool:
                with open(ballast, "ab", buffering=0) as file, suppress(OSError):
                    while file.write(bytes(4096)):  # a save that fails gives back what it took
                        pass
                text = self.log(out).read_text(errors="replace")
                return "metrics.jsonl cannot be written (" in text and "was not saved: the disk of" in text

            said = wait(process, has_said)
            ballast.unlink()
            process.join()
            if not said:
                return f"it was not said: {tail(self.log(out))}"
            if process.exitcode == 2:  # it was done before there was room again: its last checkpoint could not be saved
                process = self.start(out, log_interval=1)
                process.join()
            elif "metrics.jsonl can be written again; lines lost: " not in self.log(out).read_text():
                return f"it was not said that lines are lost: {tail(self.log(out))}"
            found = fingerprint(out)
            differs = [what for what, value in found.items() if what != "losses" and value != self.wanted[what]]
            for step, values in found["losses"].items():  # a log line at each of them, and some are lost
                if [loss for loss, _ in values] != [loss for loss, _ in self.wanted["losses"][step]]:
                    differs.append(f"loss of step {step}")
            return f"it ended with other {', '.join(differs)}" if process.exitcode or differs else ""

    def second_process(self, run: Path, number: int) -> str:
        process = self.start(run)
        wait(process, lambda: _steps(run) > 1)
        log = self.folder / f"{run.name}-other.log"
        for resume in ("auto", "newest"):
            other = self.start(run, log, resume=resume)
            other.join()
            if process.exitcode is None and (other.exitcode != 2 or "has been writing since" not in log.read_text()):
                return f"a second process ended with code {other.exitcode}: {tail(log)}"
        process.join()
        return self.judge(run, process.exitcode)


def _train(words: list[str], log: Path) -> None:
    """What the forked process does: ``python train.py``, its output in ``log``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def wait(process: BaseProcess, condition: Callable[[], bool]) -> bool:
    """Until the condition holds; False if the process ended before it did."""
    while process.exitcode is None:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[bool]:
    """A file system of its own, of ``size`` bytes; whether it could be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = sys.platform == "linux" and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def leftovers(run: Path) -> set[tuple[str, int]]:
    """What half-written or half-deleted checkpoints lie in a run's folder, told apart from earlier ones of that name."""
    found = [path for path in run.glob("*") if path.name.endswith((".partial", ".deleted"))]
    return {(path.name, path.stat().st_ino) for path in found}


def records(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl so far."""
    return metrics.read(run) if (run / metrics.METRICS).exists() else []


def _steps(run: Path) -> int:
    return max((record["step"] for record in records(run) if "loss" in record and "step" in record), default=0)


def _size(run: Path) -> int:
    path = run / metrics.METRICS
    return path.stat().st_size if path.exists() else 0


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
    losses: dict[int, list[Any]] = {}
    for record in records(run):
        if "loss" in record and "step" in record:
            losses.setdefault(record["step"], []).append((record["loss"], record.get("interval_loss")))
    return {**parts, "losses": losses}


def tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:]) if log.exists() else "no output"


if __name__ == "__main__":
    common.run(main)
