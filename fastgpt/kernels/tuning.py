"""Which launch config for which GPU and shape: tables looked up at the first launch of a shape bucket, never a search.

A kernel is registered by the decorator ``space``, with its name in the tables and every config that is compared for it. Its
launcher asks ``choose``, naming the kernel, the dtype it reads, its shape bucket, and a safe default. Buckets are coarse on
purpose: a bucket is one config, so a new batch size or sequence length compiles a kernel at most once per bucket.

A launch happens hundreds of times per step, so the question is a function of hashable arguments under ``cached``, one look-up
in a dictionary when it was asked before, and what it answers is the launch itself, prepared::

    @tuning.cached
    def _prepared(kernel: Any, dtype: torch.dtype, n: int, C: int, device: torch.device) -> runtime.Launch:
        choice = tuning.choose("layer_norm.forward", dtype, f"C{C}", device, default={"rows": 4, "num_warps": 4})
        rows, num_warps = choice.config["rows"], choice.config["num_warps"]
        return runtime.Launch(kernel, (runtime.cdiv(n, rows),), choice, ROWS=rows, num_warps=num_warps)

    _prepared(layer_norm_forward_kernel, x.dtype, n, C, x.device)(x, y)

Beside its arguments such a function may read only what does not change, or what calls ``choose_again`` when it does: the
tables, ``forced``, refused configs, compile-only runs. A test that replaces something else calls ``forget``. The current
device, and what is done about a config that does not fit, are an operator's (operators.py).

The answer comes from tables, one JSON file per architecture and SM count: the user's own in
``common.cache_dir()/tuning`` (``python -m bench.tune`` measures it) before those shipped in ``tables/``. Among the
files of the device's architecture whose shared-memory limit it has, the nearest SM count that has an entry for the
bucket wins; if none has one, the default. Each entry says whether it was ``measured`` on such a card or ``ranked`` by the
model of bench/compiler/ranking.py, from what the compiler reports of it.

A table that is damaged, or made for another architecture, is left out with one warning. So are a table's entries for a kernel
if one of them has a config outside the kernel's space; this is checked when the kernel first asks. A config that turns out not
to fit when it is launched is replaced by the default, with one warning. Training goes on in all cases. Nothing here touches a
GPU at import.

A matmul that cuBLAS can compute (``has_library``) is left to cuBLAS unless an entry ``measured`` on a card of this SM count
says otherwise. What the model ranks for such a matmul is a hint for bench.tune, and in no table.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from fastgpt.common import UserError, cache_dir, load_json
from fastgpt.hardware import cards
from fastgpt.kernels import runtime

SCHEMA, SCHEMA_VERSION = "fastgpt.tuning", 1
ORIGINS = ("measured", "ranked")
SHIPPED = Path(__file__).parent / "tables"
Config = dict[str, int]
"""What a launcher passes on to its kernel: integers by name."""
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CUBLAS: Config = {"cublas": 1}
"""The config of a matmul that cuBLAS computes; what follows it then is a sweep over memory of its own."""


# ---------------------------------------------------------------- spaces


class Space(NamedTuple):
    """What is registered of a kernel."""

    function: Callable
    """The Python function under ``@triton.jit``: its ``__name__`` is what a profiler sees."""
    configs: list[Config]


_spaces: dict[str, Space] = {}
Kernel = TypeVar("Kernel")


def space(kernel: str, configs: Iterable[Config]) -> Callable[[Kernel], Kernel]:
    """Decorates a @triton.jit function: ``kernel`` is its name in the tables, ``configs`` are all that it may have there. A
    function that does several jobs has a name for each."""

    def register(function: Any) -> Any:
        _spaces[kernel] = Space(function.fn, list(configs))
        return function

    return register


def spaces() -> dict[str, Space]:
    """Every kernel whose file has been imported, by its name in the tables."""
    return dict(_spaces)


def contains(kernel: str, config: object) -> bool:
    """Whether ``config`` is one of ``kernel``'s, with integers for values."""
    if not isinstance(config, dict) or not all(type(value) is int for value in config.values()):
        return False
    return kernel in _spaces and config in _spaces[kernel].configs


