"""Training steps in turns: each way to run the step is set up once and checked by its first loss, then all are timed by turns.

Clocks drift while a benchmark runs (bench/reports/timing.py), so what is compared takes turns. Five ways to train GPT-2 124M
would hold 13 to 16 GB of a 12 GB card: unless all fit side by side, only the one whose turn it is has its weights and moments
on the device; the others' are parked in the host's memory. Storages are emptied and filled in place, so that every tensor, view
and compiled graph that refers to them stays valid; what goes by address (the optimizer's tables, CUDA graphs) looks at
addresses before each step. On a GPU a turn begins with a step that is not timed.

Steps are timed by the host's clock with the device synchronised: launch overhead and waiting count, as in training.
"""

from __future__ import annotations

import gc
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from bench.reports import timing
from bench.reports.results import sentence
from bench.steps import build
from bench.steps.trace import DATA
from bench.steps.variants import PLAIN_STEPS, VARIANTS, StepVariant
from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.common import is_out_of_memory
from fastgpt.config import PLAIN, Config, ModelConfig, OptimConfig
from fastgpt.data.loader import TokenLoader
from fastgpt.kernels import working_copy
from fastgpt.ops import autocast
from fastgpt.training.step import Stepper

TURNS = 4
"""Turns that each way gets, of as many steps as it takes."""
LOSS_TOLERANCE = {"fp32": 1e-3}
"""Where it is not build.LOSS_TOLERANCE: the largest difference between a first loss and plain PyTorch's."""
NOT_REACHED = "not reached: the time was up"


@dataclass(frozen=True)
class Setup:
    """What is measured: model, batch geometry, precision, optimizer."""

    model: str
    config: ModelConfig
    batch_size: int
    grad_accum: int
    precision: str
    optimizer: str = "adamw"
    """Or "muon", as the presets of the modern recipe have it."""

    @property
    def shape(self) -> Shape:
        return Shape.of(self.config)

    @property
    def seq(self) -> int:
        return self.config.block_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq * self.grad_accum

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "shape": asdict(self.shape),
            "parameters": anatomy.n_params(self.shape, positions=False),
            "batch_size": self.batch_size,
            "seq": self.seq,
            "grad_accum": self.grad_accum,
            "tokens_per_step": self.tokens_per_step,
            "precision": self.precision,
            "optimizer": self.optimizer,
        }


class Runner:
    """``runner()`` is one optimizer step, loading included, until the device has done it; returns its loss.

    ``stepper``: where it is not the variant's own; ``conditions``: what has to hold around its steps.
    """

    def __init__(
        self,
        variant: StepVariant,
        setup: Setup,
        device: torch.device,
        tokens: Path,
        *,
        stepper: Stepper | None = None,
        conditions: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.setup, self.device, self.conditions = setup, device, conditions
        self.kernels, self.compiled = variant.kernels, variant.compile != "none"
        config = Config(model=setup.config, optim=OptimConfig(setup.optimizer))  # type: ignore[arg-type]
        self.stepper = stepper or build.of_variant(variant, config, device, setup.precision)
        self.loader = TokenLoader([tokens], setup.seq, setup.batch_size)

    def __call__(self) -> float:
        loss = self.stepper(self.batches(), self.setup.grad_accum, 1e-4)[0]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return float(loss)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.setup.grad_accum):
            with record_function(DATA):
                x, y = self.loader.next_batch(self.device)
            yield x, y

    def settle(self) -> None:
        """One step, in which whatever is made at first use is made, and its CUDA graphs. Raises RuntimeError where there are
        none, as what follows would be timed under a wrong name."""
        self()
        graphs = self.stepper.graphs
        if graphs is not None and not graphs.active:
            told = graphs.capture()
            if not graphs.active:
                raise RuntimeError(told)
            self()

    def storages(self) -> list[torch.UntypedStorage]:
        """What it keeps between steps: weights and the optimizer's state."""
        states = (state.values() for state in self.stepper.optimizer.state.values())
        model = self.stepper.model
        kept = [*model.parameters(), *model.buffers(), *(value for state in states for value in state)]
        found = [tensor.untyped_storage() for tensor in kept if isinstance(tensor, Tensor)]
        return list(
            {storage.data_ptr(): storage for storage in found if storage.device.type == self.device.type}.values()
        )


