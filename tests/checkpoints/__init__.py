"""Tests of fastgpt/checkpoints."""
