"""One run of bench.gpu: its results so far, where they go, how long there is, and child processes that keep to that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.reports import markdown
from fastgpt.common import write_json, write_whole
from fastgpt.hardware.environment import ROOT


@dataclass
class Session:
    """The results so far, where they go, and how long there is."""

    out: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    reserved: float = 0.0
    """Seconds that belong to the stages after the one that runs."""

    @property
    def left(self) -> float:
        """Seconds that the stage that runs still has."""
        return self.deadline - self.reserved - time.monotonic()

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "results.json", self.results)
        write_whole(self.out / "results.md", markdown.gpu_markdown(self.results))
        try:
            markdown.plot_steps(self.results, self.out / "steps.png")
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
