"""The ``fastgpt`` command: one word for each of the package's entries, ``fastgpt train`` for ``python -m fastgpt.train``.

Nothing is imported but the entry that is asked for.
"""

from __future__ import annotations

import ast
import functools
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from fastgpt import __version__, command, common
from fastgpt.common import UserError

ROOT = Path(__file__).resolve().parents[1]
_FOOTER = "fastgpt COMMAND --help has the options and more examples."


class Command(NamedTuple):
    module: str
    """What holds ``main(args) -> exit code``."""
    summary: str
    example: str
    """What may stand behind the command."""


COMMANDS = {
    "train": Command("fastgpt.train", "train a GPT-2, or go on with a run", "--preset gpt2-124m --data data/fineweb"),
    "sample": Command("fastgpt.sample", "print text from a checkpoint", 'runs/demo --prompt "def " --top-p 0.9'),
    "doctor": Command(
        "fastgpt.doctor.__main__",
        "what is wrong with a run, from its config, log and checkpoint",
        "config/train_gpt2.py train.log --gpu rtx4070",
    ),
    "plan": Command(
        "fastgpt.plan",
        "which batch fits a GPU, how fast, how many hours",
        "--gpu rtx4070 --model gpt2-124m --tokens 2.5B",
    ),
    "prepare": Command(
        "fastgpt.data.__main__",
        "text into token shards to train on",
        "roneneldan/TinyStories --out data/stories",
    ),
    "data": Command(
        "fastgpt.data.__main__", "prepare token shards, or check those that are there", "check data/stories"
    ),
    "convert": Command(
        "fastgpt.convert",
        "checkpoints of nanoGPT, fastgpt and Hugging Face into each other",
        "out/ckpt.pt runs/mine --to fastgpt",
    ),
    "plot": Command("fastgpt.plot", "pictures of runs", "runs/demo old-nanogpt.log --out both.png"),
    "hellaswag": Command("fastgpt.hellaswag", "score a checkpoint on HellaSwag", "runs/gpt2-124m --data hub"),
    "nanogpt": Command(
        "fastgpt.nanogpt", "run an unmodified nanoGPT train.py on the kernels", "train.py config/train_gpt2.py"
    ),
    "hardware": Command(
        "fastgpt.hardware.__main__", "what a GPU can do, and what an MFU means on it", "rtx4070 --nanogpt-mfu 12.9"
    ),
    "bench": Command("", "the benchmarks of a checkout: mfu, kernels, project, audit, ...", "mfu --device cpu"),
    "env": Command("fastgpt.env", "device, driver and versions, for a bug report", ""),
}


def main(args: list[str]) -> int:
    """Run one command on the arguments behind it; its exit code. Raises UserError for a command that does not exist."""
    if args[:1] in (["-V"], ["--version"]):
        print(f"fastgpt {__version__}")
        return 0
    known = {name: f"{c.summary}\n$ fastgpt {name} {c.example}".rstrip() for name, c in COMMANDS.items()}
    usage = "fastgpt COMMAND ...\n\nTrain GPT-2 on hand-written Triton kernels."
    name, rest = command.subcommand(
        args, known, usage, _FOOTER, foremost=("train", "sample", "plan", "doctor", "prepare")
    )
    if name == "bench":
        return bench(rest)
    if name == "prepare":
        rest = ["prepare", *rest]
    with common.importing():
        module = import_module(COMMANDS[name].module)
    return module.main(rest)


def bench(args: list[str], root: Path = ROOT) -> int:
    """``python -m bench.NAME`` of the checkout that this package lies in. Raises UserError where there is none: the
    benchmarks compare with what the package does not depend on, and are not installed with it."""
    entries = _benchmarks(root)
    if not entries or not (root / "pyproject.toml").exists():
        raise UserError(
            "bench is not part of the installed package: clone fastgpt's repository and run fastgpt bench, or "
            "python -m bench.NAME, in it"
        )
    usage = "fastgpt bench NAME ...   (the same as python -m bench.NAME in the checkout)"
    name, rest = command.subcommand(args, entries, usage, "fastgpt bench NAME --help has the options.", "bench")
    sys.path.insert(0, str(root))  # an installed command starts with its own folder there
    with common.importing():
        module = import_module(f"bench.{name}")
    return module.main(rest)


@functools.cache
def _benchmarks(root: Path) -> dict[str, str]:
    """The benchmarks that users call, and what each is for."""
    entries = {}
    for path in sorted(root.glob("bench/*.py")):
        source = path.read_text(encoding="utf-8")
        if f"python -m bench.{path.stem}" in source:  # as it says itself
            text = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split(" ``")[0].rstrip(":.")
            entries[path.stem] = textwrap.shorten(text, 96, placeholder=" ...")
    return entries


def entry() -> None:
    """What the installed ``fastgpt`` calls."""
    common.run(main)


if __name__ == "__main__":
    entry()
