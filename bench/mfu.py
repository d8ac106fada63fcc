"""How fast a training step is, against which limit, where every microsecond goes, and what would make it faster.

    python -m bench.mfu                                     GPT-2 124M on a GPU; on a CPU a small step, and a projection
    python -m bench.mfu --model gpt2-40m --batch 16         another preset, another micro-batch
    python -m bench.mfu --model L6H6C384T256V50304          a shape: layers, heads, width, tokens, vocabulary
    python -m bench.mfu --backends eager,triton --steps 20  only these, timed longer
    python -m bench.mfu --precision fp8                     our kernels in fp8, which is experimental; so is fp16-fast
    python -m bench.mfu --json > step.json                  the figures for another program
    python -m bench.mfu --from runs/mfu/mfu.json            draw the report of an earlier run again

The folder given by --out gets mfu.json, report.html (all of it in one file), time.png, roofline-BACKEND.png and a Chrome
trace per backend (open in ui.perfetto.dev).
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bench.reports import results
from bench.steps.variants import BACKENDS
from fastgpt import anatomy, command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, write_json
from fastgpt.config import EXPERIMENTAL, Config, DataConfig, Device, ModelConfig, Precision, load_preset, preset_names
from fastgpt.hardware import device as device_module
from fastgpt.performance import fitting

if TYPE_CHECKING:
    import torch

    from bench.steps.turns import Setup

SCHEMA, SCHEMA_VERSION = "fastgpt.mfu", 1
NAMES = tuple(BACKENDS)
OURS = tuple(name for name, variant in BACKENDS.items() if variant.kernels == "triton")
"""The only ones that have the experimental precisions."""
SMALL = "L2H6C192T128V1024"
"""What a CPU profiles: large enough that matmuls dominate, small enough for a step in a tenth of a second."""
TINY = "L1H2C128T32V160"
"""What the interpreter profiles. Heads of 64, as GPT-2's: the kernels of fp8 depend on it."""
SHAPE = re.compile(r"[LHCTV]\d+(?:[-_ ,]?[LHCTV]\d+){4}", re.IGNORECASE)


@dataclass(frozen=True)
class MfuConfig:
    model: str | None = None
    """A preset, or a shape. Without it: gpt2-124m; on a CPU L2H6C192T128V1024."""
    batch: int | None = None
    """Sequences per micro-batch. Without it: the preset's; on a CPU 4, or 1."""
    seq: Annotated[int | None, Arg("T")] = None
    """Tokens per sequence. Without it: the model's."""
    grad_accum: int | None = None
    """Micro-batches per step. Without it: 4; on a CPU 1."""
    precision: Precision = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU. fp16-fast and fp8 are experimental, and our kernels' alone."""
    backends: Annotated[str | None, Arg("NAME,NAME")] = None
    """Any of eager, compile, compile-max-autotune, triton, triton+compile, nanogpt (the step of its train.py, compiled).
    Without it: all that have the precision; on a CPU those of eager,compile,triton."""
    steps: int = 10
    """Timed steps of each backend."""
    device: Device = "auto"
    """auto takes a CUDA GPU if there is one."""
    out: Annotated[Path, Arg("FOLDER")] = Path("runs/mfu")
    """Folder for the report."""
    trace: Annotated[Path | None, Arg("FOLDER")] = None
    """Folder for the Chrome traces. Without it: the one of --out."""
    json: bool = False
    """Print the figures as JSON instead of tables."""
    saved: Annotated[Path | None, Arg("FILE", flag="from")] = None
    """Measure nothing: show this mfu.json again."""
    gpu: str = "rtx4070"
    """The GPU to project where none is present."""
    no_projection: bool = False
    """Without a GPU: leave out projection and audit."""


