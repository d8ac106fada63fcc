"""The ``fastgpt`` command: the same code as the module entries, found by one word."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgpt import __main__ as command
from fastgpt import common
from fastgpt.common import UserError

ROOT = Path(__file__).parents[1]
ENTRIES = [name for name in command.COMMANDS if name != "bench"]
ASKED = ("train", "sample", "doctor", "plan", "prepare", "data", "convert", "plot", "bench", "env")


def ends(args):
    """The exit code of a help page."""
    with pytest.raises(SystemExit) as end:
        command.main(args)
    return end.value.code


def test_help_lists_every_command_with_a_line_and_an_example(capsys):
    assert ends(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(ASKED) <= set(command.COMMANDS)
    for name, entry in command.COMMANDS.items():
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        assert lines[at].endswith(entry.summary)
        assert lines[at + 1].strip() == f"$ fastgpt {name} {entry.example}".rstrip()
    assert max(map(len, lines)) <= 80


def test_without_a_command_help_is_shown_and_the_exit_code_is_2(capsys):
    assert ends([]) == 2
    page = capsys.readouterr().out
    assert "usage: fastgpt COMMAND" in page
    shown = [name for name in command.COMMANDS if f"\n  {name} " in page]
    assert sorted(shown) == ["doctor", "plan", "prepare", "sample", "train"]
    assert f"{len(command.COMMANDS) - 5} more: --help lists all." in page and max(map(len, page.splitlines())) <= 80


def test_no_help_page_waits_for_torch():
    """Its import takes seconds; a page has to be there within one."""
    code = (
        "import contextlib, io, sys\n"
        "from fastgpt.__main__ import COMMANDS, main\n"
        "for words in ([], *([name] for name in COMMANDS)):\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()):\n"
        "            main([*words, '--help'])\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    if slow := {'torch', 'triton', 'transformers', 'matplotlib'} & set(sys.modules):\n"
        "        sys.exit(f'{words}: {slow}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ENTRIES)
def test_each_command_is_its_module_entry(name, monkeypatch):
    module = command.COMMANDS[name].module
    seen = []
    monkeypatch.setattr(importlib.import_module(module), "main", lambda args: seen.append(args) or 7)
    assert command.main([name, "a", "--b"]) == 7
    assert seen == [["prepare", "a", "--b"] if name == "prepare" else ["a", "--b"]]


BENCHMARKS = [
    path.stem for path in sorted((ROOT / "bench").glob("*.py")) if "command.parse(" in path.read_text("utf-8")
]


@pytest.mark.parametrize("words", [*ENTRIES, *(f"bench {name}" for name in BENCHMARKS)])
def test_each_commands_help_ends_well_and_fits_80_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        code = command.main([*words.split(), "--help"])
    except SystemExit as end:
        code = end.code
    assert code == 0
    page = capsys.readouterr().out
    assert page.startswith("usage:") and max(map(len, page.splitlines())) <= 80


def test_train_py_is_the_installed_train():
    import train
    from fastgpt import train as train_module

    assert train.main is train_module.main


@pytest.mark.parametrize("wrong, meant", [("trian", "train"), ("docter", "doctor"), ("benchmark", "bench")])
def test_an_unknown_command_names_the_nearest(wrong, meant):
    with pytest.raises(
        UserError, match=f"command is '{wrong}' \\(did you mean '{meant}'\\?\\): it can be train, sample"
    ):
        command.main([wrong])


def test_bad_input_ends_in_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastgpt", "xyzzy"])
    with pytest.raises(SystemExit) as exit:
        command.entry()
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: command is 'xyzzy': it can be ") and message.count("\n") == 1


def test_the_version(capsys):
    import fastgpt

    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgpt {fastgpt.__version__}\n"


def test_a_reader_that_goes_away_is_no_error():
    """``fastgpt hardware rtx4070 | head -1``."""
    with subprocess.Popen(
        [sys.executable, "-m", "fastgpt", "hardware", "rtx4070"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


def test_an_entrys_exit_code_is_the_commands(monkeypatch):
    with pytest.raises(SystemExit) as exit:
        common.run(lambda args: 1)
    assert exit.value.code == 1


class TestBench:
    def test_lists_what_there_is(self, capsys):
        assert ends(["bench"]) == 2
        assert ends(["bench", "--help"]) == 0
        shown = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
        assert {"mfu", "kernels", "project", "audit", "gpu", "compare"} <= shown
        for name in shown:
            assert callable(importlib.import_module(f"bench.{name}").main)
        assert "audit_child" not in shown  # bench.audit's own

    def test_runs_one_from_any_folder(self, monkeypatch, tmp_path):
        seen = []
        monkeypatch.setitem(sys.modules, "bench.mfu", SimpleNamespace(main=lambda args: seen.append(args) or 0))
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.chdir(tmp_path)
        assert command.main(["bench", "mfu", "--device", "cpu"]) == 0
        assert seen == [["--device", "cpu"]]

    def test_an_unknown_one_names_the_nearest(self):
        with pytest.raises(UserError, match=r"bench is 'mfuu' \(did you mean 'mfu'\?\): it can be ablation, audit"):
            command.main(["bench", "mfuu"])

    def test_outside_a_checkout_it_says_what_to_do(self, tmp_path):
        with pytest.raises(UserError, match="bench is not part of the installed package: clone"):
            command.bench(["mfu"], root=tmp_path)


@pytest.mark.parametrize(
    "words", [["train.py"], ["-m", "fastgpt.train"], ["-m", "fastgpt", "train"], ["-m", "bench.mfu"]]
)
def test_ctrl_c_while_a_command_is_imported_is_silent(words, tmp_path):
    """Someone presses it while torch is imported (here: another module of that name, which takes no time)."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_library_leaves_ctrl_c_alone(tmp_path):
    code = "import signal, fastgpt; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(code)
    (tmp_path / "mine" / "__main__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for words in (["-c", code], ["-m", "mine"]):
        subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, check=True, timeout=60)


def test_ctrl_c_in_a_command_is_130_in_silence_and_its_end_waits_for_no_thread(tmp_path):
    code = (
        "import threading, time\n"
        "from fastgpt import common\n"
        "def main(args):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    print('half', end='')\n"
        "    raise KeyboardInterrupt\n"
        "common.run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"half", b"")
