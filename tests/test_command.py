"""The front end of the commands: options, values, the help page and one sentence for everything that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Do something.

    Examples:
      python -m x file                                                        what it is for
    """

    source: Annotated[Path, Arg("FILE", positional=True)]
    """What to read."""
    rest: Annotated[tuple[Path, ...], Arg("MORE", positional=True)] = ()
    """Further files."""
    top_k: int | None = 200
    """How many."""
    rate: float = 0.5
    """How fast."""
    kind: Literal["one", "two"] = "one"
    """Which."""
    names: tuple[Literal["a", "b"], ...] = ("a", "b")
    """Some of them."""
    sure: bool = False
    """Be sure."""
    sweep: bool | None = None
    """Sweep or not."""
    saved: Annotated[str | None, Arg("WHAT", flag="from", aliases=("--of",), bare="here")] = None
    """From where."""
    size: Annotated[int, Arg("N", words=("auto",))] = 8
    """How large."""


def parse(*args):
    return command.parse(Options, args, "x")


@pytest.mark.parametrize(
    ("args", "values"),
    [
        ([], {}),
        (["--top-k", "3", "--rate=1e-3", "--kind", "two"], {"top_k": 3, "rate": 1e-3, "kind": "two"}),
        (["--top_k", "3"], {"top_k": 3}),
        (["--top-k", "None"], {"top_k": None}),
        (["--rate", "-1"], {"rate": -1.0}),
        (["--names", "b"], {"names": ("b",)}),
        (["--names", "b", "a"], {"names": ("b", "a")}),
        (["--sure"], {"sure": True}),
        (["--sure", "False"], {"sure": False}),
        (["--sure=true"], {"sure": True}),
        (["--sure=False"], {"sure": False}),
        (["--sure", "FALSE"], {"sure": False}),
        (["--sure", "0"], {"sure": False}),
        (["--sure=1"], {"sure": True}),
        (["--top-k", "1_000"], {"top_k": 1000}),
        (["--top-k", "2.5k"], {"top_k": 2500}),
        (["--no-sure"], {"sure": False}),
        (["--sweep"], {"sweep": True}),
        (["--no-sweep"], {"sweep": False}),
        (["--from"], {"saved": "here"}),
        (["--from", "there"], {"saved": "there"}),
        (["--of=there"], {"saved": "there"}),
        (["--from", "--sure"], {"saved": "here", "sure": True}),
        (["--size", "auto"], {"size": "auto"}),
        (["b", "c"], {"rest": (Path("b"), Path("c"))}),
    ],
)
def test_values(args, values):
    assert parse("a", *args) == Options(Path("a"), **values)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "FILE is missing: python -m x --help says what it is"),
        (["a", "--tpo-k", "3"], r"flag is '--tpo-k' \(did you mean '--top-k'\?\), which is not known"),
        (["a", "-q"], "flag is '-q', which is not known"),
        (["a", "--hlep"], r"flag is '--hlep' \(did you mean '--help'\?\), which is not known"),
        (["a", "--model.top_k=3"], r"flag is '--model.top_k' \(did you mean '--top-k'\?\), which is not known"),
        (["a", "--job.rest_file", "b"], "flag is '--job.rest_file', which is not known: MORE stands alone"),
        (["a", "--top-k"], "--top-k has no value: give N behind it"),
        (["a", "--top-k", "--sure"], "--top-k has no value"),
        (["a", "--top-k", "3.5"], "--top-k is '3.5': it must be a whole number"),
        (["a", "--size", "some"], r"--size is 'some': it must be a whole number below 2\^63, or auto"),
        (["a", "--top-k", "1e20"], "--top-k is '1e20': it must be a whole number below"),
        (["a", "--rate", "fast"], "--rate is 'fast': it must be a finite number"),
        (["a", "--rate", "inf"], "--rate is 'inf': it must be a finite number"),
        (["a", "--rate", "1e400"], "--rate is '1e400': it must be a finite number"),
        (["a", "--rate=nan"], "--rate is 'nan': it must be a finite number"),
        (["a", "--from", ""], "--from is '': give WHAT"),
        ([""], "FILE is '': give FILE"),
        (["a", "--sure="], "--sure is '': give"),
        (["a", "--names"], "--names has no value"),
        (["a", "--names", "--sure"], "--names has no value"),
        (["a", "--rate", "1", "--rate=1"], "--rate is given twice: leave one out"),
        (["a", "--sure", "--no-sure"], "--sure is given twice"),
        (["a", "--from", "x", "--of", "y"], "--from is given twice"),
        (["a", "--kind", "tow"], r"--kind is 'tow' \(did you mean 'two'\?\): it can be one, two"),
        (["a", "--sure=perhaps"], "--sure is 'perhaps': it can be True, False"),
    ],
)
def test_what_is_wrong_is_one_sentence(args, sentence):
    with pytest.raises(UserError, match=f"^{sentence}") as error:
        parse(*args)
    assert "\n" not in str(error.value)


