"""fastgpt as three newcomers meet it, each with nothing installed and nothing cached: ``python tools/newcomers.py [ROLE ...]``.

``library`` installs the package and patches a model, ``trainer`` clones and trains on their own text, ``expert`` knows
nanoGPT, Hugging Face and YAML configs. Every step is a command, the exit code that it has to end with, and what it has
to say. At the end a table, and exit code 1 if a step fell short. Needs git, make and pip's index, minutes, and 3 GB for
each role.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KEPT = re.compile(r"PIP_.*|.*_proxy|.*_PROXY|SSL_CERT_.*|LANG|TERM")
"""Of the caller's environment: how to reach the package index."""


class Step(NamedTuple):
    command: str
    """Run by a shell in the role's folder."""
    shows: str
    """A regular expression that has to match in what it prints."""
    code: int = 0
    most: float | None = None
    """Seconds that it may take on 2 cores that nothing else uses."""


PATCH = """
import fastgpt, torch
from model import GPT, GPTConfig
from transformers import GPT2Config, GPT2LMHeadModel

idx = torch.randint(0, 64, (2, 16))
shape = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=64)
theirs = GPT2LMHeadModel(GPT2Config(**shape, n_positions=16, bos_token_id=0, eos_token_id=0))
fastgpt.patch(theirs, verify={"input_ids": idx, "labels": idx})
print("loss", theirs(input_ids=idx, labels=idx).loss.item())
nanogpt = GPT(GPTConfig(**shape, block_size=16))
fastgpt.patch(nanogpt, verify=(idx, idx))
nanogpt(idx, idx)[1].backward()
fastgpt.unpatch(nanogpt)
"""
TYPED = """
from fastgpt import FusedAdamW, GPT, ModelConfig
model: GPT = GPT(ModelConfig(n_layer=1))
optimizer: FusedAdamW = FusedAdamW(model.parameters(), lr=1e-3)
"""
BOTH_WAYS = """
import torch
theirs, back = (torch.load(path, weights_only=True)["model"] for path in ("nano/out/ckpt.pt", "back.pt"))
print("bit for bit", all(torch.equal(theirs[name], back[name]) for name in theirs))
"""
FILES = {
    "library": {"patched.py": PATCH, "typed.py": TYPED},
    "trainer": {"my.txt": "All work and no play makes Jack a dull boy.\n" * 2000},
    "expert": {"mine.yaml": "model:\n  n_layer: 4\n", "both_ways.py": BOTH_WAYS},
}
SMALL = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --eval-iters 2 --kernels eager"
REFUSED = "torch .* sees no CUDA GPU"
ROLES = {
    "library": [
        Step(f"git clone --quiet {ROOT} checkout && python3 -m venv .venv", ""),
        Step("pip install --quiet './checkout[hf]' mypy", ""),
        Step("python -c 'import fastgpt; print(fastgpt.__file__, dir(fastgpt))'", "site-packages.*FusedAdamW.*patch"),
        Step("cp checkout/bench/steps/nanogpt.py model.py", ""),
        Step("python patched.py", r"(?s)GPT2LMHeadModel.*loss \d.*nanoGPT"),
        Step("mypy --strict typed.py", "Success: no issues found"),
        Step("fastgpt", "usage: fastgpt COMMAND", 2),
    ],
    "trainer": [
        Step(
            f"git clone --quiet {ROOT} . && make train",
            r"(?s)validation loss.*next +\S*python -m fastgpt.sample",
            0,
            240,
        ),
        Step("fastgpt", "usage: fastgpt COMMAND", 2, 1),
        Step("fastgpt train --help", "most used options", 0, 1),
        Step(
            f"fastgpt train --data my.txt --out runs/mine {SMALL} --max-iters 40",
            "(?s)iter 40: loss.*next +fastgpt sample",
        ),
        Step("fastgpt sample runs/mine --prompt All --tokens 40", "All"),
        Step("fastgpt plot", r"runs/mine/curves\.png"),
        Step(
            f"fastgpt train --data my.txt --out runs/mine {SMALL} --max-iters 60 --resume",
            "(?s)resumed from.*iter 60: loss",
        ),
        Step("fastgpt doctor runs/mine", "nothing found"),
        Step("fastgpt plan --gpu rtx4070", "hours"),
        Step("fastgpt prepare my.txt --out data/mine", "is ready"),
        Step("fastgpt data check data/mine", "every id is below 50257"),
    ],
    "expert": [
        Step(f"git clone --quiet {ROOT} . && make install", ""),
        Step("fastgpt env", "train uses"),
        Step("fastgpt train model.n_layer=4", "--n-layer 4", 2),
        Step("fastgpt train mine.yaml", "TOML", 2),
        Step("fastgpt train --learning-rate 1e-3", "did you mean '--lr'", 2),
        Step("""python -c 'from tests.test_nanogpt import checkout; checkout("nano")'""", ""),
        Step("fastgpt nanogpt nano/train.py nano/config/quick.py --compile=False", "(?s)nanoGPT's GPT.*iter 2: loss"),
        Step("fastgpt convert nano/out/ckpt.pt runs/theirs --to fastgpt", "nanoGPT checkpoint .* -> fastgpt run"),
        Step("fastgpt convert runs/theirs back.pt", "optimizer state"),
        Step("python both_ways.py", "bit for bit True"),
        Step("fastgpt convert runs/theirs my-gpt2 --to hf", "Hugging Face folder"),
        Step("python -m bench.mfu --device cuda", REFUSED, 2),
        Step("python -m bench.gpu --out results", REFUSED, 2),
    ],
}


