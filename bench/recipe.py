"""What the modern recipe saves: tokens to one validation loss, measured on a CPU, and hours to FineWeb 3.28, projected.

    python -m bench.recipe                          the results in bench/results/recipe.json as tables
    python -m bench.recipe --json
    python -m bench.recipe --plot recipe.png
    python -m bench.recipe --run --out runs/recipe  the experiment again: hours on one core; goes on where it was stopped

The experiment trains one small width on Python's standard library as bytes, in plain PyTorch, through train.py itself. The
GPT-2 recipe (AdamW, cosine) gets 4.3M tokens at its best of the rates below; the modern one's runs are shorter, each with
its whole schedule, and the shortest that ends at or below GPT-2's loss counts. Then parts are taken away one at a time.
What the recipe is: docs/recipe.md.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from bench.reports import results
from bench.reports.tables import Cells, print_table, terminal
from fastgpt import command, common
from fastgpt.checkpoints import METRICS
from fastgpt.command import Arg
from fastgpt.common import UserError, load_json, write_json
from fastgpt.config import load_preset, parse
from fastgpt.hardware import cards
from fastgpt.performance import recipes
from fastgpt.performance.memory import memory
from fastgpt.performance.operations import PASSES
from fastgpt.performance.step_time import OperationTime
from fastgpt.training import metrics

SCHEMA, SCHEMA_VERSION = "fastgpt.recipe", 1
COMMITTED = Path(__file__).parent / "results" / "recipe.json"

# ---------------------------------------------------------------- the experiment

COMMON = (
    "--n-layer 4 --n-head 4 --n-embd 128 --block-size 128 --vocab-size 256 --tokenizer bytes --batch-size 16 --grad-accum 1 "
    "--kernels eager --device cpu --eval-iters 20 --eval-interval 100 --checkpoint-interval 0 --log-interval 100 "
    "--sample-interval 0 --no-tensorboard --no-doctor"
)
TOKENS_PER_STEP = 16 * 128
SEEDS = (1, 2, 3)
FULL = 2100
"""Steps of the GPT-2 recipe: 4.3M tokens."""

RECIPES = {
    "gpt2": "--preset demo --schedule cosine --min-lr-ratio 0.1 --warmup-iters 100 --weight-decay 0.1 --beta2 0.95",
    "modern": "--preset modern-demo --schedule wsd --decay-share 0.6 --min-lr-ratio 0 --warmup-iters 0 --weight-decay 0 "
    "--grad-clip 0 --beta1 0.8 --beta2 0.95 --embedding-lr 0.1 --head-lr 0.01 --scalar-lr 0.02",
}
"""For "modern", the rates of AdamW, the decay and the betas were chosen in short trials of one seed, then left alone."""
MUON = "--muon-momentum-warmup 300 --lr 2e-3"
"""What Muon needs besides its rate; --lr is only what the schedule multiplies, where the rates of embeddings and the like are
given."""
GPT2_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MUON_RATES = (0.01, 0.02, 0.03, 0.04, 0.08)
"""AdamW's rates for embeddings, head and scalars stay those of the preset."""
SWEEP = 320
"""Steps of the runs that choose Muon's rate, and of those without a part."""
BUDGETS = (400, 440, 500)
"""Steps of the modern recipe's runs, from the shortest on until one ends at or below the loss of the GPT-2 recipe."""

WITHOUT = {
    "rotary positions (none instead)": "--rotary-base 0",
    "QK-norm": "--no-qk-norm",
    "zero-initialised projections": "--no-zero-init",
    "scalars on residual and embedding": "--no-residual-scalars",
    "value embeddings": "--no-value-embeddings",
    "capped logits": "--softcap 0",
    "windows": "--window-pattern L",
    "ReLU^2 (GELU instead)": "--activation gelu",
    "a head of its own (tied instead)": "--tied-head --embedding-lr 0.01",
}
"""The modern recipe less one part. A tied head has the rate of the head that it replaces, a tenth of the embedding's."""
ADAMW_RATES = (2e-3, 4e-3, 8e-3)
"""Learning rates of the modern model trained with AdamW alone."""
GPT2_MUON_RATES = (0.02,)
"""Learning rates of the GPT-2 model's matrices under Muon."""


