"""Checkpoints that are there whole or not at all, and those of other programs (formats/)."""
