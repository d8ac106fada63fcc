"""How fast would a launch config be: a model of one kernel on one card, from what the compiler made of it.

It orders configs; it predicts no times. For every config that compiles without spills and fits an SM it takes

* from the cubin: registers, shared memory and warps, hence the blocks that an SM holds; the instructions of the kernel's
  loops, by kind;
* from cards.py: SMs, clock, memory bandwidth, tensor-core rate;
* from the shape: blocks of the grid and the work of each.

**Attention.** A tile costs an SM, in clocks, T for its tensor-core instructions, I for issuing all its instructions
(4 a clock), X for its exponentials (16 a clock), S for what passes through shared memory (128 bytes a clock), L for reading
K and V (or Q and dO) from L2. With W warps resident per scheduler the longest of them is paid whole, and 1/W of the rest: W
warps hide each other's waits, and cp.async those for L2. A block is its tiles, masked ones at their own cost, and
OVERHEAD_CLOCKS. Blocks are then handed out in launch order, each to the first SM that
has room, whose residents share it: causal blocks are of unequal work, and a last wave with few blocks runs faster, so
that it costs less than the quotient blocks / slots makes it look. ``fill`` is the share of the SMs' time that is work.

**Row kernels and AdamW** (memory-bound). A wave of S blocks of b bytes takes S b / bandwidth to move them, some clocks
to issue its instructions, and LATENCY_CLOCKS of waiting for each round of a block's loop: the longest of the three, and
1/W of the rest. The last wave has fewer blocks, and fewer warps to hide its waits.

**Linear layers.** As attention: a block of K costs an SM the same four, but the tiles are equal, and an epilogue follows that
moves the tile's results. Matrix products that sum in fp16 count at that arithmetic's nominal rate. A split of K writes and
reads its parts in fp32. It compares tiles with tiles, not with cuBLAS: that is for measuring.

How much of this overlaps is not known, so every config is ranked under four ASSUMPTIONS, and the best is the one that is
nowhere far behind. Of configs that the model cannot tell apart (RESOLUTION) a family's buckets take one that is good in most
of them (``settle``): a tile that changes from bucket to bucket is noise.

The constants are nominal or assumed; ``bench.tune --check-model`` says how often the order they give is right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush
from statistics import mean
from typing import Any

from bench.compiler import cubin
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels.fused_attn import heads_together

MODEL = 2
"""Raised when figures of the model change: entries ranked by another one are ranked anew."""

OVERHEAD_CLOCKS = 1100
"""What starts and ends a block: first loads, last stores. One memory latency and 32 KB at 64 bytes a clock."""
LATENCY_CLOCKS = 800
"""From a load's issue to its value, under load."""
BANDWIDTH = 0.91
"""Share of the nominal memory bandwidth that streaming kernels reach."""
L2_BYTES_PER_CLOCK = {False: 13.0, True: 38.8}
"""That L2 gives one SM while all ask: GeForce cards, data-centre ones (as fastgpt/performance/step_time.py has them)."""
EXPONENTIALS_PER_CLOCK = 16
SHARED_BYTES_PER_CLOCK = 128
RESOLUTION = 0.03
"""Gains that the model cannot tell from none: a config has to be better than the default by more."""


# ---------------------------------------------------------------- what the compiler says


@dataclass(frozen=True)
class Facts:
    """One config of one kernel, compiled. ``problem``: why it is out of the question, or ""."""

    config: dict[str, int]
    problem: str
    registers: int = 0
    shared: int = 0
    warps: int = 0
    blocks_per_sm: int = 0
    plain_loop: dict[str, int] | None = None
    """Instructions of one round, by kind, as one warp issues them: of the innermost loop with the fewest that has tensor
    instructions (any, if none has; all of the kernel, if it has no loop)."""
    masked_loop: dict[str, int] | None = None
    """The same for the loop with the most instructions: a masked tile's."""

    @property
    def resources(self) -> dict[str, int]:
        names = ("registers", "shared", "blocks_per_sm")
        return {"spills": 0, **{name: getattr(self, name) for name in names}}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_LINE = re.compile(r"^(\.L_\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)$", re.MULTILINE)


def loops(sass: str) -> list[Counter[str]]:
    """Instructions in the body of each innermost loop of a disassembly (nvdisasm -c), in order: what lies between a label
    and a later branch back to it."""
    ops: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for label, op, rest in _LINE.findall(sass):
        if label:
            labels[label] = len(ops)
            continue
        ops.append(op)
        back = re.search(r"\((\.L_\w+)\)", rest) if op.startswith("BRA") else None
        if back and labels.get(back[1], len(ops)) < len(ops) - 1:
            spans.append((labels[back[1]], len(ops)))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [Counter(ops[start:stop]) for start, stop in inner]


