"""Instructions that only compute: each becomes a function of the machine, over its registers.

``build(instr)`` returns a function of the machine, or None if the instruction is not one of these. Values are numpy arrays with
one element per active thread (or numpy scalars); registers hold unsigned integers of their width, predicates bool.

fma is computed in fp64 and rounded to fp32 (rounded twice: this differs from one rounding about once in 2^29).
``.approx`` functions are computed by numpy to fp32, more exactly than the chip does; ``.ftz`` flushes subnormal
operands and results to zero. What an instruction may do that is not here (a rounding, a type) raises PtxError with
its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.emulator import tensor_cores
from bench.emulator.ptx import SHARED, WIDTH, Imm, Instr, Operand, PtxError, Reg, Sink, Special, Symbol, TwoResults, Vec

Values = Any
"""A numpy array or scalar."""
Step = Callable[[Any], None]
"""What an instruction does to a machine."""

CONTAINER: dict[int, Any] = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""What a register of so many bytes is kept in."""
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
KIND: dict[str, Any] = {
    kind: FLOAT.get(kind) or (SIGNED[width] if kind[0] == "s" else CONTAINER[width]) for kind, width in WIDTH.items()
}
"""What numpy has for a PTX type: bf16 and pairs are bits."""
_FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2")


# ---------------------------------------------------------------- operands


def _immediate(text: str, kind: str) -> Values:
    text, width = text.rstrip("U"), WIDTH[kind] or 1
    if text[:2].lower() in ("0f", "0d"):
        bits = CONTAINER[4 if text[1] in "fF" else 8](int(text[2:], 16))
        return bits.view({4: np.float32, 8: np.float64}[bits.itemsize]) if kind in FLOAT else bits
    value = int(text, 0)
    if kind == "pred":
        return np.bool_(value != 0)
    if kind in FLOAT:
        raise PtxError(f"integer {text} as {kind}")
    return CONTAINER[width](value & ((1 << 8 * width) - 1)).view(KIND[kind])


def reader(operand: Operand, kind: str) -> Callable[[Any], Values]:
    """A function of the machine: the operand as ``kind``. A wider register gives its low bits."""
    want = KIND[kind]
    if isinstance(operand, Imm):
        value = _immediate(operand.text, kind)
        return lambda m: value
    if isinstance(operand, Symbol) and operand.name == SHARED:
        value = CONTAINER[WIDTH[kind]](operand.offset).view(want)
        return lambda m: value
    if isinstance(operand, Special):
        special = operand.name
        return lambda m: m.special(special).astype(want)
    if not isinstance(operand, Reg):
        raise PtxError(f"operand {operand}")
    name, width = operand.name, WIDTH[kind]
    if operand.width == width or kind == "pred":
        if want in (np.bool_, CONTAINER[operand.width]):
            return lambda m: m.get(name)
        return lambda m: m.get(name).view(want)
    if operand.width < width:
        raise PtxError(f"{name} read as {kind}")
    narrow = CONTAINER[width]
    return lambda m: m.get(name).astype(narrow).view(want)


def writer(operand: Operand) -> Callable[[Any, Values], None]:
    """A function (machine, values) that stores values as bits of the register's width; narrower ones are extended, signed
    ones by their sign."""
    if isinstance(operand, Sink):
        return lambda m, value: None
    if not isinstance(operand, Reg):
        raise PtxError(f"result {operand}")
    name, width, container = operand.name, operand.width, CONTAINER[operand.width]

    def write(m: Any, value: Values) -> None:
        if value.dtype != container:
            if width and value.dtype.itemsize == width:
                value = value.view(container)
            elif value.dtype.kind == "i":
                value = value.astype(SIGNED[width]).view(container)
            else:
                value = value.astype(container)
        m.put(name, value)

    return write


# ---------------------------------------------------------------- float formats


