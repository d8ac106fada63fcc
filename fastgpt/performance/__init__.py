"""Arithmetic about a training step without running it: FLOPs, memory, operations, time."""
