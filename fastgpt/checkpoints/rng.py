"""The state of the random generators that a run draws from: torch's. (The order of its data needs none.)"""

from __future__ import annotations

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
