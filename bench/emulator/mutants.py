"""Is a missing barrier noticed? Takes every barrier and every cp.async wait out of kernels in turn, and runs them.

A mutant that survives is either harmless at this shape, or the emulator is blind to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bench.emulator.launch import parse

if TYPE_CHECKING:
    from bench.emulator.cases import Case

_WAITS = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?:bar\.sync|cp\.async\.wait_group).*$", re.MULTILINE)


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """(what was done, changed PTX): without one barrier, or waiting for one group fewer."""
    for found in _WAITS.finditer(text):
        line, what = text.count("\n", 0, found.start()) + 1, " ".join(found[0].split()).rstrip(";")
        changed = "" if "bar.sync" in what else f"cp.async.wait_group {int(what.split()[-1]) + 1};"
        said = f"waits for one group fewer at line {line}" if changed else f"without {what} of line {line}"
        yield said, text[: found.start()] + changed + text[found.end() :]


def survivors(passes: Callable[[Callable[[str], str]], bool]) -> Iterator[tuple[str, int, list[str]]]:
    """(kernel, mutants, those that nobody noticed) of each kernel that ``passes`` launches. It gets a function that changes
    PTX, and returns whether all is well."""
    originals: dict[str, None] = {}

    def note(text: str) -> str:
        originals.setdefault(text)
        return text

    if not passes(note):
        raise ValueError("it fails as it is")
    for original in originals:
        every = list(mutants(original))
        alive = [what for what, changed in every if passes(lambda text: changed if text == original else text)]  # noqa: B023
        yield parse(original).name, len(every), alive


def report(chosen: list[Case], arch: int) -> int:
    """Print them for the kernels of these cases. Returns 0: a survivor is a question, not a fault."""
    from bench.emulator.cases import execute

    total = noticed = 0
    for case in chosen:
        for kernel, made, alive in survivors(lambda change: execute(case, arch, rewrite=change).passed):  # noqa: B023
            print(
                f"{case.name}: {kernel}: {made - len(alive)} of {made} noticed",
                *alive,
                sep="\n  survives: ",
                flush=True,
            )
            total, noticed = total + made, noticed + made - len(alive)
    print(f"{noticed} of {total} mutants noticed")
    return 0
