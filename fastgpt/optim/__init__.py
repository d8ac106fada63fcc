"""Optimizers: FusedAdamW, and which parameters of a model get what."""

from fastgpt.optim.adamw import FusedAdamW

__all__ = ["FusedAdamW"]
