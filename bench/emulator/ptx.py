"""PTX text -> a kernel of basic blocks of instructions. Only what LLVM's NVPTX back end writes for triton's kernels.

Registers keep their PTX names; names declared inside a ``{ ... }`` scope of inline assembly are made unique by the scope's
number. Shared memory is the one dynamic array (``.extern .shared``), at address 0; a static one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTH = {
    **{"pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4},
    **{"s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8},
}
"""Bytes of a PTX type."""
SHARED = "global_smem"
"""triton's name for a kernel's shared memory."""


class PtxError(Exception):
    """PTX that this emulator does not know: named, never guessed at."""


# ---------------------------------------------------------------- operands


@dataclass(frozen=True)
class Reg:
    name: str
    width: int
    """Bytes; 0: a predicate."""


@dataclass(frozen=True)
class Special:
    """Such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Imm:
    text: str


@dataclass(frozen=True)
class Symbol:
    name: str
    offset: int = 0


@dataclass(frozen=True)
class Mem:
    """``[base + offset]``."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vec:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class TwoResults:
    """``p|q``: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody reads."""


Operand = Reg | Special | Imm | Symbol | Mem | Vec | TwoResults | Sink


def items(operand: Operand) -> tuple[Operand, ...]:
    """The parts of a vector, or the operand alone."""
    return operand.items if isinstance(operand, Vec) else (operand,)


# ---------------------------------------------------------------- instructions, blocks, kernels


@dataclass
class Instr:
    op: str
    args: list[Operand]
    pred: tuple[Operand, bool] | None
    """(predicate, negated)."""
    line: int
    """In the PTX text, from 1."""
    loc: str
    """Python source line, as LLVM's .loc names it."""
    text: str

    def __post_init__(self) -> None:
        self.parts = self.op.replace("shared::cta", "shared").split(".")  # as triton 3.8 says it
        self.is_barrier = self.parts[:2] in (["bar", "sync"], ["barrier", "sync"])
        self.types = [part for part in self.parts[1:] if part in WIDTH]


@dataclass
class BasicBlock:
    instrs: list[Instr] = field(default_factory=list)
    target: int | None = None
    """BasicBlock that the last instruction, a bra, leads to."""

    @property
    def barrier(self) -> Instr | None:
        """The last instruction, if the CTA meets there."""
        return self.instrs[-1] if self.instrs[-1].is_barrier else None


@dataclass(eq=False)
class Kernel:
    name: str
    params: list[str]
    blocks: list[BasicBlock]
    threads: int | None
    """.reqntid"""
    widths: dict[str, int]
    """Bytes of each register."""

    def granule(self, space: str) -> int:
        """Bytes of the smallest access to a memory space, at most 4: what is kept track of."""
        sizes = [
            WIDTH[ins.parts[-1]]
            for block in self.blocks
            for ins in block.instrs
            if ins.parts[0] in ("ld", "st") and space in ins.parts
        ]
        return min(4, *sizes) if sizes else 4


# ---------------------------------------------------------------- parser

_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid)\b")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|[0-9]+)U?|0[fFdD][0-9a-fA-F]+")
_DIRECTIVES = (
    ".file",
    ".section",
    ".version",
    ".target",
    ".address_size",
    ".pragma",
    ".maxnreg",
    ".minnctapersm",
    ".maxntid",
)