def main(argv: list[str]) -> int:
    """Measure or read, then write the report and print it. Raises UserError for bad input."""
    args = command.parse(MfuConfig, argv, "bench.mfu", __doc__)
    if args.saved:
        result = load(args.saved)
        results.check_writable(args.out)
    else:
        result = measure(args)
    from bench.reports import mfu_tables, page

    if not args.saved:
        write_json(args.out / "mfu.json", result)
    page.write(result, args.out)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        mfu_tables.show(result)
        print(f"The report is {args.out / 'report.html'}; figures and traces are beside it.")
    return 0 if succeeded(result) else 1


def succeeded(result: dict[str, Any]) -> bool:
    """Whether something was timed, and all of that profiled; where there was nothing to time, whether the interpreter got
    through."""
    timed = [backend for backend in result["backends"].values() if "ms" in backend]
    if any("profile_error" in backend for backend in timed):
        return False
    return bool(timed) or (not result["backends"] and "rows" in (result["interpreted"] or {}))


# ---------------------------------------------------------------- what is asked for


def backends(text: str | None, device_type: str, precision: str = "auto") -> list[str]:
    """The backends of ``--backends``, in order, none twice. Raises UserError for an unknown one, and for one that does not have
    the precision."""
    if text is None:
        return list(NAMES) if device_type == "cuda" else ["eager", "compile", "triton"]
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in NAMES:
            raise UserError(f"backends has {name!r}: it can hold {', '.join(NAMES)}")
        if precision in EXPERIMENTAL and name not in OURS:
            raise UserError(
                f"backends has {name!r}, which does not have precision {precision!r}: {' and '.join(OURS)} have it"
            )
    if not names:
        raise UserError(f"backends is empty: name some of {', '.join(NAMES)}")
    return names


def model(text: str, device_type: str) -> tuple[ModelConfig, int]:
    """A preset or a shape such as L6H6C384T256V50304, and its micro-batch. Raises UserError for anything else."""
    if SHAPE.fullmatch(text):
        found = {key.upper(): int(value) for key, value in re.findall(r"([A-Za-z])(\d+)", text)}
        if len(found) == 5:
            return ModelConfig(
                found["L"], found["H"], found["C"], found["T"], found["V"]
            ), 4 if device_type == "cpu" else 8
    if text not in preset_names():
        raise UserError(f"model is {text!r}: it can be {', '.join(preset_names())}, or a shape such as {SMALL}")
    preset = load_preset(text, device_type)
    return preset.model, preset.data.batch_size


def setup_of(args: MfuConfig, where: torch.device, precision: str) -> Setup:
    """``precision``: as it is in force on this device."""
    from bench.steps.turns import Setup

    on_cpu = where.type == "cpu"
    name = args.model or (SMALL if on_cpu else "gpt2-124m")
    config, batch = model(name, where.type)
    accum = args.grad_accum if args.grad_accum is not None else 1 if on_cpu else 4
    if args.batch is not None:
        batch = args.batch
    elif on_cpu:
        batch = 1 if anatomy.n_params(config) > 10**7 else min(batch, 4)
    for flag, value in (("batch", batch), ("seq", args.seq), ("grad-accum", accum), ("steps", args.steps)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}: it must be at least 1")
    if args.seq:
        config = replace(config, block_size=args.seq)
    if on_cpu:  # on a GPU the backend that runs out of memory says so, and the others go on
        asked = Config(model=config, data=DataConfig(batch_size=batch, grad_accum=accum))
        fitting.check_fits(asked, fitting.free_bytes("cpu"), device="cpu")
    if config.vocab_size > 2**16:
        raise UserError(f"vocab_size is {config.vocab_size}: token files hold 16 bits, so it can be at most {2**16}")
    optimizer = load_preset(name, where.type).optim.optimizer if name in preset_names() else "adamw"
    return Setup(name, config, batch, accum, precision, optimizer)


# ---------------------------------------------------------------- measuring


