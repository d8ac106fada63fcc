"""How far a reader, and a change, has to walk: ``python tools/house.py``.

Five operations and one model step run once in Triton's interpreter, traced by ``sys.setprofile``. Of the package's own Python
functions it counts the calls, the files they lie in, and the moves: calls from one of its files into another. Bodies of Triton
kernels are not counted, nor is anything outside the package. Then a two-step ``train.py`` (its modules, its functions), the
files that additions have touched, as git has them, and the lines of each room.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = str(ROOT / "fastgpt") + os.sep

ADDITIONS = {
    "RMS norm with its kernels": "0aeec02 9c45a3f 2de3c16 3884aca -- fastgpt bench",
    "rotary positions (qk_norm_rope)": "4612305 e4a799a -- fastgpt bench",
    "Muon with its kernels": "08e109b 3260a0c 4470c46 6865eb1 -- fastgpt bench",
    "a finding that a log shows (no compiler)": "ee856e4 -- fastgpt/doctor",
}
"""Additions since there are rooms: the commits that made them, and where to count. CONTRIBUTING.md has the figures."""


class Walk(NamedTuple):
    calls: int
    files: int
    moves: int


def walk(work: Callable[[], Any]) -> Walk:
    """What one run of ``work`` enters, once caches are warm."""
    work()
    calls, moves, files = 0, 0, set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls, moves
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(PACKAGE) or _in_kernel(frame):
            return
        calls += 1
        files.add(name)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        moves += caller is not None and caller.f_code.co_filename != name

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return Walk(calls, len(files), moves)


def _in_kernel(frame: FrameType | None) -> bool:
    """Whether Triton's interpreter runs this frame: the kernel's body is a function of our file, but the GPU's work."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(os.path.join("runtime", "interpreter.py")):
            return True
        frame = frame.f_back
    return False


def operations() -> dict[str, Callable[[], Any]]:
    """The public operations of a block and a two-layer model's step, forward and backward, on small CPU tensors."""
    import torch

    from fastgpt import GPT, ModelConfig
    from fastgpt.kernels import layer_norm, linear, mlp, qkv_attention
    from fastgpt.ops import TRITON

    def leaf(*shape: int) -> Any:
        return torch.randn(*shape, requires_grad=True)

    x, weight, qkv = leaf(2, 16, 32), leaf(32), leaf(2, 16, 96)
    w, w_fc, w_proj = leaf(48, 32), leaf(128, 32), leaf(32, 128)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64), TRITON)
    idx = torch.randint(0, 64, (2, 17))
    return {
        "layer_norm": lambda: layer_norm(x, weight).sum().backward(),
        "linear": lambda: linear(x, w).sum().backward(),
        "qkv_attention": lambda: qkv_attention(qkv, 2).sum().backward(),
        "mlp": lambda: mlp(x, w_fc, None, w_proj, None).sum().backward(),
        "model step": lambda: model(idx[:, :-1], idx[:, 1:])[1].backward(),
    }


_TRAIN = """
import sys, threading
functions = set()
def profile(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith({package!r}):
        functions.add(frame.f_code)
threading.setprofile(profile)
sys.setprofile(profile)
from fastgpt.train import main
code = main(["--device", "cpu", "--kernels", "eager", "--max-iters", "2", "--eval-iters", "1", "--out", {out!r}])
sys.setprofile(None)
named = {{f for f in functions if not f.co_name.startswith("<")}}
modules = [m for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith({package!r})]
print("RESULT", code, len(modules), len({{f.co_filename for f in named}}), len(named))
"""


def train() -> tuple[int, int, int]:
    """Of two steps of train.py: files imported, files entered, functions entered."""
    with tempfile.TemporaryDirectory() as folder:
        script = _TRAIN.format(package=PACKAGE, out=str(Path(folder) / "run"))
        found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    lines = [line.split() for line in found.stdout.splitlines() if line.startswith("RESULT")]
    if not lines or lines[0][1] != "0":
        raise SystemExit(f"train.py failed:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    modules, files, functions = map(int, lines[0][2:])
    return modules, files, functions


def touched(commits: str) -> int:
    """Files of code, new ones included, in which these commits changed something; 0 where git does not have them."""
    command = ["git", "show", "--format=", "--name-only", *commits.split()]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return len({name for name in found.stdout.splitlines() if name.endswith((".py", ".toml"))})


def sources() -> list[Path]:
    return [path for room in ("fastgpt", "bench") for path in sorted((ROOT / room).rglob("*.py"))]


def lines_by_room() -> dict[str, int]:
    found: dict[str, int] = {}
    for path in [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]:
        parts = path.relative_to(ROOT).parts
        room = parts[0] if len(parts) == 2 or parts[0] == "tests" else "/".join(parts[:2])
        found[room] = found.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return found


def main() -> None:
    print(f"{'forward + backward':<24}{'calls':>8}{'files':>8}{'moves':>8}")
    for name, work in operations().items():
        found = walk(work)
        print(f"{name:<24}{found.calls:>8}{found.files:>8}{found.moves:>8}")
    modules, files, functions = train()
    print(f"\ntrain.py, two steps: {modules} files imported, {files} entered, {functions} functions entered")
    print("\nfiles of fastgpt/ and bench/ that an addition touched")
    for name, commits in ADDITIONS.items():
        print(f"  {name:<44}{touched(commits) or 'n/a':>8}")
    print("\nlines of Python")
    rooms = lines_by_room()
    for room, count in rooms.items():
        print(f"  {room:<44}{count:>8,}")
    for top in ("fastgpt", "bench"):
        print(f"  {top + '/ in all':<44}{sum(n for room, n in rooms.items() if room.split('/')[0] == top):>8,}")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    sys.path.insert(0, str(ROOT))
    main()
