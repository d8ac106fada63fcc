"""Where the time of one training step goes: a torch.profiler trace, read back as named operations.

The Chrome trace is the only input, so a trace of another machine or of last week can be read again. Time is split so that
it adds up to the wall time of the step exactly:

* with a GPU, by what the device runs: each kernel counts from where the kernels before it have ended (two at once are not
  counted twice), and time with nothing running is a gap, or data if the host was loading some;
* without one, by the self time of the host's operations; Python and dispatch between them are the gap.

The name of an operation comes from the host operations around it (for a kernel: around its launch), innermost first: by name,
and for a matmul by its shape and by whether autograd's backward pass is running. That holds for plain PyTorch, for Inductor's
kernels (their names list the operations fused into them) and for our own registered ones. Where these are ambiguous, a range
names it (``IS``). Time that no rule can name is listed as unaccounted.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.performance.operations import GAPS

STEP, DATA, OPTIMIZER = "fastgpt::step", "fastgpt::data", "fastgpt::optimizer"
"""Ranges that the profiled step has to carry (torch.profiler.record_function)."""
IS = "fastgpt::is "
"""A range of this name and an operation's, such as "fastgpt::is head dX", makes all that runs inside it that operation."""

# ---------------------------------------------------------------- reading

HOST, LAUNCH, KERNEL, COPY = "host", "launch", "kernel", "copy"
"""Kinds of events: the last two are the device's."""
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
class Event:
    """One interval of a trace, in microseconds. ``correlation`` ties a kernel to its launch, ``external`` to the innermost
    operation around that."""

    name: str
    start: float
    end: float
    kind: str = HOST
    thread: int = 0
    correlation: int | None = None
    dims: tuple[tuple[int, ...], ...] = ()
    """Shapes of the tensor arguments, where the profiler recorded them."""
    external: int | None = None


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


# ---------------------------------------------------------------- naming

UNTOLD_GEMM = "matmul (unknown which)"

_WRAPPER = re.compile(
    r"autograd::engine|torch-compiled|torchdynamo|aotdispatch|pregraph|compiledfunction|compiledfxgraph|profilerstep|"
    r"^fastgpt::(step|data|optimizer)$|^optimizer\.|backward\d*$|^detach$",
    re.IGNORECASE,
)
"""Frames that run nothing themselves: their own time is Python and dispatch."""

_VIEW = re.compile(
    r"^aten::(_unsafe_|_reshape_)?(view|reshape|t|transpose|as_strided|expand|permute|detach\w*|empty\w*|new_empty\w*|"
    r"resize_|set_|select|slice|split\w*|unbind|u?n?squeeze|narrow|resolve_\w+|alias|result_type|item|is_nonzero|"
    r"_local_scalar_dense|lift_fresh|chunk|flatten|unflatten|contiguous|_has_compatible\w+|view_as|reshape_as)$"
)
"""Bookkeeping of the host: moves no data."""

_POINTWISE = re.compile(
    r"^aten::(native_|_foreach_|_fused_)?(\w*_)?(add|sub|mul|div|copy|to|sum|mean|fill|zero|zeros|zeros_like|ones|ones_like|"
    r"full|full_like|arange|cat|stack|dropout|clone|where|masked_fill|pow|sqrt|rsqrt|reciprocal|neg|clamp\w*|minimum|maximum|"
    r"eq|ne|ge|gt|lt|le|isfinite|abs|bitwise_\w+|logical_\w+|float|rand\w*|bernoulli|slice_backward|select_backward|"
    r"threshold|norm|index\w*|scatter\w*|gather|linalg_vector_norm|_to_copy|scalar_tensor)_?$|^fastgpt::fp8_quantise|"
    r"elementwise_kernel|reduce_kernel|^triton_(poi|red|per)_|_cpp_fused_|^memcpy|^memset|catarray"
)

