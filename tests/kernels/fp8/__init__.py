"""Tests of fastgpt/kernels/fp8."""
