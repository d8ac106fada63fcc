"""notebooks/quickstart.ipynb runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fastgpt.__main__ import main

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def run(command):
    """What ``!fastgpt ...`` is to IPython, without a process of its own."""
    assert main(shlex.split(command)) == 0


def as_python(source):
    """IPython's own lines in Python: ``!fastgpt ... {variable}`` is run, and what is installed is installed already."""
    source = re.sub(r"^!fastgpt (.*)$", lambda match: f"run(f{match[1]!r})", source, flags=re.MULTILINE)
    return re.sub(r"^%pip install .*$", "", source, flags=re.MULTILINE)


def test_it_runs(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = {"run": run}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(as_python("".join(cell["source"])), names)
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"val(?:idation)? loss (\d\.\d+)", out)]
    assert "MLP" in out and losses[-1] < losses[0] - 1
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_it_is_kept_without_outputs():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) > 3 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