_RULES = (
    ("rotary", re.compile(r"qk_norm_rope")),
    ("attention", re.compile(r"attention|flash|fmha|mem_?eff|scaled_?dot_?product|^aten::(baddbmm|bmm|_?softmax)")),
    ("norms", re.compile(r"layer_?norm|rms_?norm")),
    ("GELU", re.compile(r"gelu")),
    ("ReLU2", re.compile(r"relu2")),
    ("embedding", re.compile(r"embedding")),
)
_LOSS = re.compile(r"cross_?entropy|log_?softmax|nll_?loss|logsumexp")
_OPTIMIZER = re.compile(r"^fastgpt::(optimizer$|adamw)|^optimizer\.(step|zero_grad)|_fused_adam|clip_grad")
_GEMM_KERNEL = re.compile(r"gemm|cutlass|nvjet|xmma|triton_tem_fused\w*mm")
_BACKWARD_PASS = "autograd::engine::evaluate_function"
_SILENT = re.compile(
    r"^GeneratedBackwardFor_\w+_default$|^GeneratedBackwardFor_fastgpt_linear_gelu_\w+Backward$|^fastgpt::linear_fp8_mlp_fwd$"
)
"""Frames that do not identify an operation: autograd's frames within one of our operations have its name but no shapes, and
the matmuls inside autograd's node of a linear with a GELU, and inside fp8's MLP, have frames of their own."""


class Namer:
    """Names the operation that a stack of frames belongs to, in a model of this shape with ``rows`` = B T tokens."""

    def __init__(self, shape: Shape, rows: int):
        self.rows, self.vocab_size = rows, shape.vocab_size
        self.linears = {linear.name: (linear.n_in, linear.n_out) for linear in anatomy.of(shape).linears}
        """Name -> (in, out)."""

    def __call__(self, stack: Sequence[Event]) -> tuple[str | None, Event]:
        """(operation, the frame that stands for one call of it). ``stack`` is outermost first and not empty.

        GAPS for the host's own overhead; None for an operation that no rule knows, with its own frame.
        """
        for frame in stack:
            if frame.name == DATA:
                return "data", frame
            if _OPTIMIZER.search(frame.name.lower()):
                # Python between the optimizer's operations is a gap like any other.
                return (GAPS if _is_overhead(stack[-1]) else "optimizer"), frame
        backward = any(frame.name.startswith(_BACKWARD_PASS) for frame in stack)
        if any("GraphLaunch" in frame.name for frame in stack):  # a CUDA graph: the stack says nothing any more
            backward = bool(re.search(r"backward|bwd", stack[-1].name))
        found, outermost = None, stack[-1]
        for frame in reversed(stack):
            name = self._strong(frame, backward)
            if name is not None and found in (None, UNTOLD_GEMM, name):
                found, outermost = name, frame  # the operation that launched a kernel named "gemm" says which one it is
        if found is not None:
            return found, outermost
        for frame in reversed(stack):
            if _POINTWISE.search(frame.name.lower()):
                is_logits = any(d[-1] == self.vocab_size and math.prod(d[:-1]) == self.rows for d in frame.dims if d)
                return ("loss" if is_logits else "pointwise"), frame
        return (GAPS if _is_overhead(stack[-1]) else None), stack[-1]

    def _strong(self, frame: Event, backward: bool) -> str | None:
        name = frame.name.lower()
        # Inductor's names end in a hash, which may contain any word; autograd's engine itself only adds up two branches.
        if "compiledfxgraph" in name or name.startswith(_BACKWARD_PASS):
            return None
        gemm = self._gemm(frame, backward)
        if gemm is not None:
            return gemm
        if _LOSS.search(name):
            return "loss"
        if "accumulategrad" in name:
            return "gradient accumulation"
        for operation, pattern in _RULES:
            if pattern.search(name):
                return operation if operation == "embedding" else f"{operation} {_phase(backward)}"
        return UNTOLD_GEMM if _GEMM_KERNEL.search(name) else None

    def _gemm(self, frame: Event, backward: bool) -> str | None:
        """The matmul that a frame is, by its operands; None if it is no matmul."""
        name, dims = frame.name, [d for d in frame.dims if len(d) >= 2]
        if name.startswith("fastgpt::linear") and "cross_entropy" not in name:
            return self._own_linear(name, dims)
        if name in ("aten::linear", "mkldnn::_linear_pointwise", "mkl::_mkl_linear") and len(dims) >= 2:
            (n, k), m = dims[1][-2:], math.prod(dims[0][:-1])
        elif name in ("aten::mm", "aten::matmul", "aten::_scaled_mm") and len(dims) >= 2 and len(dims[1]) == 2:
            m, (k, n) = math.prod(dims[0][:-1]), dims[1]
        elif name in ("aten::addmm", "aten::_addmm_activation") and len(dims) >= 2:
            operands = [d for d in frame.dims[1:3] if len(d) == 2]  # the first is what is added to
            if len(operands) < 2:
                return UNTOLD_GEMM
            (m, k), n = operands[0], operands[1][1]
        elif name.startswith("triton_tem_fused"):
            return self._template(dims, backward)
        else:
            return None
        return self._role(m, k, n, backward) or UNTOLD_GEMM

    def _template(self, dims: list[tuple[int, ...]], backward: bool) -> str | None:
        """Inductor's own GEMM, whose arguments come in any order."""
        flat = {(math.prod(d[:-1]), d[-1]) for d in dims}
        roles = {self._role(m, k, n, backward) for m, k in flat for k2, n in flat if k == k2 and (m, n) in flat} - {
            None
        }
        return roles.pop() if len(roles) == 1 else None

    def _own_linear(self, name: str, dims: list[tuple[int, ...]]) -> str | None:
        """A fused linear of ours, recognised by the shape of its weight (out, in). One op may form both gradients."""
        role = "forward"
        if re.search(r"bwd|backward|grad", name):
            role = "dW" if re.search(r"weight|dw", name) else "dX" if re.search(r"input|dx", name) else "dX + dW"
        found = [lin for lin, (k, n) in self.linears.items() if (n, k) in dims]
        return f"{found[0]} {role}" if len(found) == 1 else UNTOLD_GEMM

    def _role(self, m: int, k: int, n: int, backward: bool) -> str | None:
        """The name of the model's matmul that is (m, k) x (k, n) or its transpose; None unless exactly one fits."""
        found: list[tuple[str, str]] = []
        for name, (K, N) in self.linears.items():
            any_rows = name == "head"  # the loss takes its tokens in chunks
            if (m, n) == (N, K) and (k == self.rows or any_rows):  # PyTorch forms dW as (out, in): dy^T x
                found.append((name, "dW"))
            for a, b in {(m, n), (n, m)}:
                if a != self.rows and not any_rows:
                    continue
                found += [(name, "forward")] if (k, b) == (K, N) else []
                found += [(name, "dX")] if (k, b) == (N, K) else []
        if len(found) > 1:
            found = [f for f in found if (f[1] != "forward") == backward]
        if len(found) > 1:
            found = [f for f in found if f[0] != "head"]
        return f"{found[0][0]} {found[0][1]}" if len(found) == 1 else None


