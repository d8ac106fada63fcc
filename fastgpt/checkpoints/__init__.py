"""Checkpoints that are there whole or not at all, and those of other programs (formats/)."""

METRICS = "metrics.jsonl"
"""Beside the checkpoints in a run's folder."""
