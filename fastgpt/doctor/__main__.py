"""What is wrong with a run, what it costs and what to change: ``python -m fastgpt.doctor CONFIG LOG CHECKPOINT``.

Any subset of the files will do, in any order: a nanoGPT config (parsed, never executed) or a fastgpt TOML, a log of nanoGPT,
nanochat, llm.c or fastgpt, a checkpoint of nanoGPT or fastgpt. What they do not say is listed, not guessed. Arguments of the
form --key=value override the config, as on the command line of the run. Exit code: 0 nothing found, 1 findings, 2 unreadable.

Examples:
  python -m fastgpt.doctor config/train_gpt2.py                        before a run
  python -m fastgpt.doctor config.py run.log --gpu rtx4070             during or after it
  python -m fastgpt.doctor config.py ckpt.pt --n_embd=768              before resuming
  python -m fastgpt.doctor run.log --gpu rtx4070 --html report.html    with the curve
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.reading import surroundings
from fastgpt.doctor.reading.read import read
from fastgpt.doctor.report import page, text
from fastgpt.hardware import cards
from fastgpt.hardware.cards import Gpu


@dataclass(frozen=True)
class DoctorConfig:
    """The doctor's own flags; the module's docstring is their description."""

    files: Annotated[tuple[Path, ...], Arg("FILE", positional=True)] = ()
    """Configs, logs, checkpoints, in any order."""
    gpu: str | None = None
    """The run's card, such as rtx4070. Without it: the log's, or this machine's."""
    json: bool = False
    """Print JSON: findings, figures, what was not checked."""
    html: Annotated[Path | None, Arg("FILE")] = None
    """Also write a page with the curve and the findings on it."""
    corpus_tokens: Annotated[float | None, Arg("N")] = None
    """Tokens of the training data (1e9 will do)."""

    def __post_init__(self) -> None:
        if self.corpus_tokens is not None and not self.corpus_tokens >= 1:
            raise UserError(f"corpus-tokens is {self.corpus_tokens:g}: it must be at least 1")


def parse(args: list[str]) -> tuple[DoctorConfig, list[str]]:
    """The doctor's own flags, and the overrides (--key=value). Raises UserError for anything else."""
    found, rest = command.parse_known(DoctorConfig, args, "fastgpt.doctor", __doc__)
    files, overrides = list(found.pop("files", ())), []
    for arg in rest:
        if arg.startswith("--") and "=" in arg:
            overrides.append(arg)
        elif arg.startswith("-"):
            raise UserError(
                f"flag is {arg!r}: overrides have the form --key=value, and --help lists the doctor's own flags"
            )
        else:
            files.append(Path(arg))
    if not files and not overrides:
        raise UserError("no file is given: name a config, a log or a checkpoint (--help has examples)")
    return DoctorConfig(tuple(files), **found), overrides


def card(name: str | None, evidence: Evidence) -> Gpu | None:
    """The run's card: the one named, else the log's, else (before a run) this machine's; None if unknown.

    Raises UserError for a name that is not in the table."""
    if name is not None:
        return cards.card(name)
    if evidence.log is not None:
        devices = [cards.lookup(str(note.value)) for note in evidence.log.all("device")]
        return next((gpu for gpu in reversed(devices) if gpu), None)
    return cards.present()


def main(args: list[str]) -> int:
    options, overrides = parse(args)
    evidence = read(list(options.files), overrides)
    evidence.data_vocabulary = surroundings.vocabulary(evidence)
    gpu = card(options.gpu, evidence)
    tokens = int(options.corpus_tokens) if options.corpus_tokens else surroundings.corpus_tokens(evidence)
    if evidence.log is None and options.gpu is None:  # the run is to start here
        evidence.machine = surroundings.this_machine()
    found = diagnose(evidence, gpu, tokens)
    if options.html is not None:
        page.write(options.html, found, evidence, gpu)
    if options.json:
        print(json.dumps(text.to_json(found, gpu), indent=2, allow_nan=False))
    else:
        console = common.console(highlight=False)
        text.print_report(found, gpu, console)
        if options.html is not None:
            console.print(f"wrote {options.html}", markup=False)
    sys.stdout.flush()
    return 2 if found.steps_not_read else 1 if found.findings else 0


if __name__ == "__main__":
    common.run(main)
