"""What a kernel makes beside a tensor, for whoever reads that tensor next.

Autograd, and the model, hand on one tensor. What belongs to it is noted under that tensor's identity, and found by it, once. A
tensor that was written to since (its version tells), that is a view or a sum of others, or that came from elsewhere has no
note, and whoever asks then does the work in a pass of its own: slower, the same result.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Notes(Generic[T]):
    """Notes of one kind. One that nobody takes goes with its tensor."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def give(self, tensor: Tensor, note: T) -> None:
        self._kept[tensor] = note, tensor._version

    def take(self, tensor: Tensor) -> T | None:
        """The note given for ``tensor`` as it is now. It is then forgotten."""
        note, version = self._kept.pop(tensor, (None, None))
        return note if version == tensor._version else None

    def __len__(self) -> int:
        return len(self._kept)