@dataclass(frozen=True)
class Trial:
    """One run: a model and an optimizer, and what of the recipe is changed."""

    recipe: str
    """"gpt2" or "modern"."""
    optimizer: str
    lr: float
    """Muon's, or AdamW's where there is no Muon."""
    steps: int
    seed: int = 1
    change: str = ""
    """The flags that differ from the recipe, with a value if the recipe has them, too."""
    part: str = ""
    """What that is called in tables; "" for the recipe itself."""

    @property
    def name(self) -> str:
        part = "".join(c if c.isalnum() else " " for c in self.part).split()
        return "-".join([self.recipe, *part, f"lr{self.lr:g}", str(self.steps), f"seed{self.seed}"])

    @property
    def flags(self) -> list[str]:
        rate = f"--lr {self.lr:g}" if self.optimizer == "adamw" else f"{MUON} --muon-lr {self.lr:g}"
        every = f"--optimizer {self.optimizer} {rate} --max-iters {self.steps} --seed {self.seed}"
        words, changed = shlex.split(f"{RECIPES[self.recipe]} {COMMON}"), shlex.split(self.change)
        for name in changed:
            if name in words:  # with its value
                del words[words.index(name) : words.index(name) + 2]
        return [*words, *changed, *shlex.split(every)]


Run = Callable[[Trial], float]
"""Runs a trial, if that has not been done, and returns its last validation loss."""


def experiment(run: Run) -> None:
    """Every run of the experiment. Later ones depend on the losses of earlier ones."""
    adam = best(run, [Trial("gpt2", "adamw", rate, FULL) for rate in GPT2_RATES])
    goals = {seed: run(Trial("gpt2", "adamw", adam, FULL, seed)) for seed in SEEDS}
    muon = best(run, [Trial("modern", "muon", rate, SWEEP) for rate in MUON_RATES])
    for seed in SEEDS:
        next((steps for steps in BUDGETS if run(Trial("modern", "muon", muon, steps, seed)) <= goals[seed]), None)
    for part, change in WITHOUT.items():
        run(Trial("modern", "muon", muon, SWEEP, 1, change, f"without {part}"))
    best(run, [Trial("modern", "adamw", rate, SWEEP, 1, "", "AdamW alone") for rate in ADAMW_RATES])
    run(Trial("gpt2", "adamw", adam, SWEEP, 1, "", "GPT-2 with AdamW"))
    for rate in GPT2_MUON_RATES:
        run(Trial("gpt2", "muon", rate, SWEEP, 1, f"--embedding-lr {adam:g} --scalar-lr {adam:g}", "GPT-2 with Muon"))


def best(run: Run, trials: list[Trial]) -> float:
    return min(trials, key=run).lr


# ---------------------------------------------------------------- running it


def run_in(folder: Path) -> Run:
    """Trials through train.py's own entry, one thread, each in a folder of its own that a later call finds finished."""

    def run(trial: Trial) -> float:
        where = folder / trial.name
        command_line = [sys.executable, "-m", "fastgpt.train", *trial.flags, "--out", str(where)]
        if (found := read_run(where, trial)) is None:
            print(f"{trial.name}: {shlex.join(command_line[1:])}", flush=True)
            one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            code = subprocess.run(command_line, env=one_thread, stdout=subprocess.DEVNULL).returncode
            if code == 130:
                raise KeyboardInterrupt
            if (found := read_run(where, trial)) is None:
                raise UserError(f"{trial.name} ended with {code} and is not finished: run it alone to see why")
        print(f"{trial.name}: validation loss {found['evals'][-1][1]:.4f}", flush=True)
        return found["evals"][-1][1]

    return run


def read_run(where: Path, trial: Trial) -> dict[str, Any] | None:
    """What the results keep of a run; None if it is not there, not finished, or was trained with other settings."""
    if not (where / METRICS).is_file():
        return None
    records = metrics.read(where)
    evals = [[record["step"], round(record["val_loss"], 5)] for record in records if "val_loss" in record]
    asked, had = parse(trial.flags, "cpu").to_dict(), records[0].get("config", {})
    unread = ("out", "resume") + (("muon_",) if trial.optimizer == "adamw" else ())
    same = all(
        asked[section].get(key) == value
        for section, values in had.items()
        for key, value in values.items()
        if not key.startswith(unread)
    )
    if not (same and evals and evals[-1][0] == trial.steps):
        return None
    return {**asdict(trial), "evals": evals, "commit": load_json(where / "environment.json", "environment")["commit"]}


