"""Tests of fastgpt/hardware."""
