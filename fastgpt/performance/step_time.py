"""The model behind a projection: how long each operation of a training step takes on a GPU that is not here.

Each operation of performance/operations.py takes the longest of three times, and kernels of one stream run one after the
other, with a gap between them:

    compute   matrix products: waves of tiles on the SMs, each tile its FLOPs at the tensor cores' rate plus what starts
              and ends it; attention: FLOPs at that rate, plus the part of the softmax and of shared memory's traffic that
              does not overlap with them, and the uneven end of a causal grid
    L2        what the tiles read, or all bytes of a pass, through the L2 cache
    memory    bytes over the bandwidth that copies reach; reads of what the kernel before has written cost no memory
              time for the share of them that L2 still holds

Every number that is not counted is in constants.toml. One is fitted on a training step, the clock of an RTX 4070 under its
power limit, on one real run; the other run, and public figures of other cards, judge the model
(fastgpt/performance/projection.py).
docs/projection.md has the sources, the sensitivity and the errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapreplace
from typing import Any

from fastgpt.anatomy import Shape
from fastgpt.common import UserError, packaged_toml
from fastgpt.hardware import cards
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.flops import cdiv
from fastgpt.performance.operation import Operation
from fastgpt.performance.operations import GAPS, operations

DESCRIBED: dict[str, dict[str, Any]] = packaged_toml("fastgpt.performance", "constants.toml")
"""Constant -> what constants.toml says of it: value, range, meaning, source and fitted clocks."""


@dataclass(frozen=True)
class Constants:
    """What is not counted: constants.toml has the meaning of each, its plausible range and its source."""

    clock: float
    clock_exponent: float
    clock_full_rate: float
    memory_efficiency: float
    memory_efficiency_hbm: float
    gemm_efficiency: float
    gemm_efficiency_full_rate: float
    gemm_efficiency_hopper: float
    mma_sync_hopper: float
    double_rate: float
    l2_bytes_per_clock: float
    l2_bytes_per_clock_full_rate: float
    l2_share: float
    tile_overhead_clocks: float
    own_kernels: float
    exposed_forward: float
    exposed_backward: float
    kernel_gap_us: float
    host_launch_us: float
    host_own_launch_us: float


CONSTANTS = Constants(**{name: about["value"] for name, about in DESCRIBED.items()})
RANGES = {name: (about["low"], about["high"]) for name, about in DESCRIBED.items() if name != "clock"}
"""Low and high of each constant that is fixed; the clock is fitted."""


TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
OWN_TILES = ((128, 128), (128, 64))
"""Tiles of this repository's 16-bit matmuls with a GELU or with sums in fp16: larger ones spill (docs/performance.md)."""
SPLITS = (1, 2, 3, 4, 5, 6, 8)
WAITING = "waiting for the host"
"""The operation that stands for the time in which the GPU has nothing to do."""
EXPONENTIALS_PER_CLOCK = 16  # per SM, compute capability 8.x and 9.0: CUDA C++ Programming Guide, arithmetic throughput
SHARED_BYTES_PER_CLOCK = 128  # per SM: idem, 32 banks of 4 bytes
LANES = 128  # per SM: four schedulers, a warp instruction each per clock
_ON_4N = ("sm_89", "sm_120")  # the process that the fitted card is made in, and whose clock follows power
_WITH_HBM = ("sm_70", "sm_80", "sm_90")
_FITTED_ON = cards.card("rtx4070")