def facts(config: dict[str, int], compiled: list[Any], arch: int) -> Facts:
    """What the compiler says of the binaries of one config. The first, the usual one, is ranked; the others (options that
    use more registers) may rule the config out and lower the blocks per SM."""
    used = [cubin.resources(binary) for binary in compiled]
    fits = [cubin.occupancy(one, arch) for one in used]
    for one, fit in zip(used, fits):
        if one.stack or not fit.fits:  # nothing more is asked of it: a disassembly takes as long as half a compile
            return Facts(config, f"spills {one.stack} bytes" if one.stack else f"does not fit: {fit.limiter}")
    listing = cubin.tool("nvdisasm", compiled[0].asm["cubin"], "-c", "-ndf")
    bodies = loops(listing) or [Counter(op for _, op, _ in _LINE.findall(listing) if op)]
    with_tensors = [body for body in bodies if cubin.tensor_core(body)] or bodies
    by_length = sorted(with_tensors, key=lambda body: sum(body.values()))
    return Facts(
        config,
        "",
        registers=max(one.registers for one in used),
        shared=max(one.shared for one in used),
        warps=used[0].warps,
        blocks_per_sm=min(fit.blocks for fit in fits),
        plain_loop=dict(by_length[0]),
        masked_loop=dict(by_length[-1]),
    )


# ---------------------------------------------------------------- what overlaps

Parts = Mapping[str, float]
"""Clocks of each resource that something takes."""


def _partly(parts: Parts, warps: float, hidden: tuple[str, ...] = ()) -> float:
    longest = max(parts, key=lambda name: parts[name])
    return parts[longest] + sum(t for name, t in parts.items() if name != longest and name not in hidden) / warps


def _without_l2(parts: Parts, warps: float, hidden: tuple[str, ...] = ()) -> float:
    return _partly({name: time for name, time in parts.items() if name != "l2"}, warps, hidden)


ASSUMPTIONS: dict[str, Callable[[Parts, float, tuple[str, ...]], float]] = {
    "usual": _partly,
    "all overlaps": lambda parts, warps, hidden: max(parts.values()),
    "nothing overlaps": lambda parts, warps, hidden: sum(parts.values()),
    "no L2": _without_l2,
}
"""Clocks of something from its parts, the warps per scheduler and the parts whose waits are hidden. "usual": the longest whole,
and what the warps do not hide of the rest; "all overlaps": the longest alone."""
_together = ASSUMPTIONS["usual"]


@contextmanager
def assuming(name: str) -> Iterator[None]:
    """Inside, all times are under this one of ASSUMPTIONS."""
    global _together
    before, _together = _together, ASSUMPTIONS[name]
    try:
        yield
    finally:
        _together = before


# ---------------------------------------------------------------- attention


def _tensor_flops(op: str, warps: int) -> float:
    """FLOPs of a block that runs this instruction once in every warp (HGMMA: in every group of 4)."""
    warp = re.match(r"HMMA\.(\d+)", op)
    if warp:
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[warp[1]]
        return 2 * m * n * k * warps
    group = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op)
    if group:
        return 2 * int(group[1]) * int(group[2]) * int(group[3]) * warps / 4
    return 0.0


def _flops_per_clock(op: str, gpu: Gpu) -> float:
    """Nominal rate of an SM's tensor cores in the arithmetic of this instruction."""
    peak = gpu.peak_flops("fp16_fp16acc" if re.match(r"HG?MMA\.\w+\.F16", op) else "bf16")
    assert peak is not None
    return peak / (gpu.sm_count * gpu.boost_mhz * 1e6)


def _shared_bytes(op: str) -> float:
    """Bytes that a warp moves through shared memory by this instruction; of a group's wgmma its share of the second operand."""
    matrices = re.match(r"(?:LDSM|STSM)\.\d+\.M?T?\d+(?:\.([24]))?$", op)
    if matrices:
        return 128 * int(matrices[1] or 1)
    if re.match(r"(LDS|STS|LDGSTS)\b", op):
        width = re.search(r"\.(128|64|[SU]16|[SU]8)\b", op)
        return 32 * ({"128": 16, "64": 8, "16": 2, "8": 1}[width[1].lstrip("SU")] if width else 4)
    group = re.match(r"HGMMA\.\d+x(\d+)x(\d+)", op)
    return 2 * int(group[1]) * int(group[2]) / 4 if group else 0.0