def collect(folder: Path) -> dict[str, Any]:
    """The results of an experiment that is finished."""
    import torch

    from fastgpt.hardware.environment import environment

    runs: dict[str, dict[str, Any]] = {}

    def known(trial: Trial) -> float:
        found = read_run(folder / trial.name, trial)
        if found is None:
            raise UserError(f"{folder} has no finished run {trial.name}: python -m bench.recipe --run --out {folder}")
        runs[trial.name] = found
        return found["evals"][-1][1]

    experiment(known)
    about = environment(torch.device("cpu"))
    head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "environment": about}
    return head | {
        "tokens_per_step": TOKENS_PER_STEP,
        "common": COMMON,
        "recipes": RECIPES,
        "runs": list(runs.values()),
    }


# ---------------------------------------------------------------- what came of it


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a results file: losses in nats, tokens, and tokens_ratio, the modern recipe's tokens to the GPT-2 recipe's
    last loss over the GPT-2 recipe's, for each seed."""
    runs, per_step = found["runs"], found["tokens_per_step"]

    def last(**wanted: Any) -> dict[Any, float]:
        """The last losses of the runs like this, by (lr, steps, seed)."""
        return {
            (run["lr"], run["steps"], run["seed"]): run["evals"][-1][1]
            for run in runs
            if all(run[key] == value for key, value in wanted.items())
        }

    gpt2, modern = last(recipe="gpt2", part=""), last(recipe="modern", part="")
    rates = {"gpt2": {k[0]: v for k, v in gpt2.items() if k[2] == 1}}
    rates["modern"] = {k[0]: v for k, v in modern.items() if k[1:] == (SWEEP, 1)}
    best_of = {name: min(losses, key=losses.__getitem__) for name, losses in rates.items()}
    goals = {k[2]: v for k, v in gpt2.items() if k[0] == best_of["gpt2"]}
    reached = {}
    for seed, goal in goals.items():
        enough = [k[1] for k, v in modern.items() if k[0] == best_of["modern"] and k[2] == seed and v <= goal]
        if not enough:
            raise UserError(f"no modern run of seed {seed} ended at or below {goal}: BUDGETS needs a longer one")
        reached[seed] = min(enough)
    ratios = {seed: round(steps / FULL, 6) for seed, steps in reached.items()}
    whole = rates["modern"][best_of["modern"]]
    parts = {}
    for recipe, part in dict.fromkeys((run["recipe"], run["part"]) for run in runs if run["part"]):
        losses = last(part=part)
        (lr, _, _), loss = min(losses.items(), key=lambda item: item[1])
        figures = {"recipe": recipe, "lr": lr, "rates_tried": len(losses)}
        parts[part] = {"loss": loss, "more": round(loss - whole, 4), **figures}
    return {
        "tokens_ratio": round(mean(ratios.values()), 3),
        "tokens_ratio_by_seed": ratios,
        "learning_rates": rates,
        "best_learning_rate": best_of,
        "gpt2_tokens": FULL * per_step,
        "gpt2_losses": goals,
        "modern_tokens": {seed: steps * per_step for seed, steps in reached.items()},
        "modern_losses": {seed: modern[best_of["modern"], steps, seed] for seed, steps in reached.items()},
        "parts_tokens": SWEEP * per_step,
        "modern_losses_at_parts_tokens": {k[2]: v for k, v in modern.items() if k[:2] == (best_of["modern"], SWEEP)},
        "parts": parts,
    }


ROWS = ((recipes.GPT2, "bf16"), (recipes.MODERN, "bf16"), (recipes.MODERN, "fp16-fast"))
"""What is projected."""


def hours_of(name: str = "rtx4070") -> list[dict[str, Any]]:
    """Both recipes on a card, projected."""
    gpu, ends = cards.card(name), ("low", "central", "high")
    return [
        {
            "preset": recipe.preset,
            "precision": precision,
            "gpu": gpu.name,
            "target": recipes.TARGET,
            "projected": True,
            "tokens": dict(zip(ends, recipe.tokens)),
            "tokens_per_second": dict(zip(ends, map(round, recipes.tokens_per_second(recipe, gpu, precision)))),
            "hours": recipes.hours(recipe, gpu, precision).to_json(),
            "why": recipe.why,
        }
        for recipe, precision in ROWS
    ]


