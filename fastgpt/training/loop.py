"""The training loop: take the run's folder, build everything, check everything, and only then write the first file.

A step either happens as a whole or leaves no trace: when it is interrupted (a signal, memory that does not suffice), loader
and random states go back to its start. Checkpoints are made between steps, so a resumed run repeats what an undisturbed one
would have done, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastgpt import anatomy, common
from fastgpt.checkpoints import folder, lock, saver
from fastgpt.common import UserError, first_line, is_out_of_memory
from fastgpt.config import Config
from fastgpt.doctor.preflight import announce, preflight
from fastgpt.hardware.environment import environment
from fastgpt.mfu import StepMeter, StepReport
from fastgpt.schedule import learning_rate, muon_momentum
from fastgpt.training import distributed
from fastgpt.training.distributed import World
from fastgpt.training.evaluation import evaluate, load_hellaswag, sample, score_hellaswag
from fastgpt.training.metrics import Metrics, connect_wandb
from fastgpt.training.outlets import Terminal
from fastgpt.training.report import banner, compiling_shown, ending, interval, log_line, progress_bar
from fastgpt.training.run import (
    Run,
    agree,
    build,
    changed_settings,
    choose_geometry,
    find_saved,
    initial_weights,
    restore,
    restore_weights,
    smaller,
    zscore,
)

if TYPE_CHECKING:
    from rich.console import Console

MAX_ROLLBACKS = 3
_SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if sys.platform != "win32":
    _SIGNALS[signal.SIGHUP] = "SIGHUP"  # the terminal was closed, or the connection to it broke


class StopRequest:
    """Ctrl-C, SIGTERM and SIGHUP ask the loop to stop at the next good moment; a second Ctrl-C leaves at once. ``asked`` is
    None or the signal's name. A context manager: it puts the earlier handlers back at its end."""

    def __enter__(self) -> StopRequest:
        self.asked: str | None = None
        self._previous: dict[int, Any] = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        for number, handler in self._previous.items():
            if _SIGNALS[number] == "SIGHUP" and handler is signal.SIG_IGN:  # nohup: the run outlives its terminal
                signal.signal(number, handler)
        return self

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = _SIGNALS[number]
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Abandoned(Exception):
    """The step was given up between two micro-batches: a stop was asked for."""


def train(config: Config, device: torch.device, console: Console | None = None) -> tuple[Run, int]:
    """Train as configured, on all ranks that torchrun started. Returns the run and the exit code: 0, also after SIGTERM and
    SIGHUP (the state is saved, as the sender wanted), or 130 after Ctrl-C, when it is saved as well.

    Raises UserError for what cannot work, for a folder that another process writes in, and when the run cannot go on (its last
    good checkpoint is named). Nothing of an earlier run has been moved then.
    """
    folder.check_free(config.train.out)
    with (
        distributed.connect(device, config.train.rank_timeout) as (world, device),
        lock.held(config.train.out) if world.is_main else nullcontext(),
    ):
        terminal = Terminal(sys.stdout, [])
        if console is None or not world.is_main:
            file = cast(IO[str], terminal)
            console = common.console(file=file, soft_wrap=True, highlight=False, quiet=not world.is_main)
        return _Loop(config, device, world, console, terminal).run()


