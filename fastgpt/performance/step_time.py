"""The model behind a projection: how long each operation of a training step takes on a GPU that is not here.

Each operation of performance/operations.py takes the longest of three times, and kernels of one stream run one after the
other, with a gap between them:

    compute   matrix products: waves of tiles on the SMs, each tile its FLOPs at the tensor cores' rate plus what starts
              and ends it; attention: FLOPs at that rate, plus the part of the softmax that does not overlap with them
    L2        what the tiles read, or all bytes of a pass, through the L2 cache
    memory    bytes over the bandwidth that copies reach; reads of what the kernel before has written cost no memory
              time for the share of them that L2 still holds

Every number that is not counted is a field of ``Constants``. One is fitted, the clock of a GeForce card under its power
limit, on one real run; the other run, and public figures of other cards, judge the model (fastgpt/performance/projection.py).
docs/projection.md has the sources, the sensitivity and the errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.flops import cdiv
from fastgpt.performance.operations import AS_SHIPPED, GAPS, Fusions, Operation, operations


def _constant(values: tuple[float, float, float], meaning: str, source: str) -> Any:
    """A field of Constants: (low, central, high), the outer two its plausible range; what it is; where it comes from."""
    low, central, high = values
    return field(default=central, metadata={"low": low, "high": high, "meaning": meaning, "source": source})


@dataclass(frozen=True)
class Constants:
    """Change only with a reason; old and new figures go to docs/projection.md."""

    clock: float = _constant(
        (1.0343, 1.1378, 1.1378),
        "GeForce: SM clock that the power limit leaves in training, over the nominal boost clock",
        "fitted on the 124M run (projection.fit; low: on the 40M run); it stands for whatever else speeds up all of a step: "
        "a review saw RTX 4070s at 2.7 GHz, 1.09 (Tom's Hardware)",
    )
    clock_full_rate: float = _constant(
        (0.80, 1.0, 1.0),
        "data-centre and workstation cards: the same",
        "nominal; an A100 stays at its 1410 MHz, an H100 PCIe fell to 80% (Chips and Cheese, July 2023)",
    )
    memory_efficiency: float = _constant(
        (0.85, 0.91, 0.94),
        "bandwidth that streaming kernels reach, over nominal; fixed, as clock and this cannot both be fitted",
        "918-924 of 1,008 GB/s, RTX 4090 (tinygrad/open-gpu-kernel-modules#6; clpeak#106)",
    )
    gemm_efficiency: float = _constant(
        (0.90, 0.94, 0.97),
        "GeForce: rate of a matmul's inner loop over the tensor cores' rate at the clock it runs at",
        "72.5 TFLOP/s of cuBLAS bf16, RTX 4070 SUPER (zzc0721/torch-performance-test-data#196): 1.02 of nominal, "
        "0.94 at the 2.7 GHz that Ada boards hold",
    )
    gemm_efficiency_full_rate: float = _constant(
        (0.70, 0.83, 0.90),
        "the same where tensor cores run at full rate",
        "258 of 312 TFLOP/s, A100, 8192^3 (H. He, Strangely, Matrix Multiplications on GPUs Run Faster)",
    )
    double_rate: float = _constant(
        (1.71, 1.79, 1.87),
        "measured speed of nominally doubled arithmetic (fp16 accumulation on GeForce, fp8) over bf16; never 2.0",
        "31.0 to 53.1 TFLOP/s, RTX 4060 (triton#10851): 1.71; 47.0 to 87.9, RTX 5060 Ti (public roofline): 1.87",
    )
    l2_bytes_per_clock: float = _constant(
        (11.0, 13.0, 16.0),
        "GeForce: bytes per clock that L2 gives one SM while all ask",
        "assumed between 11 (3.6 TB/s quoted for an RTX 4090; also what 256x128 tiles need for 1.87 times the rate) and "
        "16 (what 128x128 tiles would need for 2.0 times)",
    )
    l2_bytes_per_clock_full_rate: float = _constant(
        (30.0, 38.8, 47.4),
        "the same for data-centre and workstation cards",
        "5,120 bytes per clock over 132 SMs, H100 (A100: over 108 SMs, 47.4); 8,986 and 7,219 GB/s in Ultrasonics "
        "Sonochemistry 99 (2023) 106546, table 3",
    )
    l2_share: float = _constant(
        (0.25, 0.5, 0.75),
        "share of L2 in which a kernel still finds what the one before it wrote",
        "assumed: that kernel's own reads and writes take the rest",
    )
    tile_overhead_clocks: float = _constant(
        (600.0, 1100.0, 2500.0),
        "what starts and ends a tile of a matmul: first loads, last stores",
        "assumed: one memory latency (some 550 clocks) and 32 KB at an SM's 64 bytes per clock (512)",
    )
    own_kernels: float = _constant(
        (0.9, 1.0, 1.3),
        "time of this repository's kernels over what the model says of a library's",
        "assumed, as none was timed on a GPU; Liger-Kernel's layer norm backward, also in Triton, takes 2 times PyTorch's",
    )
    softmax_exposed: float = _constant(
        (0.0, 0.5, 1.0),
        "share of attention's softmax that the tensor cores wait for",
        "assumed: from complete overlap (0) to none (1)",
    )
    kernel_gap_us: float = _constant(
        (0.5, 1.0, 3.0),
        "microseconds between two kernels of one stream, also with the queue full",
        "assumed",
    )
    host_launch_us: float = _constant(
        (5.0, 10.0, 20.0),
        "microseconds of host time per launch; hidden as long as the GPU is the slower of the two",
        "assumed; 5 to 20 in public accounts of PyTorch's launch overhead",
    )

    @classmethod
    def ranges(cls) -> dict[str, tuple[float, float]]:
        """The fixed constants: name -> (low, high)."""
        return {f.name: (f.metadata["low"], f.metadata["high"]) for f in fields(cls) if f.name != "clock"}


CONSTANTS = Constants()


TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
OWN_TILES = ((128, 128), (128, 64))
"""Tiles of this repository's 16-bit matmuls with a GELU or with sums in fp16: larger ones spill (docs/performance.md)."""
SPLITS = (1, 2, 3, 4, 5, 6, 8)
EXPONENTIALS_PER_CLOCK = 16  # per SM, compute capability 8.x and 9.0: CUDA C++ Programming Guide, arithmetic throughput
FP32_PER_CLOCK = {"sm_80": 64, "sm_75": 64, "sm_70": 64}  # idem; 128 elsewhere