def test_a_word_too_many_is_named():
    @dataclass(frozen=True)
    class One:
        file: Annotated[str, Arg("FILE", positional=True)]

    assert command.parse(One, ["a"], "x").file == "a"
    with pytest.raises(UserError, match=r"^'b' is one word too many"):
        command.parse(One, ["a", "b"], "x")


def test_help_breaks_no_line_inside_a_flag(capsys, monkeypatch):
    @dataclass(frozen=True)
    class Talks:
        """Do something."""

        size: int = 1
        """Words that fill this line of the page up to where '--other-flag' and, further on, a warmup-stable-decay stand."""

    for columns in range(40, 90):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            command.parse(Talks, ["--help"], "x")
        page = capsys.readouterr().out
        assert "'--other-flag'" in page and "warmup-stable-decay" in page


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        parse("--help")
    page = capsys.readouterr().out
    assert end.value.code == 0 and page.startswith(
        "usage: python -m x [-h] [OPTIONS] FILE [MORE ...]\n\nDo something.\n"
    )
    assert max(map(len, page.splitlines())) <= 80
    assert "  python -m x file\n      what it is for\n" in page
    for words in ("--top-k N", "--kind {one,two}", "--from, --of WHAT", "(default: 200)", "(default: a b)"):
        assert words in page
    assert "--no-sure" not in page and "None" not in page and "(required)" in page


def test_a_group_of_options_comes_first_in_its_own_order(capsys):
    groups = {"most used": ("Begin here.", ("rate", "top_k")), "rare": ("Hardly ever.", ("saved",))}
    with pytest.raises(SystemExit):
        command.show_help(Options, "x", default=Options(Path("f"), rate=0.0, sweep=True), groups=groups)
    page = " ".join(capsys.readouterr().out.split())
    assert page.index("most used options: Begin here.") < page.index("--rate") < page.index("--top-k")
    assert page.index("rare options: Hardly ever.") < page.index("--from")
    assert page.count("--from") == 1 and "How fast. (default: 0)" in page and "Sweep or not. (default: on)" in page


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["train.py"], "python train.py"),
        (["/opt/bin/fastgpt", "sample", "runs"], "fastgpt sample"),
        (["/site-packages/fastgpt/__main__.py", "bench", "mfu", "--steps"], "fastgpt bench mfu"),
        (["/site-packages/fastgpt/sample.py"], "python -m fastgpt.sample"),
        (["/site-packages/fastgpt/train.py"], "python -m fastgpt.sample"),
    ],
)
def test_the_program_is_called_what_the_user_typed(argv, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert command.program("fastgpt.sample") == shown


@pytest.mark.parametrize(
    ("typed", "on_path", "shown"),
    [
        ("train.py", "python", "python -m fastgpt.sample a, python train.py"),
        ("train.py", "python3", "python3 -m fastgpt.sample a, python3 train.py"),
        ("train.py", "other", ".venv/bin/python -m fastgpt.sample a, .venv/bin/python train.py"),
        ("/opt/bin/fastgpt", "fastgpt", "fastgpt sample a, fastgpt train"),
        (".venv/bin/fastgpt", "other", ".venv/bin/fastgpt sample a, .venv/bin/fastgpt train"),
        ("C:/my tools/fastgpt.exe", "other", '"C:/my tools/fastgpt.exe" sample a, "C:/my tools/fastgpt.exe" train'),
    ],
)
def test_the_commands_in_a_text_can_be_typed_here(typed, on_path, shown, monkeypatch):
    python = str(Path.cwd() / ".venv/bin/python")
    monkeypatch.setattr(sys, "argv", [typed])
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr("shutil.which", {on_path: typed if on_path == "fastgpt" else python}.get)
    assert common.as_typed("python -m fastgpt.sample a, python train.py") == shown
    plain = "fastgpt prepare" if "fastgpt" in typed else "python -m fastgpt.data prepare"
    assert common.as_typed("python -m fastgpt.data prepare", way=False) == plain


def test_a_command_can_be_named_where_the_working_directory_is_gone(monkeypatch):
    def gone():
        raise FileNotFoundError

    monkeypatch.setattr(os, "getcwd", gone)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert common.as_typed("python train.py --resume") == f"{sys.executable} train.py --resume"


def test_subcommands(capsys):
    known = {"do": "do something\nand more", "undo": "the opposite"}
    assert command.subcommand(["do", "--x"], known, "x COMMAND ...") == ("do", ["--x"])
    with pytest.raises(UserError, match=r"command is 'undos' \(did you mean 'undo'\?\): it can be do, undo"):
        command.subcommand(["undos"], known, "x COMMAND ...")
    for args, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as end:
            command.subcommand(args, known, "x COMMAND ...", "The end.")
        assert end.value.code == code
        shown = capsys.readouterr().out
        assert (
            shown
            == "usage: x COMMAND ...\n\n  do    do something\n        and more\n  undo  the opposite\n\nThe end.\n"
        )


def test_the_library_is_imported_without_rich():
    code = "import sys; sys.modules['rich'] = None; import fastgpt.hardware, fastgpt.kernels, fastgpt.config"
    code += "; from bench import ops; from bench.reports import results, timing; from fastgpt import __main__"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
