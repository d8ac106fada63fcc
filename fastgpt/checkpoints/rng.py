"""The state of the random generators that a run draws from: torch's. (The order of its data needs none.)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """State of torch's CPU generator and of this process's CUDA device (each rank has its own)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what ``rng_state`` returned. The CUDA generator stays as it is where the state or this machine has none."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def fits(state: Any) -> bool:
    """Whether ``set_rng_state`` could put back what a file holds."""
    try:
        torch.Generator().set_state(state["cpu"])
        return "cuda" not in state or (state["cuda"].dtype, state["cuda"].dim()) == (torch.uint8, 1)
    except (TypeError, KeyError, RuntimeError, AttributeError):
        return False
