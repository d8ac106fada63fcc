"""What the terminal shows at 80 columns, against files that somebody has read: ``GOLDEN=write python -m pytest
tests/test_golden.py`` writes them anew, for git diff to show and for an eye to judge. What another machine or another moment
changes is a #."""

from __future__ import annotations

import importlib
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fastgpt.__main__ import COMMANDS
from tests.shards import write_shard
from tests.test_convert import fastgpt_run

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
CHANGING = (
    (r"(?m), data \d+%$", ""),  # where a loaded machine waits
    (r"(?m)^(device   ).*", r"\1#"),
    (r"[\d.]+( GB of main memory are free)", r"#\1"),
    (r"(time )[\d.]+(ms)", r"\1#\2"),
    (r"[\d,]+( tok/s, lr)", r"#\1"),
    (r"(eta |norm |loss |best )[\d.]+( s| min)?", r"\1#"),
    (r"(background, )[\d.]+", r"\1#"),
    (r"(?ms)^(text     ).*?(?=^out)", "\\1#\n"),
)
MACHINE = ((r"(?m)^(unused GPU|train uses|\w+)( +).*", r"\1\2#"),)


def compare(name, shown, changing=()):
    for pattern, masked in changing:
        shown = re.sub(pattern, masked, shown)
    shown = "".join(line.rstrip() + "\n" for line in shown.splitlines())
    assert name == "model-card" or max(map(len, shown.splitlines())) <= 80
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8"), "if it should be so: GOLDEN=write, and read the difference"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["fastgpt"])
    for name in ("FORCE_COLOR", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["", *(name for name in COMMANDS if name != "bench")])
def test_a_help_page(name, capsys, monkeypatch):
    monkeypatch.setattr("fastgpt.train.shutil.which", lambda _: None)
    monkeypatch.setattr("sys.argv", ["fastgpt", name])
    words = ["prepare", "--help"] if name == "prepare" else ["--help"] if name else []
    with suppress(SystemExit):
        importlib.import_module(COMMANDS[name].module if name else "fastgpt.__main__").main(words)
    compare(f"help-{name}" if name else "fastgpt", capsys.readouterr().out)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_a_run_from_its_first_screen_to_its_last(kernels, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    text = np.frombuffer(b"to be or not to be, that is the question\n" * 200, np.uint8)
    write_shard(tmp_path / "data" / "train.bin", text)
    write_shard(tmp_path / "data" / "val.bin", text[:1000])
    shape = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --max-iters 2 --log-interval 1 --eval-iters 1 --warmup-iters 1"
    words = f"--data data --out runs/mine --device cpu --kernels {kernels} --no-tensorboard {shape}"
    if kernels == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # as the tests have imported it
    assert importlib.import_module("fastgpt.train").main(words.split()) == 0
    compare(f"train-{kernels}", capsys.readouterr().out, CHANGING)


def terminal(monkeypatch):
    """One without colours. In a pipe the same lines are whole, however long."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


@pytest.mark.parametrize(
    "words",
    [
        "doctor docs/rtx4070-runs/train_fineweb_40m.py docs/rtx4070-runs/nanogpt-40m-fineweb.log --gpu rtx4070",
        "plan --gpu rtx4070 --model gpt2-124m --tokens 2.5B",
        "hardware rtx4070",
        "env",
    ],
)
def test_a_report(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    terminal(monkeypatch)
    name, *rest = words.split()
    importlib.import_module(COMMANDS[name].module).main(rest)
    shown = capsys.readouterr().out
    compare(name, shown, MACHINE if name == "env" else ())


def test_conversions_and_the_model_card(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    fastgpt_run(Path("runs/mine"))
    terminal(monkeypatch)
    convert = importlib.import_module("fastgpt.convert").main
    assert convert(["runs/mine", "my-gpt2"]) == convert(["runs/mine", "ckpt.pt"]) == 0
    shown = capsys.readouterr().out
    compare("convert", shown)
    compare("model-card", Path("my-gpt2/README.md").read_text("utf-8"))
