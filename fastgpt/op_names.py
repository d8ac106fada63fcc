"""Which operation of a GPT's training step a host operation belongs to, or a kernel that it launched.

The frames around it decide, innermost first: by name, and for a matmul by its shape and by whether autograd's backward
pass is running. That holds for plain PyTorch, for Inductor's kernels (their names list the operations fused into them) and
for our own registered ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.operations import GAPS

STEP, DATA, OPTIMIZER = "fastgpt::step", "fastgpt::data", "fastgpt::optimizer"
"""Ranges that the profiled step has to carry (torch.profiler.record_function)."""

UNTOLD_GEMM = "matmul (not told apart)"

HOST, LAUNCH, KERNEL, COPY = "host", "launch", "kernel", "copy"
"""Kinds of events: the last two are the device's."""


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
    ("attention", re.compile(r"attention|flash|fmha|mem_?eff|scaled_?dot_?product|^aten::(baddbmm|bmm|_?softmax)")),
    ("norms", re.compile(r"layer_?norm|rms_?norm")),
    ("GELU", re.compile(r"gelu")),
    ("embedding", re.compile(r"embedding")),
)
_LOSS = re.compile(r"cross_?entropy|log_?softmax|nll_?loss|logsumexp")
_OPTIMIZER = re.compile(r"^fastgpt::(optimizer$|adamw)|^optimizer\.(step|zero_grad)|_fused_adam|clip_grad")
_GEMM_KERNEL = re.compile(r"gemm|cutlass|nvjet|xmma|triton_tem_fused\w*mm")
_BACKWARD_PASS = "autograd::engine::evaluate_function"


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
