"""Commands in processes of their own, forked from one that has imported torch, its compiler and an interpreting triton, which
takes 4 s of CPU. For what processes do to each other and to their files: a test of what a fresh Python imports, or of kernels
that are compiled, starts one itself.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"])


def ensure_server():
    """Begin the process that all are forked from, also those of ``multiprocessing``'s "forkserver"."""
    with patch.dict(os.environ, TRITON_INTERPRET="1"):
        forkserver.ensure_running()


def _main(words, env, output):
    """What ``python WORDS`` does."""
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, "utf-8"), os.fdopen(2, "w", 1, "utf-8")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


class Command:
    """``python WORDS`` in the root of the repository, begun, with this process's variables and those of ``env``."""

    def __init__(self, *words, **env):
        env = {**os.environ, "TRITON_INTERPRET": "1"} | {key: str(value) for key, value in env.items()}
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self.output = Path(file.name)
        self._process = FORKS.Process(target=_main, args=([str(word) for word in words], env, file.name))
        ensure_server()
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """None as long as it runs; minus the signal that killed it."""
        return self._process.exitcode

    def communicate(self, timeout=120):
        """What it has printed, stdout and stderr, once it has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("python", timeout, self.output.read_bytes())
        return self.output.read_text(encoding="utf-8")

    def close(self):
        self._process.kill()
        self._process.join()
        self.output.unlink()


@contextmanager
def together(*commands):
    """``Command`` objects, which are killed and removed at the end whatever happens."""
    try:
        yield commands
    finally:
        for command in commands:
            command.close()


def run(*words, timeout=300, **env):
    """(Exit code, output) of one."""
    with together(Command(*words, **env)) as (command,):
        output = command.communicate(timeout)
        return command.returncode, output


@contextmanager
def ranks(*argv, **env):
    """One rank per list of words, as torchrun would start them; one alone is no rank."""
    if len(argv) == 1:
        with together(Command(*argv[0], **env)) as commands:
            yield commands
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": len(argv), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{**place, "RANK": rank, "LOCAL_RANK": rank} for rank in range(len(argv))]
    with together(*[Command(*own, **env, **place) for own, place in zip(argv, places)]) as commands:
        yield commands
