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

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from fastgpt import common, hardware
from fastgpt.common import UserError
from fastgpt.doctor import corpus, environment, page, report
from fastgpt.doctor.diagnosis import Diagnosis, diagnose
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.findings import rank
from fastgpt.doctor.reading import read
from fastgpt.hardware import Gpu


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The doctor's own flags, and the overrides that are left. Raises UserError for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [FILES ...] [--gpu NAME] [--json] [--html FILE] [--key=value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILES", help="configs, logs, checkpoints, in any order")
    parser.add_argument("--gpu", help="the run's card, such as rtx4070; without it: the log's, or this machine's")
    parser.add_argument("--json", action="store_true", help="print JSON: findings, figures, what was not checked")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page with the curve and the findings on it"
    )
    parser.add_argument("--corpus-tokens", type=float, metavar="N", help="tokens of the training data (1e9 will do)")
    known, rest = parser.parse_known_args(args)
    files, overrides = [], []
    for arg in rest:
        if arg.startswith("--") and "=" in arg:
            overrides.append(arg)
        elif arg.startswith("-"):
            raise UserError(
                f"flag is {arg!r}: overrides have the form --key=value, and --help lists the doctor's own flags"
            )
        else:
            files.append(Path(arg))
    known.files += files
    if not known.files and not overrides:
        raise UserError("no file is given: name a config, a log or a checkpoint (--help has examples)")
    if known.corpus_tokens is not None and not known.corpus_tokens >= 1:
        raise UserError(f"corpus-tokens is {known.corpus_tokens:g}: it must be at least 1")
    return known, overrides


def card(name: str | None, evidence: Evidence) -> Gpu | None:
    """The run's card: the one named, else the log's, else (before a run) this machine's; None if unknown.

    Raises UserError for a name that is not in the table."""
    if name is not None:
        gpu = hardware.lookup(name)
        if gpu is None:
            raise UserError(f"gpu is {name!r}, which is not in the table; nearest: {', '.join(hardware.nearest(name))}")
        return gpu
    if evidence.log is not None:
        devices = [environment.known(str(note.value)) for note in evidence.log.all("device")]
        return next((gpu for gpu in reversed(devices) if gpu), None)
    return hardware.present()


def examine(evidence: Evidence, gpu: Gpu | None, *, here: bool, corpus_tokens: int | None = None) -> Diagnosis:
    """Every finding; ``here``: the run is to start on this machine, so that is looked at too."""
    found = diagnose(evidence, gpu, corpus_tokens)
    if here:
        config = found.figures.config
        asked = config.is_set("device") and str(config.get("device")).startswith("cuda")
        it = environment.Machine.here()
        found.findings = rank([*environment.machine(it, wants_cuda=asked, wants_triton=it.cuda), *found.findings])
    return found


def main(args: list[str]) -> int:
    options, overrides = parse(args)
    evidence = read(options.files, overrides)
    gpu = card(options.gpu, evidence)
    tokens = int(options.corpus_tokens) if options.corpus_tokens else corpus.tokens(evidence)
    found = examine(evidence, gpu, here=evidence.log is None and options.gpu is None, corpus_tokens=tokens)
    if options.html is not None:
        page.write(options.html, found, evidence, gpu)
    if options.json:
        print(json.dumps(report.to_json(found, gpu), indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        report.print_report(found, gpu, console)
        if options.html is not None:
            console.print(f"wrote {options.html}", markup=False)
    sys.stdout.flush()
    return 0 if found.clean else 1


if __name__ == "__main__":
    common.run(main)
