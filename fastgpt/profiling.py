"""Where the time of one training step goes: a torch.profiler trace, read back as named operations.

The Chrome trace is the only input, so a trace of another machine or of last week can be read again. Time is split so that
it adds up to the wall time of the step exactly:

* with a GPU, by what the device runs: each kernel counts from where the kernels before it have ended (two at once are not
  counted twice), and time with nothing running is a gap, or data if the host was loading some;
* without one, by the self time of the host's operations; Python and dispatch between them are the gap.

The name of an operation comes from the host operations around it (for a kernel: around its launch), see op_names.py; where
these are ambiguous, from a range that names it (``IS``). Time that no rule can name is listed as unaccounted.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.op_names import COPY, DATA, GAPS, HOST, KERNEL, LAUNCH, STEP, Event, Namer

IS = "fastgpt::is "
"""A range of this name and an operation's, such as "fastgpt::is head dX", makes all that runs inside it that operation."""

_SILENT = re.compile(
    r"^GeneratedBackwardFor_\w+_default$|^GeneratedBackwardFor_fastgpt_linear_gelu_\w+Backward$|^fastgpt::linear_fp8_mlp_fwd$"
)
"""Frames that do not identify an operation: autograd's frames within one of our operations have its name but no shapes, and
the matmuls inside autograd's node of a linear with a GELU, and inside fp8's MLP, have frames of their own."""

_KINDS = {
    "cpu_op": HOST,
    "user_annotation": HOST,
    "cuda_runtime": LAUNCH,
    "cuda_driver": LAUNCH,
    "kernel": KERNEL,
    "gpu_memcpy": COPY,
    "gpu_memset": COPY,
}


@dataclass(frozen=True)
class ProfiledOperation:
    """One operation, summed over a step. ``kernels``: what ran for it, by name, in ms (the host's operations on a CPU)."""

    name: str
    calls: int
    ms: float
    kernels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepProfile:
    """One step: ``operations`` (gaps among them, longest first) and ``unaccounted`` add up to ``wall_ms``."""

    wall_ms: float
    operations: tuple[ProfiledOperation, ...]
    unaccounted: dict[str, float]
    """Time in ms, by the name of the event, that no rule assigns to an operation."""
    launches: int | None
    """Kernels that the device ran; None on a CPU."""
    overlap_ms: float
    """Kernel time that ran beside other kernels, counted once."""

    @property
    def accounted(self) -> float:
        """Share of the wall time that has a name."""
        return sum(op.ms for op in self.operations) / self.wall_ms

    def ms(self, name: str) -> float:
        """Milliseconds of an operation; 0 if it did not run."""
        return sum(op.ms for op in self.operations if op.name == name)


# ---------------------------------------------------------------- reading