def to_json(found: dict[str, Any]) -> dict[str, Any]:
    """What --json prints."""
    experiment, (gpt2, modern, fast) = summary(found), hours_of()
    commits = sorted({run["commit"] for run in found["runs"]})
    return {
        "tokens_ratio": experiment["tokens_ratio"],
        "experiment": {"measured": True, "environment": found["environment"], "commits": commits, **experiment},
        "hours_to_3.28_rtx4070": modern["hours"],
        "hours_to_3.28_rtx4070_fp16_fast": fast["hours"],
        "gpt2_hours": gpt2["hours"],
        "projection": [gpt2, modern, fast],
        "factors": factors(),
        "modern_step": costs(),
        "sources": [asdict(factor) for factor in recipes.FACTORS],
    }


def loss_cells(found: dict[str, Any]) -> Cells:
    """The two recipes, seed by seed."""
    seen = summary(found)
    rows = [["seed", "GPT-2 + AdamW", "tokens", "modern + Muon", "tokens", "ratio"]]
    for seed, goal in seen["gpt2_losses"].items():
        tokens, loss = seen["modern_tokens"][seed], seen["modern_losses"][seed]
        ratio = seen["tokens_ratio_by_seed"][seed]
        old = common.rounded(seen["gpt2_tokens"])
        rows.append([str(seed), f"{goal:.4f}", old, f"{loss:.4f}", common.rounded(tokens), f"{ratio:.3f}"])
    return rows


def part_cells(found: dict[str, Any]) -> Cells:
    """What the loss becomes without a part, most first."""
    parts = summary(found)["parts"]
    rows = [["modern + Muon, changed", "loss", "rise"]]
    for part, figures in sorted(parts.items(), key=lambda item: -item[1]["more"]):
        rows.append([part, f"{figures['loss']:.4f}", f"{figures['more']:+.4f}"])
    return rows


def factors() -> list[dict[str, Any]]:
    """What takes the hours of the first of ROWS to those of the last: the change, its factor, and the hours after it."""
    gpt2, modern, fast = hours_of()
    tokens, speed = ([row[key]["central"] for row in (gpt2, modern, fast)] for key in ("tokens", "tokens_per_second"))
    changes = (
        (f"{gpt2['preset']}, {gpt2['precision']}", 1.0),
        (f"tokens: {common.rounded(tokens[0])} to {common.rounded(tokens[1])}", tokens[1] / tokens[0]),
        ("its step, at longer contexts, is slower", speed[0] / speed[1]),
        ("sums in fp16: fp16-fast, experimental", speed[1] / speed[2]),
    )
    found, hours = [], tokens[0] / speed[0] / 3600
    for change, factor in changes:
        hours *= factor
        found.append({"change": change, "factor": round(factor, 3), "hours": round(hours, 2)})
    return found


def costs(name: str = "rtx4070") -> dict[str, float]:
    """The modern preset's step on a card: share of Muon's update (projected) and GB of memory (counted)."""
    preset = load_preset(recipes.MODERN.preset, "cuda")
    step = recipes.step(recipes.MODERN, cards.card(name))
    muon = sum(op.ms for op in step.operations if op.name.startswith("Muon's"))
    needed = memory(
        preset.model, micro_batch=preset.data.batch_size, kernels="triton", optimizer=preset.optim.optimizer
    )
    return {"muon_share_of_step": round(muon / step.ms_per_step, 4), "memory_gb": round(needed.total / 1e9, 2)}


def part_of(op: OperationTime) -> str:
    """The row of ``step_cells`` that an operation of a step belongs to."""
    if op.group in ("attention forward", "attention backward"):
        return "attention"
    if op.group.startswith(("head ", "loss")) or op.name == "head weight cast":
        return "head and loss"
    if op.group.startswith("norms") or op.name in ("first norm, gradients added", "embedding gradients added"):
        return "norms, residual adds, scalars"
    if op.group.startswith("rotary") or op.name == "value gate":
        return "rotary, QK-norm, value mix"
    if op.group.startswith(("GELU", "ReLU2")):
        return "activation"
    if op.group.endswith(PASSES):
        return "linears of the blocks"
    return {"embedding": "embeddings", "optimizer": "optimizer"}.get(op.group, "gradients added, gaps")


def step_cells(name: str = "rtx4070") -> Cells:
    """Where both presets' steps go in bf16: milliseconds projected, bytes counted."""
    rows = [["part of a step", "GPT-2, ms", "GB", "modern, ms", "GB"]]
    sums: dict[str, list[float]] = {}
    for i, recipe in enumerate((recipes.GPT2, recipes.MODERN)):
        for op in recipes.step(recipe, cards.card(name)).operations:
            for part in (part_of(op), "all"):
                found = sums.setdefault(part, [0.0] * 4)
                found[2 * i] += op.ms
                found[2 * i + 1] += op.bytes / 1e9
    order = sorted(sums, key=lambda part: (part == "all", -sums[part][2]))
    return rows + [[part, *(f"{figure:,.0f}" for figure in sums[part])] for part in order]


