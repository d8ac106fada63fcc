"""Tests of fastgpt/performance."""
