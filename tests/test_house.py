"""The layout that CONTRIBUTING.md describes, read from the imports of every file.

No arrow runs up, none runs in a circle, no module uses another's private name, and a class name stands once.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = ("train", "sample", "plan", "convert", "plot", "hellaswag", "nanogpt", "env", "__main__")


def table() -> dict[str, tuple[str, ...]]:
    """Room -> the rooms that it may import besides itself, from CONTRIBUTING.md, in its order: lowest first."""
    found: dict[str, tuple[str, ...]] = {}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, allowed in re.findall(r"^\| (`[\w/]+`|commands) \|.*\| (.*?) ?\|$", text, re.MULTILINE):
        rooms = tuple(found) if allowed.startswith("all of the above") else tuple(re.findall(r"`([\w/]+)`", allowed))
        for room in COMMANDS if name == "commands" else (name.strip("`"),):
            found[room] = rooms
    return found


FASTGPT = table()
RULES = {**FASTGPT, "__init__": tuple(FASTGPT)}  # the package itself: public names, imported when they are asked for

BENCH_ROOMS = ("parity", "emulator", "ops", "steps", "compiler", "numerics", "reports")


def sources() -> list[Path]:
    return [path for top in ("fastgpt", "bench") for path in sorted((ROOT / top).rglob("*.py"))]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in sources()}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, str | None, str]]:
    """(module of ours, name taken from it or None, local name) of every import in a file, those inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in MODULES:
                    yield full, None, alias.asname or alias.name
                elif node.module in MODULES:
                    yield node.module, alias.name, alias.asname or alias.name


def room(name: str) -> str:
    top, *rest = name.split(".")
    if not rest:
        return "__init__"
    if rest[-1] == "__main__":  # a room's own command: python -m fastgpt.doctor
        return "__main__"
    return "kernels/fp8" if rest[:2] == ["kernels", "fp8"] else rest[0]


ARROWS = sorted({(module(path), target) for path in sources() for target, _, _ in imports(path)})


def test_every_room_is_in_the_table_and_names_only_rooms_above_it():
    found = {room(name) for name in MODULES if name.startswith("fastgpt")}
    assert found == set(RULES), "CONTRIBUTING.md has a row for each room, and none else"
    above: list[str] = []
    for name, allowed in FASTGPT.items():
        assert set(allowed) <= set(above), f"{name} may import a room that is not above it"
        above += [] if name in COMMANDS else [name]


def test_no_arrow_runs_up():
    wrong = []
    for source, target in ARROWS:
        if target == "fastgpt":  # the version number
            continue
        a, b = room(source), room(target)
        if source.startswith("fastgpt") and (target.startswith("bench") or (a != b and b not in RULES[a])):
            wrong.append(f"{source} -> {target}")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_command():
    commands = {f"fastgpt.{name}" for name in COMMANDS}
    benches = {name for name in MODULES if name.startswith("bench.") and room(name) not in BENCH_ROOMS}
    wrong = [f"{source} -> {target}" for source, target in ARROWS if target in commands | benches and source != target]
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    # The package's own names are found when they are asked for, and imported for type checkers only.
    arrows = {name: {b for a, b in ARROWS if a == name != "fastgpt"} for name in MODULES}

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for nxt in arrows[todo.pop()] - seen:
                seen.add(nxt)
                todo.append(nxt)
        return seen

    circles = sorted(name for name in MODULES if name not in ("fastgpt",) and name in reachable(name))
    assert not circles, "\n".join(circles)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_foreign_private_name():
    wrong = []
    for path in sources():
        modules = {}
        for target, name, local in imports(path):
            if name is None:
                modules[local] = target
            elif private(name):
                wrong.append(f"{module(path)}: from {target} import {name}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and private(node.attr) and isinstance(node.value, ast.Name):
                owner = modules.get(node.value.id)
                if owner is not None:
                    wrong.append(f"{module(path)}: {owner}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_class_names_are_distinct():
    places: dict[str, list[str]] = {}
    for path in sources():
        if module(path) == "bench.steps.nanogpt":  # somebody else's model, under its own names
            continue
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module(path))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not twice, twice
