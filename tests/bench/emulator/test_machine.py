"""The emulator on kernels whose results are known and on broken ones: known.py, in one process whose triton compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.emulator.known import CHECKS

ROOT = Path(__file__).parents[3]


def child(arguments, folder):
    """A finished process of Python, whose triton compiles and keeps what it compiles in ``folder``."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = child(["-m", "tests.bench.emulator.known"], tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_it_finds_what_is_there_and_nothing_else(found, name):
    assert found[name] == ""