def factor_cells() -> Cells:
    rows = [["factor", "", "hours"]]
    return rows + [[row["change"], f"x {row['factor']:.3g}", f"{row['hours']:.1f}"] for row in factors()]


def hour_cells() -> Cells:
    rows = [["preset", "precision", "tokens", "tokens/s", "hours", "low", "high"]]
    for known in hours_of():
        figures = [f"{known['hours'][end]:.1f}" for end in ("central", "low", "high")]
        speed = f"{known['tokens_per_second']['central']:,}"
        rows.append([known["preset"], known["precision"], common.rounded(known["tokens"]["central"]), speed, *figures])
    return rows


@dataclass(frozen=True)
class RecipeConfig:
    """What the modern recipe saves: tokens to a loss, measured on a CPU, and hours to FineWeb 3.28, projected."""

    results: Annotated[Path, Arg("FILE")] = COMMITTED
    """The results to print: by default those of the repository."""
    json: bool = False
    """Print JSON instead of tables."""
    plot: Annotated[Path | None, Arg("FILE")] = None
    """A PNG to draw."""
    run: bool = False
    """Run the experiment, hours on one core, and print what comes of it. Finished runs in --out are not repeated."""
    out: Annotated[Path, Arg("FOLDER")] = Path("runs/recipe")
    """Where --run puts its runs, and the results (results.json)."""


def main(args: list[str]) -> int:
    config = command.parse(RecipeConfig, args, "bench.recipe", __doc__)
    path = config.results
    if config.out != RecipeConfig.out and not config.run:
        raise UserError(f"out is {config.out}, which is for --run: give --run, or read results with --results FILE")
    if config.run and path != COMMITTED:
        raise UserError(f"results is {path}, but --run makes its own: leave one out")
    if config.plot:
        results.check_writable(config.plot.parent, "plot")
    if config.run:
        results.check_writable(config.out)
        experiment(run_in(config.out))
        path = config.out / "results.json"
        write_json(path, collect(config.out))
    found = results.read(path, "bench.recipe", SCHEMA, SCHEMA_VERSION)
    if config.plot:
        from bench.reports import pictures

        pictures.two_recipes(curves(found), summary(found), config.plot)
    if config.json:
        print(json.dumps(to_json(found), indent=1))
    else:
        show(found)
    return 0


def show(found: dict[str, Any]) -> None:
    console, seen, about = terminal(100), summary(found), found["environment"]
    ratios = seen["tokens_ratio_by_seed"].values()
    console.print(
        f"Measured on a CPU ({about['device']}, torch {about['torch']}): 4 layers of 128, context 128, the standard library as "
        f"bytes. Modern + Muon needs {seen['tokens_ratio']:.3f} of the tokens ({min(ratios):.3f} to {max(ratios):.3f}).",
        soft_wrap=True,
    )
    print_table(console, "Validation loss, and the tokens that it took", loss_cells(found))
    print_table(console, f"Without a part, after {common.rounded(seen['parts_tokens'])} tokens", part_cells(found))
    print_table(console, f"Hours to {recipes.TARGET} on an RTX 4070: projected", hour_cells())
    print_table(console, "The same hours, factor by factor", factor_cells())
    print_table(console, "Where a step goes, in bf16: time projected, bytes counted", step_cells())
    step = costs()
    console.print(
        f"Of a step of {recipes.MODERN.preset} Muon's update takes {step['muon_share_of_step']:.2%}, projected; it needs "
        f"{step['memory_gb']:.2f} GB, counted.",
        soft_wrap=True,
    )
    console.print(
        "Tokens are those of public runs (docs/recipe.md). fp16-fast is experimental: no GPU has measured it yet.",
        soft_wrap=True,
    )


def curves(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that the picture shows: GPT-2's at its best rate, and the modern ones that reached its loss."""
    seen = summary(found)
    return [
        run
        for run in found["runs"]
        if not run["part"]
        and run["lr"] == seen["best_learning_rate"][run["recipe"]]
        and (run["steps"] == FULL or run["steps"] * TOKENS_PER_STEP == seen["modern_tokens"][run["seed"]])
    ]


if __name__ == "__main__":
    common.run(main)