def bf16_to_f32(bits: Values) -> Values:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Values, rounding: str | None = "rn") -> Values:
    """Bits. ``rounding``: "rn", to nearest even, or "rz", toward zero."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    if rounding == "rn":
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def f32_to_f16(x: Values, rounding: str | None = "rn") -> Values:
    """Bits."""
    x = np.asarray(x, np.float32)
    near = x.astype(np.float16)
    bits = near.view(np.uint16)
    if rounding == "rz":  # one step toward zero where rounding went away from it, from infinity too
        bits = np.where(np.abs(near.astype(np.float32)) > np.abs(x), bits - np.uint16(1), bits)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def to_fp8(x: Values, kind: str) -> Values:
    """Bits of e4m3 or e5m2, to nearest even, saturating; NaN 0x7F."""
    mantissa, least, largest = (3, -6, 448.0) if kind == "e4m3" else (2, -14, 57344.0)
    x = np.asarray(x).astype(np.float64)
    nan = np.isnan(x)
    magnitude = np.minimum(np.abs(np.where(nan, 0.0, x)), largest)

    def exponent_of(value: Values) -> Values:
        return np.maximum(np.frexp(np.where(value > 0, value, 1.0))[1] - 1, least)

    step = np.ldexp(1.0, exponent_of(magnitude) - mantissa)
    value = np.minimum(np.rint(magnitude / step) * step, largest)  # numpy rounds to even
    exponent = exponent_of(value)
    units = np.rint(value / np.ldexp(1.0, exponent - mantissa)).astype(np.int64)  # with the leading one, if normal
    below = (1 << mantissa) - 1
    code = np.where(units > below, ((exponent - least + 1) << mantissa) | (units & below), units)
    return np.where(nan, 0x7F, code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def _widen(bits: Values, kind: str) -> Values:
    """Values of f16, bf16 or a wider float type, 16-bit ones as fp32."""
    if kind == "bf16":
        return bf16_to_f32(bits)
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else bits


_NARROW: dict[str, Callable[..., Values]] = {"bf16": f32_to_bf16, "f16": f32_to_f16}


_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
"""The one NaN that arithmetic on a GPU gives: which of two threads computes a value makes no difference to its bits."""
_TINY = np.finfo(np.float32).tiny


def _flush(x: Values) -> Values:
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


# ---------------------------------------------------------------- builders

_TABLE: dict[str, Callable[[Instr], Step]] = {}


def _op(*names: str) -> Callable[[Callable], Callable]:
    def register(builder: Callable) -> Callable:
        _TABLE.update(dict.fromkeys(names, builder))
        return builder

    return register


def build(ins: Instr) -> Step | None:
    builder = _TABLE.get(ins.parts[0])
    return None if builder is None else builder(ins)


def _kind(ins: Instr, *allowed: str) -> str:
    """The one type of an instruction. Raises PtxError if it has several, or a modifier that is not allowed."""
    kinds, others = ins.types, [part for part in ins.parts[1:] if part not in WIDTH and part not in allowed]
    if len(set(kinds)) != 1 or others:
        raise PtxError(f"{ins.op}: {', '.join(others) or 'types'}")
    return kinds[0]


def _apply(ins: Instr, kind: str, function: Callable[..., Values]) -> Step:
    """``function`` of all operands, read as ``kind``."""
    reads, write = [reader(arg, kind) for arg in ins.args[1:]], writer(ins.args[0])
    return lambda m: write(m, function(*[read(m) for read in reads]))


def _float(ins: Instr, kind: str, function: Callable[..., Values]) -> Step:
    """Arithmetic on floats: ``function`` gets arrays of the type, of fp32 for 16-bit ones, and may return wider ones."""
    ftz, sat = "ftz" in ins.parts, "sat" in ins.parts
    if kind == "f64":
        return _apply(ins, kind, function)
    if kind in ("f32", "f32x2"):

        def f32(*xs: Values) -> Values:
            xs = tuple(_flush(x) for x in xs) if ftz else xs
            y = function(*xs).astype(np.float32)
            nan = np.isnan(y)
            y = np.where(nan, _NAN, y) if nan.any() else y
            y = _flush(y) if ftz else y
            return np.clip(np.where(np.isnan(y), np.float32(0), y), np.float32(0), np.float32(1)) if sat else y

        if kind == "f32":
            return _apply(ins, "f32", f32)
        # Two floats side by side, from sm_100 on.
        reads, write = [reader(arg, "b64") for arg in ins.args[1:]], writer(ins.args[0])
        return lambda m: write(m, f32(*[m.spread(read(m)).view(np.float32) for read in reads]).view(np.uint64))
    if kind in _NARROW:
        return _apply(ins, kind, lambda *xs: _NARROW[kind](function(*[_widen(x, kind) for x in xs])).view(KIND[kind]))
    half = kind.removesuffix("x2")

    def packed(*xs: Values) -> Values:
        halves = []
        for shift in (0, 16):
            parts = [_widen((np.asarray(x, np.uint32) >> np.uint32(shift)).astype(np.uint16), half) for x in xs]
            halves.append(_NARROW[half](function(*parts)).astype(np.uint32))
        return halves[0] | (halves[1] << np.uint32(16))

    return _apply(ins, kind, packed)


def _number(ins: Instr, function: Callable[..., Values], *allowed: str) -> Step:
    """The same function for floats and integers."""
    types = ins.types
    if types[0] == "f32" and types[1:] in (["f16"], ["bf16"]):  # from sm_100 on: the first operands are narrower
        *narrow, last = ins.args[1:]
        reads, read, write = [reader(a, types[1]) for a in narrow], reader(last, "f32"), writer(ins.args[0])
        widened = [lambda m, r=r: _widen(r(m), types[1]) for r in reads]
        return lambda m: write(m, function(*[w(m) for w in widened], read(m)).astype(np.float32))
    kind = _kind(ins, *(allowed if types[-1] in _FLOATS else ()))
    return _float(ins, kind, function) if kind in _FLOATS else _apply(ins, kind, function)


_op("add")(lambda ins: _number(ins, np.add, "rn", "ftz", "sat"))
_op("sub")(lambda ins: _number(ins, np.subtract, "rn", "ftz", "sat"))


@_op("mul")
def _mul(ins: Instr) -> Step:
    if ins.types[-1] in _FLOATS:
        return _number(ins, np.multiply, "rn", "ftz", "sat")
    kind = _kind(ins, "lo", "hi", "wide")
    return _apply(ins, kind, _product(ins, kind))


def _product(ins: Instr, kind: str) -> Callable[[Values, Values], Values]:
    bits, wide = 8 * WIDTH[kind], KIND.get(f"{kind[0]}{16 * WIDTH[kind]}")
    if "lo" in ins.parts:
        return np.multiply
    if wide is not None:
        if "wide" in ins.parts:
            return lambda a, b: a.astype(wide) * b.astype(wide)
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(KIND[kind])

    def high64(a: Values, b: Values) -> Values:
        u, v = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
        mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        a0, a1, b0, b1 = u & mask, u >> half, v & mask, v >> half
        middle = a1 * b0 + (a0 * b0 >> half)
        high = a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & mask)) >> half)
        if kind == "s64":
            high = (
                high - np.where(u.view(np.int64) < 0, v, np.uint64(0)) - np.where(v.view(np.int64) < 0, u, np.uint64(0))
            )
        return high.view(KIND[kind])

    return high64


@_op("mad")
def _mad(ins: Instr) -> Step:
    kind = _kind(ins, "lo", "hi", "wide")
    product, result = _product(ins, kind), kind if "wide" not in ins.parts else f"{kind[0]}{16 * WIDTH[kind]}"
    a, b, c, write = (
        reader(ins.args[1], kind),
        reader(ins.args[2], kind),
        reader(ins.args[3], result),
        writer(ins.args[0]),
    )
    return lambda m: write(m, product(a(m), b(m)) + c(m))


@_op("fma")
def _fma(ins: Instr) -> Step:
    def fma(a: Values, b: Values, c: Values) -> Values:
        y = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        y = y if ins.types[-1] == "f64" else y.astype(np.float32)
        return np.maximum(y, np.float32(0)) if "relu" in ins.parts else y

    return _number(ins, fma, "rn", "ftz", "sat", "relu")


@_op("min", "max")
def _min_max(ins: Instr) -> Step:
    largest = ins.parts[0] == "max"
    keeps_nan = ins.types[-1] not in _FLOATS or "NaN" in ins.parts
    two: Any = (np.maximum if largest else np.minimum) if keeps_nan else (np.fmax if largest else np.fmin)
    if "relu" in ins.parts:
        if ins.types != ["s32"]:
            raise PtxError(ins.op)
        return _apply(ins, "s32", lambda a, b: np.maximum(two(a, b), np.int32(0)))
    # Three operands from sm_100 on.
    return _number(ins, lambda a, b, *more: two(two(a, b), *more) if more else two(a, b), "ftz", "NaN")


@_op("neg", "abs")
def _neg_abs(ins: Instr) -> Step:
    kind, negate = _kind(ins, "ftz"), ins.parts[0] == "neg"
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):  # the sign bits only
        bits = CONTAINER[WIDTH[kind]](0x80008000 & ((1 << 8 * WIDTH[kind]) - 1))
        return _apply(ins, f"b{8 * WIDTH[kind]}", (lambda x: x ^ bits) if negate else (lambda x: x & ~bits))
    return _number(ins, np.negative if negate else np.abs, "ftz")


@_op("div")
def _div(ins: Instr) -> Step:
    floats = ins.types[-1] in _FLOATS
    return _number(ins, np.divide if floats else _quotient, "rn", "full", "approx", "ftz")


def _quotient(a: Values, b: Values) -> Values:
    """Toward zero; all ones where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    ones, safe = ~b.dtype.type(0), np.where(b == 0, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ones, q)