def read_trace(path: Path) -> list[Event]:
    """The events of a Chrome trace that torch.profiler has exported (.json, or .json.gz).

    Raises UserError if the file cannot be read or is something else.
    """
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        raw = json.loads(text)["traceEvents"]
        return [_event(e) for e in raw if e.get("ph") == "X" and e.get("cat") in _KINDS]
    except OSError as error:
        raise UserError(f"trace {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"trace {path} is not a Chrome trace of torch.profiler: record it anew") from error


def _event(raw: dict[str, Any]) -> Event:
    args = raw.get("args", {})
    dims = args.get("Input Dims", [])
    return Event(
        name=raw["name"],
        start=float(raw["ts"]),
        end=float(raw["ts"]) + float(raw.get("dur", 0)),
        kind=_KINDS[raw["cat"]],
        thread=raw.get("tid", 0),
        correlation=args.get("correlation"),
        # A list of tensors is one argument whose "shape" is a list of shapes: it identifies no operation.
        dims=tuple(tuple(d) for d in dims if isinstance(d, list) and all(isinstance(n, int) for n in d)),
        external=args.get("External id"),
    )


# ---------------------------------------------------------------- attribution


def attribute(events: Iterable[Event], shape: Shape, rows: int) -> StepProfile:
    """Split the wall time of a profiled step among named operations.

    ``rows``: tokens of a micro-batch, B T. Of several steps in the trace the one of median length is taken.
    Raises ValueError if the trace holds no step (a range named STEP).
    """
    events = list(events)
    steps = sorted((e for e in events if e.name == STEP and e.kind == HOST), key=lambda e: e.end - e.start)
    if not steps:
        raise ValueError(f"the trace holds no range named {STEP}")
    step = steps[len(steps) // 2]
    inside = [e for e in events if e.start < step.end and e.end > step.start and (e.name != STEP or e is step)]
    stacks = _Stacks([e for e in inside if e.kind in (HOST, LAUNCH)])
    device = sorted((e for e in inside if e.kind in (KERNEL, COPY)), key=lambda e: (e.start, e.end))
    tally = _Tally(Namer(shape, rows))
    overlap = 0.0
    if device:
        overlap = _by_device(tally, step, device, stacks)
    else:
        for index, frame in enumerate(stacks.events):
            if frame.thread == step.thread and (stack := stacks.of(index))[0] is step:
                tally.add(stack, stacks.self_time[index])
    return StepProfile(
        wall_ms=(step.end - step.start) / 1e3,
        operations=tally.operations(),
        unaccounted=tally.unaccounted(),
        launches=sum(e.kind == KERNEL for e in device) if device else None,
        overlap_ms=overlap / 1e3,
    )


def _by_device(tally: _Tally, step: Event, device: list[Event], stacks: _Stacks) -> float:
    """Kernels by the stacks that launched them, and the gaps between them. Returns the microseconds of overlap."""
    loading = [e for e in stacks.events if e.name == DATA]
    covered, overlap = step.start, 0.0

    def idle(start: float, end: float) -> None:
        waited = sum(max(0.0, min(end, e.end) - max(start, e.start)) for e in loading)
        tally.add([loading[0]] if waited else [step], min(waited, end - start))
        tally.add([step], end - start - min(waited, end - start))

    for kernel in device:
        start, end = max(kernel.start, step.start), min(kernel.end, step.end)
        if start > covered:
            idle(covered, start)
        own = max(0.0, end - max(start, covered))
        overlap += end - start - own
        tally.add([*stacks.around_launch(kernel), kernel], own)
        covered = max(covered, end)
    if step.end > covered:
        idle(covered, step.end)
    return overlap


class _Stacks:
    """Host events as a forest: which event lies inside which, per thread, and how much time is each one's own."""

    def __init__(self, events: list[Event]):
        self.events = sorted(events, key=lambda e: (e.start, -e.end))
        self.parents: list[int | None] = []
        self.self_time = [e.end - e.start for e in self.events]
        open_frames: dict[int, list[int]] = defaultdict(list)
        for index, event in enumerate(self.events):
            frames = open_frames[event.thread]
            while frames and self.events[frames[-1]].end <= event.start:
                frames.pop()
            parent = frames[-1] if frames else None
            self.parents.append(parent)
            if parent is not None:  # the clock's resolution lets a child end a little after its parent
                self.self_time[parent] -= min(event.end, self.events[parent].end) - event.start
                self.self_time[index] = min(event.end, self.events[parent].end) - event.start
            frames.append(index)

        self._launches = {e.correlation: i for i, e in enumerate(self.events) if e.kind == LAUNCH}
        self._operations = {e.external: i for i, e in enumerate(self.events) if e.kind == HOST}

    def around_launch(self, kernel: Event) -> list[Event]:
        """The frames in which a kernel was launched; none if the trace does not say. Where its launch lies in no operation
        (its thread goes by another number there), the operation that the profiler names instead."""
        launch = self._launches.get(kernel.correlation) if kernel.correlation is not None else None
        stack = [] if launch is None else self.of(launch)
        if len(stack) < 2 and kernel.external is not None and kernel.external in self._operations:
            return self.of(self._operations[kernel.external])
        return stack

    def of(self, index: int) -> list[Event]:
        """The event and everything around it, outermost first."""
        stack = []
        here: int | None = index
        while here is not None:
            stack.append(self.events[here])
            here = self.parents[here]
        return stack[::-1]


class _Tally:
    """Microseconds per operation."""

    def __init__(self, namer: Namer):
        self.namer = namer
        self.time: dict[str, float] = defaultdict(float)
        self.calls: dict[str, set[int]] = defaultdict(set)
        self.kernels: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.unknown: dict[str, float] = defaultdict(float)

    def add(self, stack: Sequence[Event], microseconds: float) -> None:
        stack = [frame for frame in stack if not _SILENT.match(frame.name)] or stack
        said = [frame for frame in stack if frame.name.startswith(IS)]
        if said:  # the innermost; one within another of the same name is no second call
            name: str | None = said[-1].name.removeprefix(IS)
            frame = next(frame for frame in said if frame.name == said[-1].name)
        else:
            name, frame = self.namer(stack)
        if name is None:
            self.unknown[stack[-1].name] += microseconds
            return
        self.time[name] += microseconds
        if name != GAPS:
            self.calls[name].add(id(frame))
            self.kernels[name][stack[-1].name] += microseconds

    def operations(self) -> tuple[ProfiledOperation, ...]:
        return tuple(
            ProfiledOperation(
                name, len(self.calls[name]), us / 1e3, dict(list(_longest_ms(self.kernels[name]).items())[:5])
            )
            for name, us in sorted(self.time.items(), key=lambda item: -item[1])
            if us > 0
        )

    def unaccounted(self) -> dict[str, float]:
        return _longest_ms(self.unknown)


def _longest_ms(microseconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds, the longest first."""
    return {name: us / 1e3 for name, us in sorted(microseconds.items(), key=lambda item: -item[1])}
