"""How accurate is each precision's matmul, and does a model trained in it learn as well? Simulated, on a CPU:

    python -m bench.precision                              errors against fp64: drawn operands, and recorded ones (2 minutes)
    python -m bench.precision --train                      and a small GPT trained in every mode (10 minutes)
    python -m bench.precision --train --out DIR            and precision.json, precision-tables.md and pictures in DIR
    python -m bench.precision --train --quick              everything tiny, to see that it works (seconds)

The rounding of tensor cores is that of numerics/simulation.py, which says what it assumes about them; no GPU takes part, and
nothing here says how fast a mode is. docs/precision-modes.md discusses the results.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from bench.numerics import report
from bench.numerics.errors import COMPARED, FP8_MODES, KS, VALUES, drawn, over_scales, readings, recorded
from bench.numerics.simulation import BF16, FP8_FP32, FP16, FP16_FAST, FP32
from bench.numerics.training import QUICK, RECORDED, Experiment, SimulatedRun, corpus, record, train
from bench.reports import results
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import write_json
from fastgpt.hardware.environment import environment

LOSS_SCALE = 2.0**16
"""What torch.amp.GradScaler starts with."""

TRAINED = (
    FP32,
    FP16,
    *(FP16_FAST.with_chunk(chunk) for chunk in (64, 128, None)),
    *(mode for mode in FP8_MODES if mode is not FP8_FP32),
)


def errors(quick: bool) -> dict[str, Any]:
    """Everything about single matmuls: of drawn operands, of recorded ones, over loss scales, under other readings."""
    start = time.perf_counter()
    setup, steps = (QUICK, (0, 2)) if quick else (RECORDED, (0, 50, 150))
    ks = (64, 256) if quick else KS
    pairs = record(setup, corpus(setup.characters), steps)
    summed = [pair for pair in pairs if pair.what != "Q K"]  # by no mode in fp16
    exponents = range(0, 31, 10 if quick else 2)
    chunks = (32, 64, 128)
    found = {
        "recorded_from": asdict(setup) | {"recorded_at": steps, "matmuls": len(pairs)},
        "loss_scale": LOSS_SCALE,
        "drawn": [asdict(point) for point in drawn(ks)],
        "recorded": [asdict(kind) for kind in recorded(pairs, LOSS_SCALE)],
        "scales": {
            f"{'head' if head else 'blocks'}, chunk {chunk}": [
                asdict(row) for row in over_scales(pairs, FP16_FAST.with_chunk(chunk), exponents, head)
            ]
            for head in (False, True)
            for chunk in chunks[1:]
        },
        "readings": {
            str(chunk): {
                "drawn": [asdict(point) for point in drawn(ks[-1:], readings(chunk), VALUES[:1])],
                "recorded": [asdict(kind) for kind in recorded(summed, LOSS_SCALE, readings(chunk))],
            }
            for chunk in chunks
        },
    }
    return found | {"seconds": time.perf_counter() - start}


def training(quick: bool, console: Console) -> dict[str, Any]:
    """The same run in bf16 (twice more with its weights perturbed: the yardstick) and in every mode."""
    setup = QUICK if quick else Experiment()
    tokens = corpus(setup.characters)
    runs: list[SimulatedRun] = []

    def add(run: SimulatedRun) -> None:
        runs.append(run)
        skipped = f", {run.skipped} steps skipped" if run.skipped else ""
        console.print(
            f"{run.mode}: validation loss {run.final:.4f} after {len(run.losses)} steps{skipped} ({run.seconds:.0f} s)"
        )

    add(train(BF16, setup, tokens))
    for seed in (1, 2):
        add(train(BF16, setup, tokens, name=f"bf16, perturbed {seed}", perturbed=seed))
    for mode in TRAINED:
        add(train(mode, setup, tokens))
    return {"setup": asdict(setup), "runs": [asdict(run) | {"final": run.final} for run in runs]}


@dataclass(frozen=True)
class PrecisionConfig:
    out: Annotated[Path | None, Arg("FOLDER")] = None
    """A folder for precision.json, precision-tables.md and precision-*.png."""
    quick: bool = False
    """Tiny sizes: shows that it works, its figures mean nothing."""
    train: bool = False
    """Train a small GPT in every mode as well."""


def main(argv: list[str]) -> int:
    asked = command.parse(PrecisionConfig, argv, "bench.precision", __doc__)
    if asked.out:
        results.check_writable(asked.out)
    torch.set_num_threads(1)
    console = common.console()
    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "quick": asked.quick, "modes": {}}
    result["modes"] = {mode.name: asdict(mode) for mode in {*COMPARED, *TRAINED, BF16}}
    result["errors"] = errors(asked.quick)
    result["training"] = training(asked.quick, console) if asked.train else None
    text = report.tables(result)
    console.print(Markdown(text))
    if asked.out:
        write_json(asked.out / "precision.json", result)
        (asked.out / "precision-tables.md").write_text(text, encoding="utf-8")
        drawn_files = report.pictures(result, asked.out)
        console.print(
            f"written to {asked.out}: precision.json, precision-tables.md, {', '.join(p.name for p in drawn_files)}"
        )
    return 0


if __name__ == "__main__":
    common.run(main)
