"""The diagrams of docs/reading-kernels.md: which program of layer norm and of attention reads and writes what.

    python -m bench.diagrams

Tiles are those of the kernels' default configs, or a fraction of them where a picture would have too many to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from bench.reports import results
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.kernels import fused_attn

PROGRAMS = ("#1f4e79", "#c55a11", "#548235", "#7b4fa3")
UNSEEN, WHOLE, MASKED = "#eeeeee", "#5b9bd5", "#f4b183"


@dataclass(frozen=True)
class DiagramsConfig:
    """Draw the diagrams of docs/reading-kernels.md."""

    out: Annotated[Path, Arg("DIR")] = Path("docs/images")
    """Where layer-norm.png and attention.png go."""


def boxes(ax: Any, x: float, y: float, width: float, height: float, colours: list[str], label: str = "") -> None:
    """A column of boxes from y downwards, one for each colour, with a label above."""
    for row, colour in enumerate(colours):
        box = (x, y - (row + 1) * height), width, height
        ax.add_patch(rectangle(*box, facecolor=colour, edgecolor="white", linewidth=1))
    ax.text(x + width / 2, y + 0.15, label, ha="center", va="bottom", fontsize=9)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#444444", "lw": 1.3})
    if label:
        ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1, label, ha="center", va="bottom", fontsize=8)


def rectangle(*where: Any, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*where, **style)


def panels(count: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, count)


def layer_norm(path: Path) -> None:
    """Forward: whole rows to a program. Backward: tiles in turn, sums of columns in registers."""
    figure, (forward, backward) = panels(2, (12, 4.6))
    tiles = [PROGRAMS[i % 4] for i in range(12)]
    for ax, title in (
        (forward, "forward: a program owns a few whole rows"),
        (backward, "backward: 4 programs, 12 tiles"),
    ):
        ax.set(xlim=(-0.3, 12.3), ylim=(-1.6, 7.3))
        ax.set_axis_off()
        ax.set_title(title, loc="left", fontweight="bold")

    quarter = [PROGRAMS[0], *["#d9d9d9"] * 11]
    for x, label in ((0, "x"), (1.5, "residual")):
        boxes(forward, x, 6, 1.2, 0.5, quarter, label)
    arrow(forward, (2.8, 5.75), (4.0, 5.75), "read\nonce")
    forward.text(
        4.1, 5.95, "registers of one program:\n\ns = dropout(x) + residual\nmean = Σ s / C\nvar = Σ (s − mean)² / C\n"
        "y = (s − mean) rstd w + b", va="top", fontsize=9, bbox={"facecolor": "#e9f0f8", "edgecolor": PROGRAMS[0]},
    )  # fmt: skip
    arrow(forward, (7.75, 5.75), (8.7, 5.75), "written\nonce")
    for x, label, width in ((8.8, "y", 1.2), (10.2, "s", 1.2), (11.7, "mean,\nrstd", 0.25)):
        boxes(forward, x, 6, width, 0.5, quarter, label)
    forward.text(0, -0.55, "every row depends on itself alone: no program waits for another", fontsize=9)
    forward.text(0, -1.1, "saved for backward: s, mean, rstd; no mask, dropout is drawn anew", fontsize=9)

    for x, label in ((0, "s"), (1.5, "dy")):
        boxes(backward, x, 6, 1.2, 0.5, tiles, label)
    arrow(backward, (2.8, 5.75), (3.6, 5.75))
    for i, colour in enumerate(PROGRAMS):
        backward.text(
            3.7, 5.95 - 1.5 * i, f"program {i}: tiles {i}, {i + 4}, {i + 8}\ndw += dy xhat   db += dy",
            va="top", fontsize=8, bbox={"facecolor": "white", "edgecolor": colour},
        )  # fmt: skip
        arrow(backward, (6.9, 5.6 - 1.5 * i), (8.4, 5.75 - 0.5 * i))
    arrow(backward, (5.2, 0.65), (5.2, -0.05))
    boxes(backward, 4.6, -0.1, 1.2, 0.1, tiles)
    backward.text(6.0, -0.9, "dx, a tile at a time", fontsize=9, va="center")
    boxes(backward, 8.5, 6, 1.6, 0.5, list(PROGRAMS), "(programs, C), fp32")
    arrow(backward, (9.3, 3.95), (9.3, 2.75), "")
    backward.text(9.45, 3.3, "a second kernel adds the\nrows in a fixed order:\nno atomics", fontsize=8, va="center")
    boxes(backward, 8.5, 2.7, 1.6, 0.5, ["#444444"])
    backward.text(10.2, 2.45, "dw, db", fontsize=9, va="center")
    _save(figure, path)


def blocks(ax: Any, seen: np.ndarray, rows: int, cols: int) -> None:
    """Which (rows, cols) blocks of the score matrix ``seen`` are visited: all of it seen, some, none."""
    T_q, T_k = seen.shape
    cells = seen.reshape(T_q // rows, rows, T_k // cols, cols).swapaxes(1, 2)
    for (i, j), full in np.ndenumerate(cells.all((2, 3))):
        colour = WHOLE if full else MASKED if cells[i, j].any() else UNSEEN
        corner = (j * cols, T_q - (i + 1) * rows)
        ax.add_patch(rectangle(corner, cols, rows, facecolor=colour, edgecolor="white", linewidth=0.8))
    ax.set(xlim=(-8, T_k + 8), ylim=(-T_q * 0.24, T_q + 8), aspect="equal", xticks=[], yticks=[])
    ax.text(T_k / 2, -8, f"{T_k} keys, in blocks of {cols}", ha="center", va="top")
    ax.set_ylabel(f"{T_q} queries, in blocks of {rows}")
    ax.spines[:].set_visible(False)


def tile(kernel: str, T: int, plain: bool = True) -> tuple[int, int]:
    """Queries and keys of a block at head dimension 64 in bf16."""
    config = fused_attn.config(kernel, torch.bfloat16, 64, T, plain=plain)
    return config["BLOCK_M"], config["BLOCK_N"]


def attention(path: Path, T: int = 512) -> None:
    """Blocks of the score matrix: of a program of queries in forward, of keys in backward, and with documents."""
    figure, axes = panels(3, (13, 5.2))
    query, key = np.arange(T)[:, None], np.arange(T)[None, :]
    ends = np.searchsorted([140, 330], np.arange(T), side="right")
    shown = [
        ("forward, and dQ: a program owns queries", key <= query, tile("forward", T),
         "the program walks along its keys with a running\nmaximum, sum and O: T × T is never in memory"),
        ("dK and dV: a program owns keys", key <= query, tile("backward_kv", T),
         "P is computed again from Q, K and lse; dK and dV have\none owner, which adds in a fixed order: no atomics"),
        ("three documents in one row of tokens", (key <= query) & (ends[:, None] == ends[None, :]),
         tile("forward", T, plain=False),
         "a small kernel notes where documents begin and end,\nso blocks of other documents are not visited"),
    ]  # fmt: skip
    for ax, (title, seen, (rows, cols), caption) in zip(axes, shown):
        blocks(ax, seen, rows, cols)
        ax.set_title(title, loc="left", fontweight="bold", fontsize=10)
        ax.text(0, -55, caption, va="top", fontsize=8.5)
    (rows, _), (_, cols) = shown[0][2], shown[1][2]
    program = {"fill": False, "edgecolor": PROGRAMS[3], "linewidth": 2.5}
    top, left = T - 2 * rows, 3 * cols
    axes[0].add_patch(rectangle((0, top - rows), T, rows, **program))
    arrow(axes[0], (8, top - rows / 2), (3 * rows - 4, top - rows / 2))
    axes[1].add_patch(rectangle((left, 0), cols, T, **program))
    arrow(axes[1], (left + cols / 2, T - left - 4), (left + cols / 2, 6))
    kinds = ((WHOLE, "computed without a mask"), (MASKED, "computed with a mask"), (UNSEEN, "not visited"))
    handles = [rectangle((0, 0), 1, 1, facecolor=colour, label=label) for colour, label in kinds]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(args: list[str]) -> int:
    config = command.parse(DiagramsConfig, args, "bench.diagrams")
    results.check_writable(config.out)
    layer_norm(config.out / "layer-norm.png")
    attention(config.out / "attention.png")
    return 0


if __name__ == "__main__":
    common.run(main)