_op("rem")(lambda ins: _apply(ins, _kind(ins), lambda a, b: a - _quotient(a, b) * b))

for _name, _function in {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x.astype(np.float64)),
    "rcp": lambda x: 1 / x.astype(np.float64),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}.items():
    _op(_name)(lambda ins, function=_function: _number(ins, function, "approx", "rn", "full", "ftz"))


# ---------------------------------------------------------------- bits

_op("and")(lambda ins: _apply(ins, _kind(ins), np.bitwise_and))
_op("or")(lambda ins: _apply(ins, _kind(ins), np.bitwise_or))
_op("xor")(lambda ins: _apply(ins, _kind(ins), np.bitwise_xor))
_op("not")(lambda ins: _apply(ins, _kind(ins), np.invert))


@_op("shl", "shr")
def _shift(ins: Instr) -> Step:
    kind, left = _kind(ins), ins.parts[0] == "shl"
    bits, of = 8 * WIDTH[kind], KIND[kind]
    a, b, write = reader(ins.args[1], kind), reader(ins.args[2], "u32"), writer(ins.args[0])

    def run(m: Any) -> None:
        x, n = a(m), b(m)
        y = (np.left_shift if left else np.right_shift)(x, np.minimum(n, np.uint32(bits - 1)).astype(of))
        if left or kind[0] != "s":
            y = np.where(n >= bits, of(0), y)
        write(m, y)

    return run