def has_library(kernel: str) -> bool:
    """Whether cuBLAS competes with ``kernel``: it then computes until a measurement on such a card says otherwise."""
    return kernel in _spaces and CUBLAS in _spaces[kernel].configs


def brief(config: Config) -> str:
    """``128x128x64 w8 s3 chunk=2``, or ``BLOCK_M=128 BLOCK_N=32 w8 s3``; ``cuBLAS``."""
    values = dict(config)
    if values == CUBLAS:
        return "cuBLAS"
    blocks = [str(values.pop(key)) for key in ("block_m", "block_n", "block_k") if key in values]
    values.pop("group", None)
    short = {"num_warps": "w", "num_stages": "s"}
    words = [f"{short.get(key, key + '=')}{value}" for key, value in values.items()]
    return " ".join((["x".join(blocks)] if blocks else []) + words)


@lru_cache
def source_hash(kernel: str) -> str:
    """What an entry of a table is bound to: hash of the kernel's code and of all functions under @triton.jit that it calls, as
    they are compiled. Comments, docstrings and where they stand do not count."""
    from triton.language import constexpr

    functions: list[Any] = [_spaces[kernel].function]
    parts = []
    for function in functions:
        words = tokenize.generate_tokens(io.StringIO(textwrap.dedent(inspect.getsource(function))).readline)
        code: list[str] = []
        before = tokenize.NEWLINE
        for kind, word, *_ in words:
            docstring = kind == tokenize.STRING and before == tokenize.INDENT
            if kind in (tokenize.COMMENT, tokenize.NL) or docstring:
                continue
            code.append({tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: ";"}.get(kind, word))
            before = kind
        parts.append(" ".join(code[code.index("def") :]).replace("{ ;", "{"))  # the end of a docstring's line
        for name in function.__code__.co_names:
            used = function.__globals__.get(name)
            called = getattr(used, "fn", None)
            if called is not None and called.__module__.startswith("fastgpt.") and called not in functions:
                functions.append(called)
            elif isinstance(used, constexpr):
                parts.append(f"{name}={used.value}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- tables


class Target(NamedTuple):
    """What a table is for: compute capability (89 is 8.9), SMs, and the bytes of shared memory that a block may take."""

    arch: int
    sms: int
    shared: int

    @property
    def file_name(self) -> str:
        return f"sm{self.arch}_{self.sms}.json"


class Key(NamedTuple):
    """What one entry of a table is for: "attention.forward", "bf16", "D64 rows<=262144"."""

    kernel: str
    dtype: str
    bucket: str


@dataclass(frozen=True)
class TableEntry:
    """``origin``: one of ORIGINS. ``resources``: what the compiler reports of the config. ``evidence``: for a ranked entry
    the model's time over the default's, and wave fill; for a measured one its own and the default's milliseconds."""

    key: Key
    config: Config
    origin: str
    resources: dict[str, int]
    evidence: dict[str, Any]


def is_of_older_code(entry: TableEntry) -> bool:
    """Whether the kernel has changed, other than in its comments, since the entry was made; also where the entry does not say
    for which code it was."""
    return entry.evidence.get("source") != source_hash(entry.key.kernel)


@dataclass
class Table:
    target: Target
    gpu: str
    compiler: str
    """Such as "triton 3.7.1"."""
    entries: dict[Key, TableEntry] = field(default_factory=dict)
    path: Path | None = None
    """The file that it was read from."""

    def check(self, kernel: str) -> None:
        """Raise ValueError if an entry for ``kernel`` has a config that is not in its space."""
        for key, entry in self.entries.items():
            if key.kernel == kernel and not contains(kernel, entry.config):
                raise ValueError(f"config {entry.config} of {' '.join(key)} is not one that this version knows")


def read(path: Path) -> Table:
    """The table in a file, whose configs are not checked yet (``Table.check``). Raises ValueError, saying what is wrong with
    it; OSError if it cannot be read."""
    try:
        found = load_json(path)
    except UserError as error:
        raise ValueError(str(error)) from error
    try:
        if (found["schema"], found["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"schema {found['schema']!r} version {found['schema_version']!r} is not of this version")
        target = Target(int(found["arch"].removeprefix("sm_")), found["sms"], found["shared_per_block"])
        if path.name != target.file_name:
            raise ValueError(f"it is the table of sm_{target.arch} with {target.sms} SMs, {target.file_name}")
        table = Table(target, str(found["gpu"]), str(found["compiler"]), path=path)
        for item in found["entries"]:
            entry = _entry(item, target)
            table.entries[entry.key] = entry
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an entry is missing or has the wrong type: {error}") from None
    return table


def _entry(item: dict[str, Any], target: Target) -> TableEntry:
    key = Key(item["kernel"], item["dtype"], item["bucket"])
    config, resources = item["config"], item["resources"]
    if item["origin"] not in ORIGINS:
        raise ValueError(f"origin {item['origin']!r} of {' '.join(key)} is not one of {', '.join(ORIGINS)}")
    if resources["shared"] > target.shared:
        raise ValueError(f"config of {' '.join(key)} takes {resources['shared']:,} bytes of shared memory")
    return TableEntry(key, config, item["origin"], dict(resources), dict(item["evidence"]))


def user_folder() -> Path:
    return cache_dir() / "tuning"


@lru_cache(maxsize=16)
def _tables(arch: int, folders: tuple[Path, ...]) -> tuple[Table, ...]:
    """Those of an architecture. Damaged ones are left out with a warning."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob(f"sm{arch}_*.json")):
            try:
                found.append(read(path))
            except (ValueError, OSError) as error:
                _warn_of(path, getattr(error, "strerror", None) or error)
    return tuple(found)


def _warn_of(path: Path | None, why: object) -> None:
    warnings.warn(
        f"tuning table {path} is left out ({why}): the next best config is used; delete the file, or measure again with "
        "python -m bench.tune",
        stacklevel=2,
    )


@lru_cache(maxsize=256)
def _tables_for(kernel: str, arch: int, folders: tuple[Path, ...]) -> tuple[Table, ...]:
    """The tables whose entries for ``kernel`` are of this version. Checked here, once the kernel's file has registered its
    space, and not when the table is read: it has entries for kernels that this process may never import."""
    found = []
    for table in _tables(arch, folders):
        try:
            table.check(kernel)
            found.append(table)
        except ValueError as error:
            _warn_of(table.path, error)
    return tuple(found)


def entries_for(key: Key, target: Target, *more: Path) -> list[tuple[TableEntry, Table]]:
    """Entries that serve ``key`` on ``target``, best first: by distance in SMs, the user's before shipped ones, and these
    before those in ``more`` folders."""
    serving = [
        table
        for table in _tables_for(key.kernel, target.arch, (user_folder(), SHIPPED, *more))
        if key in table.entries and table.entries[key].resources["shared"] <= target.shared
    ]
    serving.sort(key=lambda table: abs(table.target.sms - target.sms))  # and, as they came, by folder
    return [(table.entries[key], table) for table in serving]


# ---------------------------------------------------------------- look-up


@dataclass(frozen=True)
class Choice:
    """A config and why: ``source`` is "measured", "ranked" (of which table), "forced" or "default"."""

    key: Key
    config: Config
    default: Config
    source: str
    device: torch.device
    """Where it is launched."""


_cached: list[Any] = []
"""The functions under ``cached``."""
_forced: dict[str, Config] = {}
_refused: set[tuple] = set()
"""(kernel, sorted items of a config) that this GPU had no room for."""

Function = TypeVar("Function", bound=Callable)


def cached(answer: Function) -> Function:
    """Decorates a function that answers which config a launch takes: it is called once per arguments, until
    ``choose_again``."""
    kept = lru_cache(maxsize=4096)(answer)
    _cached.append(kept)
    return cast(Function, kept)


def choose_again() -> None:
    """Drop the answers of all ``cached`` functions: something has changed that choices depend on."""
    for function in _cached:
        function.cache_clear()


@lru_cache(maxsize=64)
def _cuda_limits(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return 10 * properties.major + properties.minor, shared


def target(device: torch.device) -> Target | None:
    """What launches on ``device`` are compiled for; None in the interpreter and on a CPU."""
    if device.type == "cuda":
        arch, shared = _cuda_limits(device.index if device.index is not None else torch.cuda.current_device())
        return Target(arch, runtime.sm_count(device), shared)
    absent = runtime.compile_only
    if absent is None:
        return None
    return Target(absent, runtime.sm_count(device), cards.ARCHS[f"sm_{absent}"].shared_per_block)


def arch_of(device: torch.device) -> int | None:
    """Compute capability that launches on ``device`` are compiled for: 89. None where nothing is compiled."""
    found = target(device)
    return None if found is None else found.arch


def choose(kernel: str, dtype: torch.dtype, bucket: str | None, device: torch.device, default: Config) -> Choice:
    """The config of ``kernel`` for this dtype, shape bucket and device. ``bucket`` None: no table has such shapes."""
    key = Key(kernel, DTYPES.get(dtype, str(dtype)), bucket or "-")
    if kernel in _forced:
        return Choice(key, _forced[kernel], _forced[kernel], "forced", device)
    here = None if bucket is None else target(device)
    if here is None:
        return Choice(key, default, default, "default", device)
    library = has_library(kernel)
    for entry, table in entries_for(key, here):
        if _name(kernel, entry.config) in _refused:
            continue
        if library and not (entry.origin == "measured" and table.target.sms == here.sms):
            continue
        exact = "" if table.target.sms == here.sms else f", {table.target.sms} SMs"
        whose = "your table, " if table.path is not None and table.path.parent == user_folder() else ""
        return Choice(key, entry.config, default, f"{entry.origin} ({whose}{table.gpu}{exact})", device)
    return Choice(key, default, default, "default: never measured" if library else "default", device)


def _name(kernel: str, config: Config) -> tuple:
    return kernel, tuple(sorted(config.items()))


def refuse(found: runtime.NoRoom) -> None:
    """Never choose this config again, as it does not fit the card. Raises triton's error if it is the default."""
    choice = found.choice
    if choice.config == choice.default:
        raise found.error
    name = _name(choice.key.kernel, choice.config)
    choose_again()  # each time: another thread may have kept the choice just after it was refused
    if name in _refused:
        return
    _refused.add(name)
    warnings.warn(
        f"the tuning table's config {choice.config} of {choice.key.kernel} does not fit this GPU ({found.error}): "
        "the default is used; measure again with python -m bench.tune",
        stacklevel=3,
    )


def announce(choice: Choice) -> None:
    """Tell the listener of a choice: for what is not a runtime.Launch, which does."""
    if runtime.listener is not None:
        runtime.listener(choice)


@contextmanager
def heard(listener: Callable[[Choice], None]) -> Iterator[None]:
    """Inside, ``listener`` is told of the choice of every launch."""
    before, runtime.listener = runtime.listener, listener
    try:
        yield
    finally:
        runtime.listener = before


@contextmanager
def forced(configs: dict[str, Config]) -> Iterator[None]:
    """Inside, these kernels run with these configs, whatever the tables say: for comparing configs."""
    before = dict(_forced)
    _forced.update(configs)
    choose_again()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        choose_again()


def forget() -> None:
    """Read the tables anew at the next launch: after one was written, or for tests."""
    _tables.cache_clear()
    _tables_for.cache_clear()
    _refused.clear()
    choose_again()
