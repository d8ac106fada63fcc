"""The training step as CUDA graphs: one launch per micro-batch and one for the update, in place of hundreds.

Three graphs, captured after a step that ran directly: the first micro-batch of a step, whose gradients are new tensors; a
later one, which adds to them; clip and update. They do what ``Stepper`` does, operation for operation, so that a run has the
same bits with and without. Between them lie only copies: tokens into the graphs' own tensors, loss and norm out of them.

What a graph must not know, because it would never learn of a change:

* the learning rate: FusedAdamW reads a table on the device, which ``sync_hyperparameters`` brings up to date;
* where other tensors lie. A graph keeps addresses, so it also holds the tensors, and before each step asks whether
  parameters, moments and working copies are still these; if a checkpoint was loaded or a weight written from
  outside, it is dropped, one step runs directly, and the next graphs are captured;
* the state of the random generator: torch brings it to a captured one before each replay and advances it after, by as
  much as the step run directly would have, so that dropout draws what it would have drawn;
* hooks: Python does not run in a replay, so a model or optimizer that has any runs directly.

The working copies themselves are read by the graphs, not cast anew, since the captured update writes them too. Weights in fp8,
which it does not write, are made by the first micro-batch of a step and read by the later ones.

Before graphs are trusted, micro-batches are run directly and replayed from one state, and must give the same bits. Where they
do not, or a capture fails, one sentence says so and training goes on without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoints.rng import rng_state, set_rng_state
from fastgpt.common import first_line
from fastgpt.kernels import working_copy
from fastgpt.training.step import Stepper

MAX_CAPTURES = 16
"""After that many, something goes on replacing tensors of the step, and capturing costs more than it gains."""

Work = Callable[[], list[Tensor]]
Batch = tuple[Tensor, ...]


class CudaRecorder:
    """Captures on a stream of its own: cuBLAS keeps a workspace per stream, and graphs that others capture and drop on the
    same one would take it along (pytorch#193402)."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def run(self, work: Work) -> list[Tensor]:
        """Run it directly, on the stream that will capture: whatever is made at first use is then there."""
        torch.cuda.empty_cache()  # what is cached is another stream's
        with self._aside():
            return work()

    def pool(self) -> Any:
        """Memory for graphs that are replayed in the order in which they were captured: they may share it."""
        torch.cuda.empty_cache()
        return torch.cuda.graph_pool_handle()

    def record(self, work: Work, pool: Any) -> tuple[list[Tensor], Callable[[], None]]:
        """Capture it: the tensors that it returned, which every replay fills anew, and the replay."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread pins memory meanwhile, which would end a "global" capture, and the loader too.
        captured = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        with self._aside(), captured:
            outputs = work()
        return outputs, graph.replay

    def recover(self) -> None:
        """After a capture that failed."""
        generator = torch.cuda.default_generators[self._stream.device_index]
        with suppress(AttributeError, RuntimeError):
            # A capture that CUDA itself ended leaves the generator believing that it is still captured; a clone does not.
            generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        # torch.cuda.graph leaves its stream current if the end of a capture fails: this puts the right one back.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


class Captured:
    """The graphs of one step and all that they refer to. Raises whatever a capture raises, and RuntimeError where a replay
    gives other bits than the work itself."""

    def __init__(self, stepper: Stepper, recorder: CudaRecorder, batch: Batch, grad_accum: int) -> None:
        self._stepper, self._grad_accum = stepper, grad_accum
        self._batch = tuple(part.clone() for part in batch)
        passes = min(grad_accum, 2)
        before = rng_state()

        expected = [recorder.run(self._micro_step) for _ in range(passes)]
        on_host = [part.cpu() for part in (*(outputs[0] for outputs in expected), *expected[-1][1:])]
        del expected  # the device may have no room for another set of gradients
        stepper.optimizer.zero_grad(set_to_none=True)
        set_rng_state(before)

        pool = recorder.pool()
        # Autocast contexts entered inside keep no casts: one kept from a capture would be the graph's memory.
        no_casts_kept = torch.autocast(batch[0].device.type, enabled=False, cache_enabled=False)
        with no_casts_kept, working_copy.captured_reads() as captures:
            graphs = [recorder.record(self._micro_step, pool) for _ in range(passes)]
            (norm,), self._replay_update = recorder.record(lambda: [stepper.update()], pool)
        self._made = captures.made  # by the first graph, for the second
        self._norm = norm
        self._losses = [outputs[0] for outputs, _ in graphs]
        self._replays = [replay for _, replay in graphs]
        self._gradients = graphs[0][0][1:]
        self._with_gradients = [param for param in stepper.model.parameters() if param.grad is not None]
        self._with_copies = [param for param in self._with_gradients if working_copy.existing(param) is not None]
        stepper.optimizer.zero_grad(set_to_none=True)
        self._held = _outside(stepper)  # or their memory might be given to others while the graphs still write to it
        self.key = _key(stepper, batch, grad_accum)
        if not {copy.data_ptr() for copy in captures.reads} <= {tensor.data_ptr() for tensor in self._held}:
            raise RuntimeError("a working copy is read that the optimizer does not write")

        set_rng_state(before)
        for replay in self._replays:
            replay()
        replayed = [*self._losses, *self._gradients]
        wrong = [i for i, (a, b) in enumerate(zip(replayed, on_host)) if not _same_bits(a, b.to(a.device))]
        if wrong or len(replayed) != len(on_host):
            raise RuntimeError(
                f"a replayed micro-step differs from the same one run directly, in {len(wrong)} of {len(on_host)} tensors"
            )

    def micro_step(self, index: int, batch: Batch) -> Tensor:
        """Forward and backward of a step's micro-batch number ``index``. Returns its share of the step's loss."""
        if _shapes(batch) != _shapes(self._batch):  # of another shape than the step's first
            for param, grad in zip(self._with_gradients, self._gradients):
                param.grad = grad
            return self._stepper.micro_step(batch, self._grad_accum)
        for own, part in zip(self._batch, batch):
            own.copy_(part, non_blocking=True)
        which = min(index, 1)
        self._replays[which]()
        return self._losses[which].clone()

    def update(self) -> Tensor:
        """Clip and optimizer step, with the hyperparameters that the optimizer's groups have now. Returns the norm."""
        self._stepper.optimizer.sync_hyperparameters()  # type: ignore[attr-defined]
        self._replay_update()
        # Things made from a weight (fp8 forms, a graph of autograd) are kept by its version.
        torch.autograd.graph.increment_version(self._with_gradients)
        for param in self._with_copies:
            working_copy.mark_fresh(param)
        return self._norm.clone()

    def _micro_step(self) -> list[Tensor]:
        """Loss, then all gradients."""
        loss = self._stepper.micro_step(self._batch, self._grad_accum)
        return [loss, *(p.grad for p in self._stepper.model.parameters() if p.grad is not None)]


class Graphs:
    """The graphs of a ``Stepper``: when to capture, when to use them, when to drop them.

    The stepper asks ``for_step`` at each step's first micro-batch. Where the answer is None it runs directly and says so with
    ``ran_directly``; graphs are then ``due``, and the caller of the stepper calls ``capture`` between two steps.
    """

    def __init__(self, stepper: Stepper, recorder: CudaRecorder) -> None:
        self._stepper, self._recorder = stepper, recorder
        self._captured: Captured | None = None
        self._last: tuple[Batch, int] | None = None
        self._captures = 0
        self._given_up = False

    @property
    def due(self) -> bool:
        return self._last is not None

    @property
    def active(self) -> bool:
        """Whether there are graphs; the next step uses them if nothing has changed."""
        return self._captured is not None

    def for_step(self, batch: Batch, grad_accum: int) -> Captured | None:
        """The graphs for a step that begins with ``batch``; None to run it directly."""
        captured = self._captured
        if captured is not None and (
            captured.key != _key(self._stepper, batch, grad_accum) or has_hooks(self._stepper)
        ):
            self.drop()
        return self._captured

    def ran_directly(self, batch: Batch, grad_accum: int) -> None:
        """A whole step of such micro-batches ran without graphs: all that is made at first use is there now."""
        if not self._given_up and not has_hooks(self._stepper):
            self._last = batch, grad_accum

    def capture(self) -> str:
        """Capture the step that ran last, if due. Weights, optimizer and random generators are as before afterwards. Returns
        what to tell the user."""
        if self._last is None:
            return ""
        (batch, grad_accum), self._last = self._last, None
        self._captured = None  # its memory goes before more is asked for
        self._captures += 1
        before = rng_state()
        try:
            if self._captures > MAX_CAPTURES:
                raise RuntimeError(f"the step's tensors were replaced {MAX_CAPTURES} times")
            self._captured = Captured(self._stepper, self._recorder, batch, grad_accum)
            reason = ""
        except Exception as error:
            reason = first_line(error).split(". ")[0]
        self._stepper.optimizer.zero_grad(set_to_none=True)
        if reason:  # outside the handler: the error's traceback holds the capture's tensors
            self.give_up()
            if self._stepper.scaler.is_enabled():
                self._stepper.scaler._per_optimizer_states.clear()  # or its next step is one step too many
            self._recorder.recover()
        set_rng_state(before)
        if reason:
            return f"CUDA graphs are not used: {reason}; training goes on without"
        return (
            "CUDA graphs: the steps that follow are replayed (a replayed micro-step gave the bits of one run directly)"
        )

    def drop(self) -> None:
        """Give the graphs and their memory back; after the next step others are due."""
        self._captured = self._last = None

    def give_up(self) -> None:
        """The same for good."""
        self._given_up = True
        self.drop()


def has_hooks(stepper: Stepper) -> bool:
    """Whether Python code would run in the middle of a step: hooks of modules, parameters or the optimizer."""
    hooks = [stepper.optimizer._optimizer_step_pre_hooks, stepper.optimizer._optimizer_step_post_hooks]
    for module in stepper.model.modules():
        hooks += [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    for param in stepper.model.parameters():
        hooks += [param._backward_hooks, param._post_accumulate_grad_hooks]
    return any(hooks)


def _outside(stepper: Stepper) -> list[Tensor]:
    """The tensors that are not the graphs' own, and known to them by address."""
    return [*stepper.model.parameters(), *stepper.optimizer.graph_tensors()]  # type: ignore[attr-defined]


def _key(stepper: Stepper, batch: Batch, grad_accum: int) -> tuple[Any, ...]:
    """What is compiled into graphs, addresses included."""
    addresses = [tensor.data_ptr() for tensor in _outside(stepper)]
    return _shapes(batch), grad_accum, stepper.model.training, stepper.precision, addresses


def _shapes(batch: Batch) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(part.shape, part.dtype, part.device) for part in batch]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]  # NaN is not equal to itself
    return a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))