class _Figures:
    """A step's loss and gradient norm, on their way to the host: copied to pinned memory once the step is done."""

    def __init__(self, loss: Tensor, norm: Tensor) -> None:
        self._host = torch.stack((loss, norm)).to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if loss.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> tuple[float, float]:
        """Wait for that copy, not for the steps launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm = self._host.tolist()
        return loss, norm


class _Loop:
    """One call of ``train``: the run, and what is open while it goes on."""

    def __init__(
        self, config: Config, device: torch.device, world: World, console: Console, terminal: Terminal
    ) -> None:
        """``terminal``: what ``console`` writes to."""
        agree(world, config, device)
        config, weights = initial_weights(config)
        config = choose_geometry(config, device, world)
        self.settings, self.world, self.console, self.terminal = config.train, world, console, terminal
        self.news = terminal.news  # of all the places that the run writes to
        saved = find_saved(config)
        agree(world, config, device, checkpoint=saved.fingerprint if saved else None)
        self.state = build(config, device, world, None if saved else weights)
        if saved is not None:
            restore(self.state, saved)
        else:
            self.state.id = world.gather(self.state.id)[0]
        # Read now: a file that cannot be read must not be found out after three days, nor after an earlier run has been moved.
        self.hellaswag = load_hellaswag(self.settings.hellaswag) if self.settings.hellaswag else None
        self.wandb = connect_wandb(config, self.state.id) if self.settings.wandb and world.is_main else None
        banner(console, self.state)
        if self.settings.doctor and world.is_main:
            announce(preflight(config, device), console)
        if saved is not None:
            for sentence in saved.damaged:
                self.say(sentence)
            changes = changed_settings(saved, config)
            self.say(f"resumed from {saved.path}" + (f", with {'; '.join(changes)}" if changes else ""))
        elif world.is_main and (moved := folder.set_aside(config.train.out)) is not None:
            self.say(f"{config.train.out} held an earlier run: it is now {moved} (--resume would have continued it)")
        self.meter = StepMeter.for_shape(anatomy.Shape.of(config.model), device, self.state.stepper.precision)
        # Steps whose loss and gradient norm have not been read yet, with their records for metrics.jsonl.
        self.pending: list[tuple[dict[str, Any], _Figures]] = []
        self.kept = saved.values.get("metrics") if saved is not None else None
        self.skipped_in_a_row = 0
        self.val_loss: float | None = None  # the newest
        self.rollbacks = 0
        self.spiked = False  # whether the losses read last had a spike

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def run(self) -> tuple[Run, int]:
        run, out = self.state, self.settings.out
        self.metrics: Metrics | None = None
        if self.world.is_main:
            about = environment(run.device) | {"corpus_tokens": run.train_loader.tokens}  # what the doctor asks for
            self.metrics = Metrics(
                out, run.id, run.step, run.config, self.wandb, kept=self.kept, environment=about, news=self.news
            )
        self.progress = progress_bar(self.console, run.step, self.settings.max_iters)
        with (
            closing(self.metrics) if self.metrics else nullcontext(),
            closing(run),
            saver.AsyncSaver(out, self.settings.keep_checkpoints) as self.saver,
            StopRequest() as self.stop,
            self.progress,
            compiling_shown(run, self.console, self.progress),
            self._traced() as self.after_step,
        ):
            self._train()
            self.saver.wait()
            self.saver.check()
            if self.world.any(self.saver.last_error is not None):  # the last save of all: once more, then give up
                self._tell()
                self._save(False)
                self.saver.wait()
            self.terminal.close()
            self._tell()
        self.metrics = None
        self._tell()
        if self.stop.asked:
            self.say(self._farewell())
        if self.saver.last_error:
            raise UserError(self.saver.last_error)
        if self.val_loss is not None and not self.stop.asked and self.world.is_main:  # the last step evaluates
            # Shards are on all ranks, which are not all here.
            text = None if self.world.size > 1 else self._beside_training("the sample", sample, 64)
            for line in ending(run, self.val_loss, text):
                self.say(line)
        return run, 130 if self.stop.asked == "Ctrl-C" else 0

    def _train(self) -> None:
        """Run to the end, or until a stop is asked for on any rank."""
        run, settings = self.state, self.settings
        saved = run.step and (run.step == settings.max_iters or _due(run.step, settings.checkpoint_interval))
        if run.eval_due and self._evaluate() and saved:
            self._save(True)  # as if nothing had cut that evaluation short
        while run.step < settings.max_iters and not self._stopping():
            if not self._step():
                continue
            self.after_step()
            last = run.step == settings.max_iters
            log = last or run.step == 1 or _due(run.step, settings.log_interval)
            evaluation = last or _due(run.step, settings.eval_interval)
            save = last or _due(run.step, settings.checkpoint_interval)
            text = _due(run.step, settings.sample_interval)
            report = self.meter.report() if log else None
            # A step late: while the host waits for the last step's figures, the device already has the next one to do.
            # Whatever else is due needs all of them.
            self._read_losses(0 if log or evaluation or save else 1, report)
            if self.spiked and settings.on_spike == "rollback" and self._roll_back():
                continue
            run.eval_due = evaluation
            is_best = evaluation and self._evaluate()
            if text and (words := self._beside_training("the sample", sample)) is not None:
                self.say(f"sample at step {run.step}: {words!r}")
            # A save that failed is tried again at the next log line.
            if save or (log and self.world.any(self.saver.last_error is not None)):
                self._save(is_best)
            self._tell()
        self._read_losses(0)
        if self.hellaswag is not None and run.step == settings.max_iters and not self._stopping():
            score = self._beside_training("HellaSwag", score_hellaswag, self.hellaswag, self._stopping)
            if score is not None:
                self.say(str(score))
                self._write({"step": run.step, "hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm})
        if self.stop.asked and run.step and run.step < settings.max_iters:
            self._save(False)

    def _traced(self) -> AbstractContextManager[Callable[[], None]]:
        """What to call after a step: --profile's, on rank 0."""
        if not (self.settings.profile and self.world.is_main):
            return nullcontext(lambda: None)
        from fastgpt.training.tracing import traced  # torch's profiler, which takes its time

        return traced(self.settings.out, self.state.device, self.say, self.news)

    def _stopping(self) -> bool:
        """Whether to stop before the next step; ranks agree, so that none waits for one that has left."""
        stop = self.world.any(self.stop.asked is not None)
        if stop and self.stop.asked is None:
            self.stop.asked = "a signal to another rank"
        return stop

    def _step(self) -> bool:
        """One optimizer step. False if it was abandoned, or has to be tried again in smaller micro-batches."""
        run = self.state
        mark = run.mark()
        lr = learning_rate(run.step, run.config.optim, self.settings.max_iters)
        accum = run.begin_step()
        try:
            with self.meter.step(accum * run.micro_batch * run.config.model.block_size):
                momentum = muon_momentum(run.step, run.config.optim)
                loss, norm = run.stepper(self._micro_batches(accum), accum, lr, momentum)
        except _Abandoned:
            run.rewind(mark)
            return False
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error).split(". ")[0]
        else:
            run.step += 1
            self.pending.append(({"step": run.step, "lr": lr}, _Figures(loss, norm)))
            if run.stepper.graphs is not None and run.stepper.graphs.due:
                with self.meter.excluded():
                    self.say(run.stepper.graphs.capture())
            return True
        run.rewind(mark)  # outside the handler: the error's traceback holds the step's tensors
        self._shrink(message)
        return False

    def _micro_batches(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        run = self.state
        for i in range(number):
            # Alone, a rank stops between two micro-batches; several finish the step, to leave it together.
            if i and self.stop.asked and self.world.size == 1:
                raise _Abandoned
            with self.meter.data_wait():
                batch = run.train_loader.next_batch(run.device)
            yield batch

    def _shrink(self, message: str) -> None:
        """Out of memory: go on with smaller micro-batches and more of them."""
        run = self.state
        geometry = smaller(run.micro_batch, run.grad_accum) if self.world.size == 1 else None
        if geometry is None:
            if run.step and self.world.size == 1:  # the state is whole, and it may fit once others have left the GPU
                self._read_losses(0)
                self._save(False)
                self.saver.wait()
            raise UserError(
                f"micro-batches of {run.micro_batch} x {run.config.model.block_size} tokens do not fit the GPU ({message}): "
                "use a smaller --batch-size with a larger --grad-accum, a smaller --block-size or a smaller model; "
                f"{self._last_good()}"
            )
        micro_batch, grad_accum = geometry
        self.say(
            f"out of memory at step {run.step + 1}: micro-batches of {micro_batch} instead of {run.micro_batch}, "
            f"{grad_accum} of them instead of {run.grad_accum}; tokens per step stay {run.config.tokens_per_step:,}"
        )
        run.set_geometry(micro_batch, grad_accum)
        torch.cuda.empty_cache()
        self._write(
            {"event": "out_of_memory", "at_step": run.step, "micro_batch": micro_batch, "grad_accum": grad_accum}
        )

    def _read_losses(self, keep: int, report: StepReport | None = None) -> None:
        """Read, check and record the losses of all steps but the newest ``keep``; the last one's record gets ``report``."""
        run, self.spiked = self.state, False
        while len(self.pending) > keep:
            record, figures = self.pending.pop(0)
            loss, norm = figures.read()
            run.interval_losses.append(loss)
            record |= {"loss": loss, "grad_norm": norm}
            finite = math.isfinite(loss) and math.isfinite(norm)
            self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
            if not finite:
                record["skipped"] = True
                self.say(f"step {record['step']}: loss {loss}, gradient norm {norm}: the step changed nothing")
            if report is not None and not self.pending:
                self.progress.update(self.progress.task_ids[0], completed=record["step"])
                record |= interval(run, report, run.interval_losses, self.progress.tasks[0].time_remaining)
                run.interval_losses.clear()
                self.say(log_line(record, self.settings.verbose))
            self._write(record)
            if finite:
                self._watch_for_spikes(record["step"], loss)
            elif self.skipped_in_a_row >= self.settings.max_skipped:
                self.saver.wait()
                raise UserError(
                    f"{self.skipped_in_a_row} steps in a row, up to {record['step']}, had a loss or gradient that is not "
                    f"finite: lower --lr or use --precision bf16 or fp32; {self._last_good()}"
                )

    def _watch_for_spikes(self, step: int, loss: float) -> None:
        above, least = zscore(self.state.last_losses, loss), self.settings.spike_zscore
        if above is None or not least or above < least:
            return
        self.say(f"spike: the loss of step {step}, {loss:.4f}, is {above:.1f} standard deviations above the last 128")
        self._write({"event": "spike", "at_step": step, "loss": loss, "zscore": above})
        self.spiked = True

    def _roll_back(self) -> bool:
        """Back to the newest checkpoint's weights, on with the data that follow: the batches in between are skipped. False if
        there is no checkpoint yet."""
        run, step = self.state, self.state.step
        self.saver.wait()
        if folder.last_saved(self.settings.out) is None:
            self.say("there is no checkpoint to roll back to yet: the run goes on")
            return False
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS:
            raise UserError(
                f"the run was rolled back {MAX_ROLLBACKS} times and the loss still spikes: lower --lr; {self._last_good()}"
            )
        path, _ = folder.newest_valid(self.settings.out)
        restore_weights(run, path)
        self.pending.clear()
        run.interval_losses.clear()
        self.say(f"rolled back from step {step} to {path}; the batches in between are not seen again")
        self._write({"event": "rollback", "at_step": step, "to_step": run.step})
        return True

    def _evaluate(self) -> bool:
        """Validation loss; whether it is the best so far."""
        run = self.state
        began = time.monotonic()
        loss = self._beside_training("the evaluation", evaluate, self._stopping)
        if loss is None:
            return False
        run.eval_due = False
        is_best = loss < run.best_val_loss
        run.best_val_loss = min(run.best_val_loss, loss)
        self.val_loss = loss
        self.say(f"step {run.step}: val loss {loss:.4f}, best {run.best_val_loss:.4f}")
        self._write({"step": run.step, "val_loss": loss, "eval_seconds": time.monotonic() - began})
        return is_best

    def _beside_training(self, what: str, work: Callable[..., Any], *args: Any) -> Any:
        """``work(run, *args)``. Out of memory: the memory that CUDA graphs hold goes, then batches become smaller, and if not
        even one window fits, the work is left out: None."""
        run, graphs = self.state, self.state.stepper.graphs
        while True:
            try:
                with self.meter.excluded():
                    return work(run, *args)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = first_line(error).split(". ")[0]
            # Outside the handler: the error's traceback holds tensors.
            if self.world.size > 1:  # the others wait for this rank
                raise UserError(
                    f"{what} at step {run.step} does not fit the GPU ({message}): use a smaller --batch-size with a larger "
                    f"--grad-accum; {self._last_good()}"
                )
            torch.cuda.empty_cache()
            if graphs is not None and graphs.active:
                graphs.give_up()
                self.say("CUDA graphs are not used: evaluation does not fit beside them; training goes on without")
            elif (fewer := smaller(run.eval_batch, 1)) is not None and work is not sample:
                self.say(
                    f"out of memory in {what} at step {run.step}: batches of {fewer[0]} instead of {run.eval_batch} there"
                )
                run.eval_batch = fewer[0]
                self._write({"event": "out_of_memory", "at_step": run.step, "eval_batch": run.eval_batch})
            else:
                run.eval_due = False
                self.say(f"out of memory: {what} at step {run.step} is left out ({message}); training goes on")
                self._write({"event": "out_of_memory", "at_step": run.step, "left_out": what})
                return None

    def _save(self, is_best: bool) -> None:
        """Begin a checkpoint of the state as it is now; it is written while training goes on."""
        with self.meter.excluded():
            state = {**self.state.state(), "metrics": self.metrics.size if self.metrics else None}
            self.saver.save(self.state.step, state, is_best=is_best)

    def _tell(self) -> None:
        for sentence in self.saver.news():
            self.say(sentence)
        sentences, self.news[:] = self.news[:], []
        for sentence in sentences:  # in both places: one of them may be what cannot be written
            self.say(sentence)
            self._write({"event": "output", "at_step": self.state.step, "text": sentence})

    def _farewell(self) -> str:
        stopped = f"stopped by {self.stop.asked} at step {self.state.step}"
        if self.state.step == self.settings.max_iters:
            return f"{stopped}, the last one"
        if folder.last_saved(self.settings.out) is None:
            return f"{stopped}, before there was anything to save"
        return f"{stopped}: continue with --resume"

    def _last_good(self) -> str:
        good = folder.last_saved(self.settings.out)
        return f"the last checkpoint is {good}" if good else "there is no checkpoint yet"

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
