"""One run of bench.gpu: its results so far, where they go, how long there is, and child processes that keep to that."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.reports import markdown, verdicts
from fastgpt.common import write_json, write_whole
from fastgpt.hardware.environment import ROOT

RESULTS, SUMMARY, REPORT, ARCHIVE, PICTURE = (
    "results.json", "summary.md", "report.md", "evidence.tar.gz", "steps.png",
)  # fmt: skip
"""All that a run leaves in its folder."""
ARCHIVE_BYTES = 14 * 2**20
"""What the archive holds at most, so that it can be sent; files beyond that are named in the report as left out."""
GRACE_S = 20.0
"""Seconds before the end of its time at which a child is interrupted: enough to time what is ready, and to write it down."""
UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
"""What no name of a file may hold, as some ways of sending files refuse it."""

_START = """\
import faulthandler, runpy, signal, sys
if hasattr(faulthandler, "register"):
    faulthandler.register(signal.SIGUSR1)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""``python -m MODULE``, which on SIGUSR1 writes where each of its threads is, be it in the middle of a CUDA call."""


class Child(NamedTuple):
    """A command to run: ``python -m module``, whose output goes to the file ``log``."""

    log: str
    module: str
    args: Sequence[str]
    env: Mapping[str, str] = {}


class Ended(NamedTuple):
    """What a child has printed, and whether it ended by itself."""

    output: str
    finished: bool


@dataclass
class Session:
    """The results so far, where they go, and how long there is. Files of the stages are written to ``work``, which becomes the
    archive."""

    out: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    reserved: float = 0.0
    """Seconds that belong to the stages after the one that runs."""
    cut: list[str] = field(default_factory=list)
    """Logs of the commands of the stage that were interrupted, or not begun."""

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def left(self) -> float:
        """Seconds that the stage that runs still has."""
        return self.deadline - self.reserved - time.monotonic()

    def save(self) -> None:
        """Write the figures that there are."""
        write_json(self.out / RESULTS, self.results)

    def publish(self) -> None:
        """Write everything that there is, the archive included."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.results["left_out"] = [f"{name} ({size / 1e6:.1f} MB)" for name, size in self._too_large()]
        self.save()
        for name, made in ((SUMMARY, verdicts.summary), (REPORT, markdown.gpu_markdown)):
            try:
                write_whole(self.out / name, made(self.results))
            except Exception as error:  # no page is worth the stages that are still to come
                print(f"{name} is not written: {type(error).__name__}: {error}", file=sys.stderr)
        partial = self.out / f".{ARCHIVE}.tmp"
        left_out = {name for name, _ in self._too_large()}
        with tarfile.open(partial, "w:gz", compresslevel=3) as archive:
            earlier = self.out / ARCHIVE
            kept = [path for path in self._files() if self._name(path) not in left_out]
            fresh = {self._name(path) for path in kept}
            if earlier.exists():  # of a run that this one goes on with
                with tarfile.open(earlier) as before:
                    for member in before.getmembers():
                        if member.name not in fresh and member.name not in (RESULTS, SUMMARY, REPORT, PICTURE):
                            archive.addfile(member, before.extractfile(member))
            for path in kept:
                archive.add(path, self._name(path))
            for name in (RESULTS, SUMMARY, REPORT, PICTURE):
                if (self.out / name).exists():
                    archive.add(self.out / name, name)
        os.replace(partial, self.out / ARCHIVE)

    def close(self) -> None:
        """Draw the steps, and leave nothing but the archive and what lies beside it."""
        try:
            markdown.plot_steps(self.results, self.out / PICTURE)
        except Exception as error:  # a picture is not worth the rest
            print(f"{PICTURE} is not drawn: {type(error).__name__}: {error}", file=sys.stderr)
        self.publish()
        shutil.rmtree(self.work, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.work.rglob("*") if path.is_file() and not path.is_symlink())

    def _name(self, path: Path) -> str:
        """A file's name in the archive, which has no folders."""
        return UNFIT.sub("-", path.relative_to(self.work).as_posix())

    def _too_large(self) -> list[tuple[str, int]]:
        """The largest files, without which the rest fits the archive."""
        sizes = sorted((path.stat().st_size, self._name(path)) for path in self._files())
        found = []
        while sum(size for size, _ in sizes) > ARCHIVE_BYTES:
            size, name = sizes.pop()
            found.append((name, size))
        return found

    def child(self, module: str, *args: str, log: str, limit: float, env: Mapping[str, str] = {}) -> Ended:
        """Run one command for ``limit`` seconds at most."""
        return self.children([Child(log, module, args, env)], limit)[0]

    def children(self, jobs: Sequence[Child], limit: float, beside: Sequence[Child] = ()) -> list[Ended]:
        """Run commands at once for ``limit`` seconds at most, and ``beside`` them others, which end when they do.

        Shortly before the end, those that still run are interrupted, which leaves a traceback in their logs and lets them write
        what they have; at the end they are killed. Each has a process group of its own, which is ended as a whole: a compile
        worker that outlives its parent would be timed along with the next stage.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + max(limit, 1.0)
        running: list[subprocess.Popen] = []
        try:
            for job in (*jobs, *beside):
                env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
                env |= {"PYTHONUNBUFFERED": "1", **job.env}  # what was printed before a child is stopped counts
                with open(self.work / job.log, "w", encoding="utf-8") as file:
                    command = [sys.executable, "-c", _START, job.module, *job.args]
                    running.append(
                        subprocess.Popen(
                            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                        )
                    )
            finished = _wait(running[: len(jobs)], end - min(GRACE_S, limit / 4))
            if not all(finished):
                self.cut += [job.log for job, done in zip(jobs, finished) if not done]
                for process in running:
                    if process.poll() is None:
                        for number in (getattr(signal, "SIGUSR1", None), signal.SIGINT):
                            if number is not None:
                                process.send_signal(number)
                _wait(running[: len(jobs)], end)
        finally:  # also on Ctrl-C, which a group of its own does not get
            for process in running:
                _end(process)
        texts = [(self.work / job.log).read_text(encoding="utf-8", errors="replace") for job in jobs]
        return [Ended(*one) for one in zip(texts, finished)]


def _wait(processes: list[subprocess.Popen], end: float) -> list[bool]:
    """Wait for all until ``end``; which have ended."""
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, end - time.monotonic()))
    return [process.poll() is not None for process in processes]


def _end(process: subprocess.Popen) -> None:
    """End a child with everything that it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def last_json(output: str) -> dict[str, Any] | None:
    """The last line of a child's output that is JSON."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def json_in(output: str) -> dict[str, Any] | None:
    """The JSON that a child has printed over many lines, between whatever else."""
    at = 0 if output.startswith("{") else output.find("\n{") + 1
    try:
        return json.JSONDecoder().raw_decode(output, at)[0]
    except ValueError:
        return None
