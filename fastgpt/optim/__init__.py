"""Optimizers, and which parameters of a model get what."""