@_op("shf")
def _funnel(ins: Instr) -> Step:
    left, wrap = "l" in ins.parts, "wrap" in ins.parts

    def function(low: Values, high: Values, n: Values) -> Values:
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return _apply(ins, "u32", function)


@_op("bfe")
def _extract(ins: Instr) -> Step:
    kind = _kind(ins)
    if WIDTH[kind] != 4:
        raise PtxError(ins.op)

    def function(bits: Values, at: Values, n: Values) -> Values:
        x = bits.view(KIND[kind]).astype(np.int64)
        at, n = (at & np.uint32(255)).astype(np.int64), (n & np.uint32(255)).astype(np.int64)
        y = (x >> np.minimum(at, 63 if kind == "u32" else 31)) & ((np.int64(1) << np.minimum(n, 32)) - 1)
        if kind == "s32":
            top = np.maximum(np.minimum(at + n - 1, 31), 0)
            kept = np.minimum(n, np.maximum(32 - at, 0))
            y = np.where((n > 0) & ((x >> top) & 1 == 1), y | (np.int64(-1) << kept), y)
        return y.astype(np.uint32)

    return _apply(ins, "u32", function)


@_op("bfi")
def _insert(ins: Instr) -> Step:
    def function(a: Values, b: Values, at: Values, n: Values) -> Values:
        one, most = np.uint64(1), np.uint64(32)
        at, n = (np.minimum((x & np.uint32(255)).astype(np.uint64), most) for x in (at, n))
        mask = ((one << n) - one) << at
        return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << at) & mask)).astype(np.uint32)

    return _apply(ins, "u32", function)