def measure(args: MfuConfig) -> dict[str, Any]:
    """Everything that ends up in mfu.json."""
    # Checked before torch.compile or triton are imported: bad input costs no seconds.
    present = device_module.present() if args.device == "auto" else args.device
    names = backends(args.backends, present, args.precision)
    ours = {"triton"} if present == "cpu" else set(OURS)
    kernels = "triton" if ours & set(names) else "eager"
    where = device_module.pick(args.device, kernels, plain="--backends eager,compile")
    if where.type == "cpu" and "triton+compile" in names:
        raise UserError("backends has 'triton+compile', which needs a CUDA GPU: use triton (interpreted here)")
    precision, notes = in_force(args.precision, where)
    if precision in EXPERIMENTAL and args.backends is None:
        without = [name for name in names if name not in OURS]
        names = [name for name in names if name in OURS]
        notes.append(f"{', '.join(without[:-1])} and {without[-1]} are left out: they do not have {precision}")
    setup = setup_of(args, where, precision)

    from bench.steps import ceilings as ceilings_module
    from bench.steps import elsewhere, profile, turns
    from fastgpt.hardware import cards
    from fastgpt.hardware.environment import environment

    target = cards.card(args.gpu)
    traces = args.trace or args.out
    results.check_writable(args.out)
    results.check_writable(traces, "trace")
    say = _progress()
    say("measuring what this machine reaches")
    ceilings = ceilings_module.measured_ceilings(where)
    timed = [name for name in names if where.type == "cuda" or name != "triton"]
    gpu = cards.present(where)
    config, _ = model(TINY, "cpu")
    tiny = turns.Setup(TINY, config, 2, 1, precision)
    if not timed:
        setup = tiny
        notes.append(
            f"nothing is timed: our kernels need a GPU for that; what they do is shown interpreted, with {TINY}"
        )
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "status": "measured",
        "environment": environment(where),
        "setup": setup.to_json(),
        "notes": notes,
        "ceilings": asdict(ceilings),
        "nominal": None if gpu is None else gpu.to_json(),
        "backends": profile.measure(
            timed,
            setup,
            where,
            ceilings,
            steps=args.steps,
            traces=traces,
            say=say,
            budget_s=60 if where.type == "cuda" else 20,
        ),
        "interpreted": None,
        "projection": None,
        "audit": None,
    }
    if where.type == "cpu" and "triton" in names:
        say("triton: one step of a tiny model in the interpreter")
        try:
            result["interpreted"] = {"setup": tiny.to_json(), **profile.attribution(tiny, traces)}
        except Exception as error:
            result["interpreted"] = {"setup": tiny.to_json(), "error": results.sentence(error)}
    if where.type == "cpu" and not args.no_projection:
        say(f"compiling the kernels of a step for {target.name}")
        result["audit"] = elsewhere.audit(target, precision)
        say(f"projecting a step on {target.name}")
        result["projection"] = elsewhere.projection(args.model, target, precision)
    say("")
    return result


def in_force(asked: str, where: torch.device) -> tuple[str, list[str]]:
    """The precision that is measured, as training would run it, and what there is to say about that."""
    from fastgpt.ops import usable_precision

    precision, refused = usable_precision(asked, where, "triton")
    notes = [] if refused is None else [refused]
    if precision in EXPERIMENTAL:
        notes.append(f"precision {precision} is experimental: no GPU has confirmed it yet")
    return precision, notes


def _progress() -> Callable[[str], None]:
    """Progress on standard error: what is being done, and since when."""
    start = time.perf_counter()
    return lambda text: print(f"[{time.perf_counter() - start:5.1f} s] {text}", file=sys.stderr) if text else None


# ---------------------------------------------------------------- an earlier result


def load(path: Path) -> dict[str, Any]:
    """An mfu.json of an earlier run. Raises UserError if it is something else, damaged, or of another version."""
    result = results.read(path, "bench.mfu", SCHEMA, SCHEMA_VERSION)
    from bench.reports import page

    try:
        page.render(result, {})  # looks at every part that is shown
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = results.sentence(error)
        raise UserError(f"results file {path} is damaged ({what}): measure again with python -m bench.mfu") from error
    return result


if __name__ == "__main__":
    common.run(main)
