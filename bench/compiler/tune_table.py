"""What ranking and measuring share: what the compiler said of each config, the table to go on with, old against new."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.compiler import ranking
from bench.compiler.audit import in_child
from bench.ops.common import Family
from bench.reports.tables import print_table, terminal
from fastgpt.common import UserError, load_json, write_whole
from fastgpt.kernels import tuning

ENTRY_FIELDS = ("origin", "config", "resources", "evidence")
HINTS = Path(__file__).parents[1] / "hints"
"""Tables of tiles for matmuls that cuBLAS can compute, ranked by the model: what bench.tune times first on such a card.
Training never reads them, as nothing but a measurement takes a matmul from cuBLAS."""


Compiled = tuple[list[ranking.Facts], dict[str, int], str]
"""A family as compiled: every config, the default config, the compiler."""


@contextmanager
def compiled_ahead(chosen: Sequence[Family], arch: int) -> Iterator[Callable[[Family], Compiled]]:
    """Inside, families are compiled for sm_``arch`` in order, in as many processes as there are cores but one, while others are
    measured or ranked. Yields what waits for a family; raises RuntimeError if its process ends in an error."""
    children = Children()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        futures = {family.name: pool.submit(facts_of, family, arch, children) for family in chosen}
        try:
            yield lambda family: futures[family.name].result()
        finally:
            for future in futures.values():
                future.cancel()
            children.end()


class Children:
    """Processes that end when they are told to, those that are yet to come included."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen] = []
        self._ended = False

    def add(self, child: subprocess.Popen) -> None:
        self._all.append(child)
        if self._ended:
            child.kill()

    def end(self) -> None:
        self._ended = True
        for child in list(self._all):
            child.kill()


def facts_of(family: Family, arch: int, children: Children | None = None) -> Compiled:
    """A family's configs compiled for sm_``arch``, from the cache directory if they are there: compiling takes up to some
    minutes. ``children`` gets the compiling process. Raises RuntimeError if that ends in an error."""
    import triton

    path = tuning.user_folder() / "compiled" / f"sm{arch}-{_slug(family.name)}.json"
    fingerprint = f"triton {triton.__version__} {_sources(family)}"
    try:
        kept = load_json(path)
        if kept["fingerprint"] != fingerprint:
            raise ValueError
    except (UserError, ValueError, KeyError, TypeError):
        kept = {**_compile(family, arch, children or Children()), "fingerprint": fingerprint}
        try:
            write_whole(path, json.dumps(kept))
        except OSError as error:
            print(f"what was compiled is not kept: {error}", file=sys.stderr)
    return [ranking.Facts(**one) for one in kept["facts"]], kept["default"], kept["compiler"]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)


def _sources(family: Family) -> str:
    """Hash of the kernel's file, whose change makes what was compiled out of date, and of the configs that are compared."""
    file = inspect.getsourcefile(tuning.spaces()[family.kernel].function)
    assert file is not None
    source = Path(file).read_bytes()
    return hashlib.sha256(source + json.dumps(family.configs()).encode()).hexdigest()[:16]


def _compile(family: Family, arch: int, children: Children) -> dict[str, Any]:
    return in_child("tune_child", {"arch": arch, "family": family.name}, children.add)


def open_table(path: Path, target: tuning.Target, gpu: str) -> tuning.Table:
    """The table at ``path`` to go on with, or an empty one. Raises UserError rather than overwrite one it cannot read."""
    if not path.exists():
        return tuning.Table(target, gpu, "")
    try:
        table = tuning.read(path)
        for key in table.entries:
            table.check(key.kernel)
        return table
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tuning table {path} cannot be used ({error}): delete it, or name another by --out"
        ) from None


def save(table: tuning.Table, path: Path) -> None:
    """Write the file whole or not at all, one line per entry. Raises UserError where nothing can be written."""
    about = {"schema": tuning.SCHEMA, "schema_version": tuning.SCHEMA_VERSION, "arch": f"sm_{table.target.arch}"}
    about |= {"sms": table.target.sms, "shared_per_block": table.target.shared}
    about |= {"gpu": table.gpu, "compiler": table.compiler}
    lines = [
        "\n  " + json.dumps({**entry.key._asdict(), **{name: getattr(entry, name) for name in ENTRY_FIELDS}})
        for entry in sorted(table.entries.values(), key=lambda entry: entry.key)
    ]
    text = json.dumps(about, indent=1)[:-2] + ',\n "entries": [' + ",".join(lines) + "\n ]\n}\n"
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"the tuning table {path} cannot be written ({error.strerror}): name another") from None


UNCHANGED = "(the same)"


def change(entry: tuning.TableEntry, old: dict[str, int], figure: float | None) -> list[str]:
    new = UNCHANGED if entry.config == old else tuning.brief(entry.config)
    return [" ".join(entry.key), tuning.brief(old), new, "-" if figure is None else f"{figure:.3f}"]


def print_changes(rows: list[list[str]], *figures: str) -> None:
    """A line per entry that ``change`` has made: dim where the config stays as it was."""
    if rows:
        cells = [["kernel, dtype, bucket", "old", "new", *figures], *rows]
        print_table(terminal(150), "", cells, lambda row: "dim" if row[2] == UNCHANGED else None, narrow=True)