@dataclass(frozen=True)
class Chip:
    """A GPU as the model sees it, at one precision."""

    gpu: Gpu
    precision: str
    constants: Constants

    def __post_init__(self) -> None:
        for arithmetic in (self._base, cards.arithmetic_of(self.precision)):
            if self.gpu.peak_flops(arithmetic) is None:
                other = "fp16" if self.precision == "bf16" else "bf16"
                raise UserError(
                    f"precision is {self.precision!r}: {self.gpu.name} has no {arithmetic} arithmetic, so use {other}"
                )

    @property
    def _base(self) -> str:
        return "bf16" if self.precision == "bf16" else "fp16"

    @property
    def hz(self) -> float:
        clock = self.constants.clock_full_rate if self.gpu.full_rate else self.constants.clock
        return self.gpu.boost_mhz * 1e6 * clock

    @property
    def bandwidth(self) -> float:
        return self.gpu.memory_gbs * 1e9 * self.constants.memory_efficiency

    @property
    def l2_per_clock(self) -> float:
        c = self.constants
        return c.l2_bytes_per_clock_full_rate if self.gpu.full_rate else c.l2_bytes_per_clock

    def flops_per_clock(self, arithmetic: str) -> float:
        """Per SM, as an inner loop reaches it."""
        peak = self.gpu.peak_flops(arithmetic)
        assert peak is not None
        c = self.constants
        efficiency = c.gemm_efficiency_full_rate if self.gpu.full_rate else c.gemm_efficiency
        return efficiency * peak / (self.gpu.sm_count * self.gpu.boost_mhz * 1e6)

    def matmul_per_clock(self) -> float:
        """The rate of the linears. Arithmetic that is nominally faster gets the measured ratio instead."""
        base = self.flops_per_clock(self._base)
        faster = self.flops_per_clock(cards.arithmetic_of(self.precision)) > 1.01 * base
        return base * self.constants.double_rate if faster else base

    def times(self, op: Operation) -> dict[str, float]:
        """Seconds that one execution would take if only compute, L2 or memory limited it."""
        factor = self.constants.own_kernels if op.own else 1.0
        return {limit: factor * seconds for limit, seconds in self._limits(op).items()}

    def _limits(self, op: Operation) -> dict[str, float]:
        held = min(1.0, self.constants.l2_share * self.gpu.l2_mb * 2**20 / op.fresh) if op.fresh else 0.0
        memory = (op.bytes - held * op.fresh) / self.bandwidth
        if op.kind == "matmul":
            compute, l2, added = self._matmul(op)
            return {"compute": compute + added, "L2": l2 + added, "memory": memory + added}
        through_l2 = op.bytes / (self.l2_per_clock * self.gpu.sm_count * self.hz)
        if op.kind == "memory":
            return {"L2": through_l2, "memory": memory}
        plain = op.instructions / FP32_PER_CLOCK.get(self.gpu.arch, 128)
        softmax = op.scores * (1 / EXPONENTIALS_PER_CLOCK + plain) * self.constants.softmax_exposed
        base = self.flops_per_clock(self._base)
        faster = self.matmul_per_clock() / base if op.summed_in_fp16 else 1.0
        clocks = op.flops * (1 - op.summed_in_fp16 + op.summed_in_fp16 / faster) / base + softmax
        return {"compute": clocks / (self.gpu.sm_count * self.hz), "L2": through_l2, "memory": memory}

    def _matmul(self, op: Operation) -> tuple[float, float, float]:
        """Seconds of compute and of L2, and of adding up the parts of a split k, for the quickest tile and split: what a
        library's choice comes close to. A split helps where there are fewer tiles than SMs to fill."""
        assert op.mnk is not None
        m, n, k = op.mnk
        per_clock = self.matmul_per_clock() if op.fast else self.flops_per_clock(self._base)
        size = 1 if self.precision == "fp8" and op.fast else 2
        best = (float("inf"), float("inf"), float("inf"))
        for tile_m, tile_n in OWN_TILES if op.own and self.precision != "fp8" else TILES:
            tiles = cdiv(m, tile_m) * cdiv(n, tile_n)
            # Hopper's clusters: two SMs share the larger side of their tiles.
            side = tile_m + tile_n - (max(tile_m, tile_n) / 2 if self.gpu.arch == "sm_90" else 0)
            for split in SPLITS if tiles < 4 * self.gpu.sm_count else (1,):
                waves, depth = cdiv(tiles * split, self.gpu.sm_count), cdiv(k, split)
                compute = waves * (2 * tile_m * tile_n * depth / per_clock + self.constants.tile_overhead_clocks)
                l2 = waves * (side * depth * size / self.l2_per_clock + self.constants.tile_overhead_clocks)
                added = 8 * split * m * n / self.bandwidth if split > 1 else 0.0  # fp32 parts, written and read
                found = (compute / self.hz, l2 / self.hz, added)
                if max(found[:2]) + added < max(best[:2]) + best[2]:
                    best = found
        return best


