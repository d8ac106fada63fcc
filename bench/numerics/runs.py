"""What small training runs that are compared with one another share: the same batches, and weights changed by a little."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def windows(tokens: Tensor, length: int, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (rows, length) of ``tokens``, and what follows each token, from seeded places, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - length - 1, (rows,), generator=generator)
        window = torch.stack([tokens[i : i + length + 1] for i in starts])
        yield window[:, :-1], window[:, 1:]


@torch.no_grad()
def perturb(model: nn.Module, seed: int, relative: float) -> None:
    """Change every weight by about ``relative`` of itself. Two right runs that differ in no more drift this far apart."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + relative * torch.randn_like(parameter))