@lru_cache(maxsize=1024)
def uneven_end(blocks: tuple[int, ...], heads: int, sms: int, *, turns: bool, alone: float = 0.0) -> float:
    """When attention's last block ends, over the time of an even share. Each block goes to the SM that is the first to be free.

    ``turns``: all ``heads`` launch the first of ``blocks``, then the second; else one head after another. ``alone`` above 0:
    two blocks share an SM, each at half of its rate, and one that has it to itself runs at this share of the rate; else one
    block at a time. (That L2 limits how many heads take turns is left out.)
    """
    order = (block for block in blocks for _ in range(heads)) if turns else (b for _ in range(heads) for b in blocks)
    ends = [(0.0, 0.0)] * sms  # when the shorter of an SM's two blocks ends, and what the other has left to do then
    for block in order:
        time, left = ends[0]
        heapreplace(ends, (time + 2 * min(left, block), abs(left - block)) if alone else (time + block, 0.0))
    return max(time + left / (alone or 1.0) for time, left in ends) * sms / (heads * sum(blocks))


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
        return self.gpu.boost_mhz * 1e6 * self.clock

    @property
    def clock(self) -> float:
        """The SM clock in training over the nominal boost clock. Within a process it follows the power that an SM gets."""
        if self.gpu.arch in _ON_4N:
            power = (self.gpu.power_w / self.gpu.sm_count) / (_FITTED_ON.power_w / _FITTED_ON.sm_count)
            return self.constants.clock * power**self.constants.clock_exponent
        return self.constants.clock_full_rate

    @property
    def memory_efficiency(self) -> float:
        c = self.constants
        return c.memory_efficiency_hbm if self.gpu.arch in _WITH_HBM else c.memory_efficiency

    @property
    def bandwidth(self) -> float:
        return self.gpu.memory_gbs * 1e9 * self.memory_efficiency

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
        if self.gpu.arch == "sm_90":
            efficiency = c.gemm_efficiency_hopper
        return efficiency * peak / (self.gpu.sm_count * self.gpu.boost_mhz * 1e6)

    def attention_per_clock(self, op: Operation) -> float:
        """FlashAttention-2 multiplies with mma.sync, for which Hopper's tensor cores are not at their full rate; this
        repository's kernels are compiled to wgmma there."""
        base, c = self.flops_per_clock(self._base), self.constants
        if self.gpu.arch != "sm_90" or op.own:
            return base
        return base / c.gemm_efficiency_hopper * c.gemm_efficiency_full_rate * c.mma_sync_hopper

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
        assert op.scores is not None
        c, s = self.constants, op.scores
        cost, masked = s.cost, s.heads * s.masked
        instructions = s.number * (cost.instructions + s.dropout * cost.dropout) + masked * cost.masked
        shared = s.number * (cost.shared_once + cost.shared * s.columns)
        beside = (
            s.number * cost.exponentials / EXPONENTIALS_PER_CLOCK
            + instructions / LANES
            + shared / SHARED_BYTES_PER_CLOCK
        )
        exposed = beside * (c.exposed_backward if "backward" in op.name else c.exposed_forward)
        base = self.attention_per_clock(op)
        faster = self.matmul_per_clock() / self.flops_per_clock(self._base) if op.summed_in_fp16 else 1.0
        products = cost.products * op.flops * (1 - op.summed_in_fp16 + op.summed_in_fp16 / faster) / base
        # A block that has an SM to itself waits for all that runs beside its products.
        alone = (products + exposed) / (products + beside) if s.pairs else 0.0
        clocks = products + exposed + s.heads * len(s.blocks) * cost.rows / 128 * c.tile_overhead_clocks
        clocks *= uneven_end(s.blocks, s.heads, self.gpu.sm_count, turns=s.turns, alone=round(alone, 3))
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
    chip, own = Chip(gpu, precision, constants), 0
    parts: dict[str, list[OperationTime]] = {}
    for op in ops:
        executions = op.executions(grad_accum)
        if not executions:
            continue
        times = chip.times(op)
        bound = max(times, key=lambda name: times[name])
        work = (op.flops * executions, op.bytes * executions, op.launches * executions)
        own += op.launches * executions if op.own else 0
        part = OperationTime(op.name, op.group, 1e3 * executions * times[bound], *work, bound)
        parts.setdefault(op.name, []).append(part)
    found = [_together(same) for same in parts.values()]
    launches = sum(op.launches for op in found)
    gaps = 1e-3 * constants.kernel_gap_us * launches
    host = constants.host_launch_us * (launches - own) + constants.host_own_launch_us * own
    waiting = 1e-3 * host - gaps - sum(op.ms for op in found)
    found.append(OperationTime("gaps between kernels", GAPS, gaps, 0, 0, 0, "launch"))
    if waiting > 0 and not graphs:
        found.append(OperationTime(WAITING, GAPS, waiting, 0, 0, 0, "launch"))
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
    optimizer: str = "adamw",
) -> float:
    """Milliseconds of one step: the sum of ``step_times``."""
    ops = operations(
        shape, kernels, micro_batch, T, precision, dropout=dropout, sm_count=gpu.sm_count, optimizer=optimizer
    )
    return sum(op.ms for op in step_times(ops, grad_accum, gpu, precision, constants))