@dataclass(frozen=True)
class OperationTime:
    """All executions of one operation in a step. ``bound``: compute, L2, memory, or launch for the gaps."""

    name: str
    group: str
    ms: float
    flops: int
    bytes: int
    launches: int
    bound: str


def step_times(
    ops: Iterable[Operation], grad_accum: int, gpu: Gpu, precision: str, constants: Constants, *, graphs: bool = False
) -> list[OperationTime]:
    """Every operation's time in a step, then the gaps, then what the GPU waits for the host; their sum is the step.
    ``graphs``: the step is a CUDA graph, so that the host is out of the way; the gaps stay.

    Operations of one name (the loss's chunks, and the shorter last one) are one; the slower says what bounds them."""
    chip = Chip(gpu, precision, constants)
    parts: dict[str, list[OperationTime]] = {}
    for op in ops:
        executions = op.executions(grad_accum)
        if not executions:
            continue
        times = chip.times(op)
        bound = max(times, key=lambda name: times[name])
        work = (op.flops * executions, op.bytes * executions, op.launches * executions)
        part = OperationTime(op.name, op.group, 1e3 * executions * times[bound], *work, bound)
        parts.setdefault(op.name, []).append(part)
    found = [_together(same) for same in parts.values()]
    launches = sum(op.launches for op in found)
    gaps = 1e-3 * constants.kernel_gap_us * launches
    waiting = 1e-3 * constants.host_launch_us * launches - gaps - sum(op.ms for op in found)
    found.append(OperationTime("gaps between kernels", GAPS, gaps, 0, 0, 0, "launch"))
    if waiting > 0 and not graphs:
        found.append(OperationTime("waiting for the host", GAPS, waiting, 0, 0, 0, "launch"))
    return found


def _together(parts: list[OperationTime]) -> OperationTime:
    longest = max(parts, key=lambda part: part.ms)
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("ms", "flops", "bytes", "launches")}
    return replace(longest, **sums)


@lru_cache(maxsize=1024)
def step_ms(
    shape: Shape,
    gpu: Gpu,
    kernels: str,
    precision: str,
    micro_batch: int,
    grad_accum: int,
    T: int,
    dropout: float,
    constants: Constants,
    fusions: Fusions = AS_SHIPPED,
    graphs: bool = False,
) -> float:
    """Milliseconds of one step: the sum of ``step_times``."""
    ops = operations(shape, kernels, micro_batch, T, precision, dropout=dropout, sm_count=gpu.sm_count, fusions=fusions)
    return sum(op.ms for op in step_times(ops, grad_accum, gpu, precision, constants, graphs=graphs))