def tile_parts(found: Facts, body: Mapping[str, float], l2_bytes: float, gpu: Gpu) -> dict[str, float]:
    """Clocks of an SM that one tile of one block takes of each resource: T, I, X, S and L of the docstring above."""
    tensor = sum(
        _tensor_flops(op, found.warps) * count / _flops_per_clock(op, gpu) for op, count in body.items() if "MMA" in op
    )
    exponentials = sum(count for op, count in body.items() if op.startswith("MUFU"))
    return {
        "tensor": tensor,
        "issue": sum(body.values()) * found.warps / 4,
        "exponential": exponentials * 32 * found.warps / EXPONENTIALS_PER_CLOCK,
        "shared": sum(_shared_bytes(op) * n for op, n in body.items()) * found.warps / SHARED_BYTES_PER_CLOCK,
        "l2": l2_bytes / L2_BYTES_PER_CLOCK[gpu.full_rate],
    }


def tile_clocks(found: Facts, body: Mapping[str, float], l2_bytes: float, gpu: Gpu, blocks_per_sm: int) -> float:
    """Clocks of an SM for one tile of one block, ``blocks_per_sm`` such blocks being resident."""
    ahead = any(op.startswith(("LDGSTS", "UTMA")) for op in body)  # loads of a later tile are under way
    parts, resident = tile_parts(found, body, l2_bytes, gpu), max(1.0, blocks_per_sm * found.warps / 4)
    return _together(parts, resident, ("l2",) if ahead else ())


def l2_bytes(kernel: str, found: Facts, D: int) -> int:
    """Bytes that a block reads for one tile: K and V, or Q and dO, of 16 bits."""
    return 2 * found.config["BLOCK_M" if kernel == "attention.backward_kv" else "BLOCK_N"] * D * 2