def environment(folder: Path) -> dict[str, str]:
    """That of a role: a home of its own, and of the programs here those of the system and of the Python below any venv."""
    programs = [folder / ".venv/bin", Path(sys.base_prefix, "bin"), "/usr/local/bin", "/usr/bin", "/bin"]
    kept = {key: value for key, value in os.environ.items() if KEPT.fullmatch(key)}
    return {**kept, "HOME": f"{folder} home", "PATH": os.pathsep.join(map(str, programs))}


def tried(step: Step, folder: Path) -> tuple[float, float, str]:
    """The seconds that a step took, those of a processor in them, and what fell short; "" if nothing did."""
    begin, before = time.monotonic(), os.times()
    done = subprocess.run(
        step.command, shell=True, cwd=folder, env=environment(folder), text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seconds, after, short = time.monotonic() - begin, os.times(), []
    if done.returncode != step.code:
        short.append(f"ended with {done.returncode}, not {step.code}")
    if not re.search(step.shows, done.stdout):
        short.append(f"did not say {step.shows!r}")
    if short:
        print(done.stdout[-3000:])
    if step.most is not None and seconds > step.most:
        short.append(f"may take {step.most:g} s")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu, "; ".join(short)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roles", nargs="*", metavar="ROLE", default=[], help=f"of {', '.join(ROLES)}; all without any")
    roles, rows = parser.parse_args().roles or list(ROLES), []
    if strangers := set(roles) - ROLES.keys():
        parser.error(f"ROLE is {strangers.pop()!r}: it can be {', '.join(ROLES)}")
    with tempfile.TemporaryDirectory(prefix="newcomers") as work:
        for role in roles:
            folder = Path(work, role)
            folder.mkdir()
            Path(f"{folder} home").mkdir()
            for i, step in enumerate(ROLES[role]):
                print(f"{role}: {step.command}", flush=True)
                rows.append((role, step, *tried(step, folder)))
                print(f"  {rows[-1][2]:.0f} s{rows[-1][4] and '; FELL SHORT: '}{rows[-1][4]}", flush=True)
                for name, text in FILES[role].items() if not i else ():  # a clone wants an empty folder
                    (folder / name).write_text(text, encoding="utf-8")
    print(f"\n{'':<8} {'seconds':>8} {'of CPU':>7}")
    for role, step, seconds, cpu, short in rows:
        print(f"{role:<8} {seconds:8.1f} {cpu:7.1f}  {step.command}")
        print(f"{'':27}FELL SHORT: {short}\n" if short else "", end="")
    return int(any(short for *_, short in rows))


if __name__ == "__main__":
    sys.exit(main())