def _phase(backward: bool) -> str:
    return "backward" if backward else "forward"


def _is_overhead(frame: Event) -> bool:
    """Whether a frame's own time is the host's, with nothing of the step being computed."""
    if frame.kind != HOST:
        return frame.kind == LAUNCH
    return bool(_WRAPPER.search(frame.name) or _VIEW.search(frame.name))


# ---------------------------------------------------------------- attribution


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
    device_ms: float | None = None
    """Time in which the device ran something; None on a CPU."""

    @property
    def accounted(self) -> float:
        """Share of the wall time that has a name."""
        return sum(op.ms for op in self.operations) / self.wall_ms

    def ms(self, name: str) -> float:
        """Milliseconds of an operation; 0 if it did not run."""
        return sum(op.ms for op in self.operations if op.name == name)


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
    busy = overlap = 0.0
    if device:
        busy, overlap = _by_device(tally, step, device, stacks)
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
        device_ms=busy / 1e3 if device else None,
    )


def _by_device(tally: _Tally, step: Event, device: list[Event], stacks: _Stacks) -> tuple[float, float]:
    """Kernels by the stacks that launched them, and the gaps between them. Returns the microseconds in which anything ran, and
    those of overlap."""
    loading = [e for e in stacks.events if e.name == DATA]
    covered, busy, overlap = step.start, 0.0, 0.0

    def idle(start: float, end: float) -> None:
        waited = sum(max(0.0, min(end, e.end) - max(start, e.start)) for e in loading)
        tally.add([loading[0]] if waited else [step], min(waited, end - start))
        tally.add([step], end - start - min(waited, end - start))

    for kernel in device:
        start, end = max(kernel.start, step.start), min(kernel.end, step.end)
        if start > covered:
            idle(covered, start)
        own = max(0.0, end - max(start, covered))
        busy, overlap = busy + own, overlap + end - start - own
        tally.add([*stacks.around_launch(kernel), kernel], own)
        covered = max(covered, end)
    if step.end > covered:
        idle(covered, step.end)
    return busy, overlap


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