@_op("lop3")
def _lop3(ins: Instr) -> Step:
    *args, immediate = ins.args
    if not isinstance(immediate, Imm):
        raise PtxError(ins.text)
    table = int(immediate.text.rstrip("U"), 0)

    def function(a: Values, b: Values, c: Values) -> Values:
        y = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                y = y | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return y

    return _apply(Instr(ins.op, args, ins.pred, ins.line, ins.loc, ins.text), "b32", function)


@_op("prmt")
def _prmt(ins: Instr) -> Step:
    _kind(ins)

    def function(a: Values, b: Values, s: Values) -> Values:
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        y = np.uint32(0)
        for i in range(4):
            pick = (s >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte >= 128, np.uint32(255), np.uint32(0))
            y = y | (np.where(pick >= 8, sign, byte).astype(np.uint32) << np.uint32(8 * i))
        return y

    return _apply(ins, "b32", function)


@_op("clz")
def _clz(ins: Instr) -> Step:
    if _kind(ins) != "b32":
        raise PtxError(ins.op)
    return _apply(ins, "b32", lambda x: np.uint32(32) - np.frexp(x.astype(np.float64))[1].astype(np.uint32))


# ---------------------------------------------------------------- comparison and choice

_COMPARE: dict[str, Callable[..., Values]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def _comparison(name: str, kind: str) -> Callable[..., Values]:
    if kind not in _FLOATS:
        return _COMPARE[name]

    def unordered(a: Values, b: Values) -> Values:
        return np.isnan(a) | np.isnan(b)

    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name == "nan":
        return unordered
    compare = _COMPARE[name[:2]]
    if name.endswith("u"):
        return lambda a, b: compare(a, b) | unordered(a, b)
    return (lambda a, b: compare(a, b) & ~unordered(a, b)) if name == "ne" else compare


@_op("setp")
def _setp(ins: Instr) -> Step:
    parts = [part for part in ins.parts[1:] if part != "ftz"]
    kind, combine = parts[-1], None
    compare = _comparison(parts[0], kind)
    if len(parts) == 3:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[1]]
    a, b = reader(ins.args[1], kind), reader(ins.args[2], kind)
    c = reader(ins.args[3], "pred") if combine else None
    dest = ins.args[0]
    first, second = (writer(dest.first), writer(dest.second)) if isinstance(dest, TwoResults) else (writer(dest), None)

    def run(m: Any) -> None:
        found = compare(_widen(a(m), kind), _widen(b(m), kind))
        first(m, combine(found, c(m)) if combine and c else found)
        if second:
            second(m, combine(~found, c(m)) if combine and c else ~found)

    return run


@_op("selp")
def _selp(ins: Instr) -> Step:
    kind = _kind(ins)
    a, b, p, write = (
        reader(ins.args[1], kind),
        reader(ins.args[2], kind),
        reader(ins.args[3], "pred"),
        writer(ins.args[0]),
    )
    return lambda m: write(m, np.where(p(m), a(m), b(m)))


# ---------------------------------------------------------------- moves and conversions