def _causal_tiles(kernel: str, config: dict[str, int], T: int) -> list[tuple[int, int]]:
    """(unmasked, masked) tiles of each block of a head, in launch order: the most work first."""
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    if kernel == "attention.backward_kv":
        tiles = []
        for start in range(0, T, n):
            first, full = start // m, min(-(-(start + n - 1) // m), -(-T // m))
            tiles.append((-(-T // m) - full, full - first))
        return tiles
    blocks = [(start // n, -(-min(start + m, T) // n) - start // n) for start in range(0, T, m)]
    return blocks[::-1]


def schedule(costs: list[list[float]], order: list[int], sms: int) -> float:
    """When the last block ends. ``order``: the kinds of the blocks as they are launched; ``costs[n - 1][kind]``: clocks of
    an SM for one of that kind while n are resident, at most len(costs). Residents share their SM evenly; a block goes to
    the first SM with room, at the start one to each SM in turn."""
    queue = iter(order)
    residents: list[list[list[float]]] = [[] for _ in range(sms)]  # of each SM: [kind, share that is left]
    for _ in range(len(costs)):
        for sm, kind in zip(range(sms), queue):
            residents[sm].append([kind, 1.0])
    waiting = list(queue)[::-1]

    def next_end(sm: int, now: float) -> tuple[float, float, int]:
        n, cost = len(residents[sm]), costs[len(residents[sm]) - 1]
        return now + min(left * n * cost[int(kind)] for kind, left in residents[sm]), now, sm

    events = [next_end(sm, 0.0) for sm in range(sms) if residents[sm]]
    heapify(events)
    end = 0.0
    while events:
        end, since, sm = heappop(events)
        n, cost = len(residents[sm]), costs[len(residents[sm]) - 1]
        for block in residents[sm]:
            block[1] -= (end - since) / (n * cost[int(block[0])])
        still = [block for block in residents[sm] if block[1] > 1e-9]
        residents[sm] = still
        while waiting and len(still) < n:
            still.append([waiting.pop(), 1.0])
        if still:
            heappush(events, next_end(sm, end))
    return end


def attention_time(kernel: str, found: Facts, heads: int, T: int, D: int, gpu: Gpu) -> tuple[float, float]:
    """(clocks, fill) of one launch over ``heads`` = B x heads sequences of T."""
    together = heads_together(heads, heads * 4 * T * D, gpu.l2_mb * 2**20)  # two tensors of 16 bits
    tiles, read = _causal_tiles(kernel, found.config, T), l2_bytes(kernel, found, D)
    assert found.plain_loop is not None and found.masked_loop is not None
    costs = []
    for resident in range(1, found.blocks_per_sm + 1):
        plain = tile_clocks(found, found.plain_loop, read, gpu, resident)
        masked = tile_clocks(found, found.masked_loop, read, gpu, resident)
        costs.append([OVERHEAD_CLOCKS / resident + full * plain + edge * masked for full, edge in tiles])
    simulated = min(heads, max(1, 2048 // len(tiles)))
    groups = [min(together, simulated - first) for first in range(0, simulated, together)]
    order = [kind for size in groups for kind in range(len(tiles)) for _ in range(size)]
    end = schedule(costs, order, gpu.sm_count)
    head = sum(costs[-1]) / gpu.sm_count
    clocks = end + head * (heads - simulated)  # the heads that are not simulated would find every SM busy
    return clocks, head * heads / clocks


EPILOGUE_BYTES = {"gelu": 4, "dgelu": 4, "residual": 8, "weight_grad": 4, "weight_grad_bias": 4}
"""Per element of the result; 2 where not named."""
_PROMOTION = ("HADD2.F32", "FADD")
"""What adds a sum in fp16 to the fp32 one."""


def linear_step(found: Facts) -> tuple[dict[str, float], float]:
    """(instructions of a warp for one block of K, bytes that a tile reads for it). The compiled loop may hold several, and
    a promotion that runs once in ``chunk`` of them only."""
    config, body = found.config, found.plain_loop or {}
    chunk = max(config.get("chunk", 1), 1)
    flops = 2 * config["block_m"] * config["block_n"] * config["block_k"]
    steps = sum(_tensor_flops(op, found.warps) * count for op, count in body.items()) / flops or 1.0
    per_step = {op: count / (steps * (chunk if op in _PROMOTION else 1)) for op, count in body.items()}
    return per_step, 2.0 * (config["block_m"] + config["block_n"]) * config["block_k"]


def linear_time(kernel: str, found: Facts, N: int, K: int, tokens: int, gpu: Gpu) -> tuple[float, float]:
    """(clocks, fill) of a matmul of a bucket ``N.. K..`` (kernels.matmul.linear_bucket) at this many tokens."""
    config, kind = found.config, kernel.split(".")[1]
    m, n, k = (N, K, tokens) if kind.startswith("weight_grad") else (tokens, N, K)
    ways = config.get("splits", 1)
    blocks = -(-m // config["block_m"]) * -(-n // config["block_n"]) * ways
    body, read = linear_step(found)
    depth = -(-k // (ways * config["block_k"]))
    written = config["block_m"] * config["block_n"] * EPILOGUE_BYTES.get(kind, 2)
    epilogue = OVERHEAD_CLOCKS + written / L2_BYTES_PER_CLOCK[gpu.full_rate]

    def wave(count: int) -> float:
        resident = -(-count // gpu.sm_count)
        return resident * (epilogue / resident + depth * tile_clocks(found, body, read, gpu, resident))

    slots = gpu.sm_count * found.blocks_per_sm
    full, rest = divmod(blocks, slots)
    clocks = full * wave(slots) + (wave(rest) if rest else 0.0)
    busy = blocks / slots * wave(slots)
    if ways > 1:  # fp32 parts, written and read: in L2, as far as they fit half of it
        held = 4 * ways * m * n <= gpu.l2_mb * 2**20 / 2
        memory = BANDWIDTH * gpu.memory_gbs * 1e9 / (gpu.boost_mhz * 1e6)
        clocks += 8 * ways * m * n / (L2_BYTES_PER_CLOCK[gpu.full_rate] * gpu.sm_count if held else memory)
    return clocks, min(1.0, busy / clocks)


# ---------------------------------------------------------------- memory-bound kernels


def waves_time(
    blocks: int, bytes_: float, rounds: float, found: Facts, gpu: Gpu, *, stages: int = 1
) -> tuple[float, float]:
    """(clocks, fill) of ``blocks`` equal blocks that each move ``bytes_`` in ``rounds`` rounds of a loop, which has the
    loads of ``stages`` rounds under way."""
    per_clock = BANDWIDTH * gpu.memory_gbs * 1e9 / (gpu.boost_mhz * 1e6)
    issue = sum((found.plain_loop or {}).values()) * rounds * found.warps / 4
    waits = rounds / stages * LATENCY_CLOCKS

    def wave(count: int) -> float:
        resident = -(-count // gpu.sm_count)
        parts = {"memory": count * bytes_ / per_clock, "issue": resident * issue, "waits": waits}
        return _together(parts, max(1.0, resident * found.warps / 4), ())

    slots = gpu.sm_count * found.blocks_per_sm
    full, rest = divmod(blocks, slots)
    clocks = full * wave(slots) + (wave(rest) if rest else 0.0)
    return clocks, min(1.0, blocks * bytes_ / per_clock / clocks)


def layer_norm_time(kernel: str, found: Facts, rows: int, C: int, size: int, gpu: Gpu) -> tuple[float, float]:
    """A norm inside a block under autocast: branch of ``size`` bytes an element, fp32 residual stream."""
    if kernel.endswith(".forward"):
        return waves_time(-(-rows // found.config["rows"]), found.config["rows"] * C * (8 + 2 * size), 1, found, gpu)
    config = found.config
    programs = gpu.sm_count * config["programs_per_sm"]
    tiles = -(-rows // config["rows"])
    each = -(-tiles // min(programs, tiles))  # the slowest program's
    bytes_ = each * config["rows"] * C * (12 + 2 * size) + 8 * C
    clocks, _ = waves_time(min(programs, tiles), bytes_, each, found, gpu, stages=config["num_stages"])
    per_clock = BANDWIDTH * gpu.memory_gbs * 1e9 / (gpu.boost_mhz * 1e6)
    clocks += 8 * C * programs / per_clock  # the second kernel reads the partial sums
    return clocks, min(1.0, rows * C * (12 + 2 * size) / per_clock / clocks)


def cross_entropy_time(found: Facts, rows: int, V: int, size: int, gpu: Gpu) -> tuple[float, float]:
    """Two passes over the row; the second finds it in L2 and writes it: one read and one write reach memory."""
    return waves_time(rows, 2 * V * size, 2 * -(-V // found.config["tile"]), found, gpu)


def adamw_time(found: Facts, parameters: int, gpu: Gpu) -> tuple[float, float]:
    chunk = found.config["CHUNK"]
    return waves_time(-(-parameters // chunk), 30 * chunk, chunk / found.config["BLOCK"], found, gpu)


# ---------------------------------------------------------------- ranking


@dataclass(frozen=True)
class Ranked:
    """``under``: by assumption, mean over the bucket's sizes of its clocks over the quickest config's. ``time``: the largest of
    these. ``over_default``: over the default's (None if that is ruled out)."""

    facts: Facts
    time: float
    fill: float
    over_default: float | None
    under: Mapping[str, float]


def rank(
    found: list[Facts], default: dict[str, int], times: Callable[[Facts], list[tuple[float, float]]]
) -> list[Ranked]:
    """Configs without problems, best first. The default comes first unless another is better by RESOLUTION. ``times``:
    (clocks, fill) of a config at each size that stands for the bucket."""
    candidates = [f for f in found if not f.problem]
    candidates = [f for f in candidates if f.config.get("programs_per_sm", 1) <= f.blocks_per_sm or f.config == default]
    if not candidates:
        return []
    scores: list[dict[str, float]] = [{} for _ in candidates]
    fills: list[float] = []
    for name in ASSUMPTIONS:
        with assuming(name):
            clocks = [times(f) for f in candidates]
        least = [min(time for time, _ in sizes) for sizes in zip(*clocks)]
        for score, own in zip(scores, clocks):
            score[name] = mean(time / best for (time, _), best in zip(own, least))
        fills = fills or [mean(fill for _, fill in own) for own in clocks]
    worst = [max(score.values()) for score in scores]
    mine = next((time for f, time in zip(candidates, worst) if f.config == default), None)
    ranked = [
        Ranked(f, time, fill, None if mine is None else time / mine, under)
        for f, time, fill, under in zip(candidates, worst, fills, scores)
    ]

    def order(item: Ranked) -> tuple[float, bool]:
        is_default = item.facts.config == default
        return (item.time - (RESOLUTION if is_default else 0.0), not is_default)

    return sorted(ranked, key=order)


def settle(orders: Mapping[str, list[Ranked]]) -> dict[str, Ranked]:
    """A config for each bucket, of its order by ``rank``: of those within RESOLUTION of the first and not behind the default
    the one that is so in most buckets."""

    def near(order: list[Ranked]) -> list[Ranked]:
        within = [item for item in order if item.time <= order[0].time + RESOLUTION]
        return [item for item in within if item.over_default is None or item.over_default <= 1]

    orders = {bucket: order for bucket, order in orders.items() if order}
    votes = Counter(str(sorted(item.facts.config.items())) for order in orders.values() for item in near(order))
    return {
        bucket: max(near(order), key=lambda item: votes[str(sorted(item.facts.config.items()))])
        for bucket, order in orders.items()
    }