@contextmanager
def random_tokens(setup: Setup) -> Iterator[Path]:
    """A file of random tokens, as nanoGPT writes them: the real loader reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        count = max(64 * setup.batch_size, 256) * setup.seq + 1
        np.random.default_rng(0).integers(setup.config.vocab_size, size=count).astype(np.uint16).tofile(path)
        yield path


def plain_loss(setup: Setup, device: torch.device, tokens: Path) -> float:
    """The first loss of plain PyTorch, in the 16 bits that an experimental mode is made of: same weights, same tokens."""
    plain = replace(setup, precision=PLAIN.get(setup.precision, setup.precision))
    runner = Runner(VARIANTS["eager"], plain, device, tokens)
    model, total = runner.stepper.model, 0.0
    with torch.no_grad(), autocast(device, plain.precision):
        for x, y in runner.batches():
            for i in range(len(x)):  # whole logits of one sequence at a time: ours need no room for more
                total += float(model(x[i : i + 1], y[i : i + 1])[1])
    return total / (setup.grad_accum * setup.batch_size)


class Turns:
    """Runners by name, and what is known of each: figures, or an ``error``.

    A first Ctrl-C ends what is being set up or timed, and what is ready by then counts: bench.gpu's way to end a stage.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None] = lambda text: None):
        self.device, self.say = device, say
        self.runners: dict[str, Runner] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.stopped = False
        self.parks = device.type == "cuda"
        self._crowded = True
        self._away: dict[str, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = {}

    def start(self, name: str, make: Callable[[], Runner]) -> None:
        """Set up a runner and run it warm: its first loss, how long its first steps took, its memory."""
        if self.stopped:
            self.results[name] = {"error": NOT_REACHED}
            return
        self.say(f"{name}: first steps")
        self._crowded = True  # for all that is known
        for other in self.runners:
            self._park(other)
        try:
            runner, self.results[name] = self._started(make)
        except KeyboardInterrupt:
            self.stopped, self.results[name] = True, {"error": NOT_REACHED}
        except Exception as error:  # no compiler, no memory, an operation that it lacks
            self.results[name] = {"error": sentence(error)} | ({"oom": True} if is_out_of_memory(error) else {})
        else:
            self.runners[name] = runner
            self._park(name)
            return
        self._give_back()  # outside the handlers: an error's traceback holds tensors

    def _started(self, make: Callable[[], Runner]) -> tuple[Runner, dict[str, Any]]:
        start, (allocated, reserved) = time.perf_counter(), self._memory()
        runner = make()
        with runner.conditions():
            loss = runner()
            runner.settle()
            seconds = time.perf_counter() - start
            extra = timing.peak_memory(runner, self.device)  # None on a CPU
        now = self._memory()
        memory: dict[str, Any] = {"peak_memory": None}
        if extra is not None:
            kept = now[0] - allocated
            memory = {"kept_memory": kept, "peak_memory": kept + extra, "reserved_memory": now[1] - reserved}
        return runner, {"first_loss": loss, "start_s": seconds, **memory}

    def check(self, tokens: Path) -> None:
        """Withhold the speed of every runner whose first loss is not plain PyTorch's: of one that ran, or computed for it."""
        if not self.runners:
            return
        plain = [name for name in PLAIN_STEPS if name in self.runners]
        setup = self.runners[plain[0] if plain else next(iter(self.runners))].setup
        if plain:
            expected, whose = self.results[plain[0]]["first_loss"], f"{plain[0]}'s"
        else:
            self.say("eager: the loss to compare with")
            expected, whose = plain_loss(setup, self.device, tokens), "eager's"
        tolerance = LOSS_TOLERANCE.get(setup.precision, build.LOSS_TOLERANCE)
        for name in list(self.runners):
            if reason := build.wrong_loss(self.results[name]["first_loss"], expected, whose, tolerance):
                self.release(name)
                self.results[name] = {"error": reason}

    def time(self, steps: int, budget_s: float | None = None, names: Iterable[str] | None = None) -> None:
        """Time about ``steps`` steps of each runner, or of these: ``ms``, ``iqr_ms``, ``runs``, ``skipped_steps``."""
        chosen = {name: self.runners[name] for name in (self.runners if names is None else names)}
        if not chosen:
            return
        self.say(f"timing {', '.join(chosen)} in turns")
        if self.parks and self.device.type == "cuda":
            kept, peak = ([self.results[name][key] for name in self.runners] for key in ("kept_memory", "peak_memory"))
            extra = max(most - least for most, least in zip(peak, kept))
            self._crowded = sum(kept) + extra > 0.8 * torch.cuda.get_device_properties(self.device).total_memory
        skipped = {name: runner.stepper.skipped_steps() for name, runner in chosen.items()}
        each = -(-steps // TURNS)
        with self._interrupt_stops():
            # With the CPU's timer: what counts is the host's clock around a whole step, synchronised at its end.
            times = timing.interleave(
                chosen, torch.device("cpu"), rounds=-(-steps // each), warmup=0, cold=False, budget_s=budget_s,
                each=each, turn=self.turn, stop=lambda: self.stopped,
            )  # fmt: skip
        for name, found in times.items():
            self.results[name] |= {"ms": found.median_ms, "iqr_ms": found.iqr_ms, "runs": found.runs}
            self.results[name]["skipped_steps"] = chosen[name].stepper.skipped_steps() - skipped[name]

    @contextmanager
    def turn(self, name: str) -> Iterator[Runner]:
        """The runner, its state on the device, and warm."""
        runner = self.runners[name]
        with runner.conditions():
            self._fetch(name)
            try:
                if self.parks:
                    runner.settle()
                yield runner
            finally:
                self._park(name)

    def release(self, name: str) -> None:
        """Give a runner's memory back."""
        self._away.pop(name, None)
        self.runners.pop(name, None)
        self._give_back()

    def _park(self, name: str) -> None:
        if not (self.parks and self._crowded) or name in self._away:
            return
        stepper = self.runners[name].stepper
        stepper.optimizer.zero_grad(set_to_none=True)  # of a step that was not finished
        if stepper.graphs is not None:
            stepper.graphs.drop()
        for param in stepper.model.parameters():
            working_copy.forget(param)
        self._away[name] = []
        for storage in self.runners[name].storages():
            host = torch.UntypedStorage(storage.nbytes())
            host.copy_(storage, non_blocking=False)
            storage.resize_(0)
            self._away[name].append((storage, host))
        self._give_back()

    def _fetch(self, name: str) -> None:
        for storage, host in self._away.pop(name, ()):
            storage.resize_(host.nbytes())
            storage.copy_(host, non_blocking=False)

    @contextmanager
    def _interrupt_stops(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _memory(self) -> tuple[int, int]:
        """Bytes allocated and reserved."""
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)

    def _give_back(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