def parse(text: str) -> Kernel:
    """The one kernel of a PTX file. Raises PtxError."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, re.DOTALL)
    if entry is None:
        raise PtxError("no .entry")
    if text.count(".entry ") > 1 or re.search(r"^(\.visible )?\.func", text, re.MULTILINE):
        raise PtxError("more than one function: calls are not emulated")
    for declared in re.finditer(r"^\s*(\.extern\s+)?\.shared\s.*$", text, re.MULTILINE):
        if not declared[1]:
            raise PtxError(f"static shared memory: {declared[0].strip()}")
    params = [words.split()[-1] for words in entry[2].split(",") if words.strip()]
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    body = _Body(text, text.index("{", entry.end()))
    return Kernel(entry[1], params, body.blocks(), int(threads[1]) if threads else None, body.widths)


class _Body:
    def __init__(self, text: str, start: int) -> None:
        self.first_line = text.count("\n", 0, start) + 1
        self.lines = text[start:].split("\n")
        self.scopes: list[dict[str, Reg]] = []
        self.n_scopes = 0
        self.widths: dict[str, int] = {}

    def blocks(self) -> list[BasicBlock]:
        statements = list(self._statements())
        wanted = {_target(item) for item in statements if isinstance(item, Instr) and item.parts[0] == "bra"}
        blocks, at_label = [BasicBlock()], {}
        for item in statements:
            if isinstance(item, str):
                if item in wanted:
                    if blocks[-1].instrs:
                        blocks.append(BasicBlock())
                    at_label[item] = len(blocks) - 1
                continue
            blocks[-1].instrs.append(item)
            if item.parts[0] in ("bra", "ret", "exit") or item.is_barrier:
                blocks.append(BasicBlock())
        if not blocks[-1].instrs:
            if len(blocks) - 1 in at_label.values():
                raise PtxError("a label at the end of the kernel")
            blocks.pop()
        for block in blocks:
            if block.instrs[-1].parts[0] == "bra":
                block.target = at_label[_target(block.instrs[-1])]
        return blocks

    def _statements(self) -> Iterator[str | Instr]:
        """Labels and instructions."""
        loc, pending = "", ""
        for number, raw in enumerate(self.lines, self.first_line):
            code, _, comment = (part.strip() for part in raw.partition("//"))
            if code.startswith(".loc"):
                loc = comment or code
                continue
            if not code or code.startswith(_DIRECTIVES):
                continue
            pending = f"{pending} {code}".strip()
            while pending:
                label = re.match(r"([\w$]+)\s*:(?!:)", pending)
                if pending[0] == "{":
                    self.n_scopes += 1
                    self.scopes.append({})
                    pending = pending[1:].strip()
                elif pending[0] == "}":
                    self.scopes.pop()
                    pending = pending[1:].strip()
                    if not self.scopes:
                        return
                elif label:
                    yield label[1]
                    pending = pending[label.end() :].strip()
                elif ";" in pending:
                    statement, _, pending = (part.strip() for part in pending.partition(";"))
                    if statement.startswith(".reg"):
                        self._declare(statement)
                    elif statement.startswith(".") and not statement.startswith(_DIRECTIVES):
                        raise PtxError(f"line {number}: directive {statement}")
                    elif statement and statement[0] != ".":
                        yield self._instr(statement, number, loc)
                else:
                    break

    def _declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        width = WIDTH[kind.lstrip(".")]
        unique = "" if len(self.scopes) == 1 else f"@{self.n_scopes}"
        for name in names.split(","):
            family = re.fullmatch(r"(\S+?)<(\d+)>", name.strip())
            for each in [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name.strip()]:
                self.scopes[-1][each] = Reg(each + unique, width)
                self.widths[each + unique] = width

    def _instr(self, statement: str, line: int, loc: str) -> Instr:
        text, pred = " ".join(statement.split()), None
        if statement[0] == "@":
            name, statement = statement[1:].split(None, 1)
            pred = self._operand(name.lstrip("!")), name[0] == "!"
        op, *rest = statement.split(None, 1)
        return Instr(op, [self._operand(arg) for arg in _split(rest[0] if rest else "")], pred, line, loc, text)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text[0] == "{":
            return Vec(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return Mem(self._operand(base), int(offset, 0) if offset else 0)
        if text == "_":
            return Sink()
        if "|" in text:
            first, _, second = text.partition("|")
            return TwoResults(self._operand(first), self._operand(second))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if _SPECIAL.match(text):
            return Special(text)
        if _NUMBER.fullmatch(text):
            return Imm(text)
        if text[0] == "%":
            raise PtxError(f"register {text}")
        name, _, offset = text.replace(" ", "").partition("+")
        return Symbol(name, int(offset, 0) if offset else 0)


def _target(branch: Instr) -> str:
    (label,) = branch.args
    if not isinstance(label, Symbol):
        raise PtxError(branch.text)
    return label.name


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    return [part for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


# ---------------------------------------------------------------- in which order blocks run


def ranks(blocks: list[BasicBlock]) -> list[int]:
    """The place of each block in an order in which a block comes after all that lead to it, and a loop's before those after it.

    When threads stand at several blocks, the first in this order runs: threads that have parted then meet again where
    their ways join, as ptxas makes them (it puts reconvergence points at post-dominators). The order of the text
    would not do: LLVM sometimes places a join before one of its branches."""
    order = _order(set(range(len(blocks))), 0, _successors(blocks))
    return [order.index(block) if block in order else len(blocks) for block in range(len(blocks))]


def _successors(blocks: list[BasicBlock]) -> list[list[int]]:
    found = []
    for i, block in enumerate(blocks):
        last = block.instrs[-1]
        out = [] if block.target is None else [block.target]
        if last.pred is not None or last.parts[0] not in ("bra", "ret", "exit"):
            out.append(i + 1)
        found.append([s for s in out if s < len(blocks)])
    return found


def _order(nodes: set[int], entry: int, out: list[list[int]]) -> list[int]:
    """``nodes``, of a graph without edges into ``entry``: topologically, each strongly connected part in one piece."""
    result: list[int] = []
    for part in _components(nodes, entry, out):
        if len(part) == 1:
            result += part
            continue
        inside = set(part)
        outside = {s for n in nodes - inside for s in out[n]}
        header = next((n for n in sorted(inside) if n in outside or n == entry), min(inside))
        trimmed = [[s for s in out[n] if s != header] if n in inside else [] for n in range(len(out))]
        result += _order(inside, header, trimmed)
    return result


def _components(nodes: set[int], entry: int, out: list[list[int]]) -> list[list[int]]:
    """Strongly connected components reachable from ``entry``, each before those that it leads to (Tarjan 1972)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []
    work = [(entry, 0)]
    while work:
        node, i = work.pop()
        if i == 0:
            index[node] = low[node] = len(index)
            stack.append(node)
        following = [s for s in out[node] if s in nodes]
        descended = False
        while i < len(following) and not descended:
            s = following[i]
            i += 1
            if s not in index:
                work += [(node, i), (s, 0)]
                descended = True
            elif s in stack:
                low[node] = min(low[node], index[s])
        if descended:
            continue
        if low[node] == index[node]:
            found.append([])
            while not found[-1] or found[-1][-1] != node:
                found[-1].append(stack.pop())
        if work:
            low[work[-1][0]] = min(low[work[-1][0]], low[node])
    return found[::-1]