@_op("mov")
def _mov(ins: Instr) -> Step:
    kind = _kind(ins)
    dest, source = ins.args
    whole = f"b{8 * WIDTH[kind]}"
    if isinstance(dest, Vec):
        part, writes, read = (
            CONTAINER[WIDTH[kind] // len(dest.items)],
            [writer(d) for d in dest.items],
            reader(source, whole),
        )

        def unpack(m: Any) -> None:
            pieces = np.ascontiguousarray(m.spread(read(m))).view(part).reshape(-1, len(writes))
            for i, write in enumerate(writes):
                write(m, np.ascontiguousarray(pieces[:, i]))

        return unpack
    write = writer(dest)
    if isinstance(source, Vec):
        reads = [reader(s, f"b{8 * WIDTH[kind] // len(source.items)}") for s in source.items]

        def pack(m: Any) -> None:
            pieces = np.stack([m.spread(read(m)) for read in reads], axis=1)
            write(m, pieces.view(KIND[whole]).reshape(-1))

        return pack
    read = reader(source, kind)
    return lambda m: write(m, np.array(read(m)))


@_op("cvta")
def _cvta(ins: Instr) -> Step:
    if "shared" in ins.parts:
        raise PtxError(ins.op)
    return _apply(ins, "b64", np.array)


_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@_op("cvt")
def _cvt(ins: Instr) -> Step:
    rounding = next((part for part in ins.parts[1:] if part in ("rn", "rz", "rna", *_ROUNDING)), None)
    satfinite, ftz = "satfinite" in ins.parts, "ftz" in ins.parts
    left = [part for part in ins.parts[1:] if part not in (rounding, "satfinite", "ftz")]
    if len(left) != 2:
        raise PtxError(ins.op)
    to, source = left
    if to.endswith("x2") or source.endswith("x2"):
        return _cvt_pairs(ins, to, source, rounding, satfinite)
    if satfinite or to not in WIDTH or source not in WIDTH:
        raise PtxError(ins.op)
    floats = (*FLOAT, "bf16")
    if (rounding, to, source) == ("rna", "tf32", "f32"):
        return _apply(ins, "b32", lambda x: (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if source == to == "f32" and rounding in _ROUNDING:
        return _apply(ins, source, _ROUNDING[rounding])
    if source in floats and to in floats:
        if rounding not in ((None, "rn", "rz") if to in _NARROW else (None, "rn")):
            raise PtxError(ins.op)

        def between(x: Values) -> Values:
            x = _widen(x, source)
            y = _NARROW[to](x, rounding or "rn") if to in _NARROW else x.astype(KIND[to])
            return _flush(y) if ftz and to == "f32" else y

        return _apply(ins, source, between)
    if source in floats:  # to an integer: saturates, NaN is 0
        whole, limits, target = _ROUNDING[rounding or ""], np.iinfo(KIND[to]), KIND[to]

        def to_integer(x: Values) -> Values:
            x = whole(_widen(x, source).astype(np.float64))
            x = np.where(np.isnan(x), 0.0, x)
            y = np.clip(x, float(limits.min), float(limits.max)).astype(target)
            y = np.where(x >= float(limits.max), target(limits.max), y)
            return np.where(x <= float(limits.min), target(limits.min), y)

        return _apply(ins, source, to_integer)
    if to in floats:
        if rounding != "rn":
            raise PtxError(ins.op)
        if to == "bf16":
            return _apply(ins, source, lambda x: f32_to_bf16(x.astype(np.float32)))
    return _apply(ins, source, lambda x: x.astype(KIND[to]))


def _cvt_pairs(ins: Instr, to: str, source: str, rounding: str | None, satfinite: bool) -> Step:
    """To and from two values in one register: fp32 to 16 bits, fp32 or fp16 to fp8, fp8 to fp16."""
    to_half, fp8 = to.removesuffix("x2"), {"e4m3": tensor_cores.E4M3, "e5m2": tensor_cores.E5M2}
    if to_half in _NARROW and source == "f32" and not satfinite:
        narrow = _NARROW[to_half]

        def pair(high: Values, low: Values) -> Values:
            high, low = narrow(high, rounding).astype(np.uint32), narrow(low, rounding).astype(np.uint32)
            return (high << np.uint32(16)) | low

        return _apply(ins, "f32", pair)
    if to_half in fp8 and source in ("f32", "f16x2") and rounding == "rn" and satfinite:

        def bytes_of(high: Values, low: Values) -> Values:
            return (to_fp8(high, to_half).astype(np.uint16) << np.uint16(8)) | to_fp8(low, to_half).astype(np.uint16)

        if source == "f32":
            return _apply(ins, "f32", bytes_of)

        def halves(both: Values) -> Values:
            parts = np.asarray(both >> np.uint32(16)).astype(np.uint16), np.asarray(both).astype(np.uint16)
            return bytes_of(*(part.view(np.float16) for part in parts))

        return _apply(ins, "b32", halves)
    if source.removesuffix("x2") in fp8 and to == "f16x2":
        table = fp8[source.removesuffix("x2")].astype(np.float16).view(np.uint16).astype(np.uint32)
        return _apply(ins, "b16", lambda x: table[x & np.uint16(255)] | (table[x >> np.uint16(8)] << np.uint32(16)))
    raise PtxError(ins.op)
