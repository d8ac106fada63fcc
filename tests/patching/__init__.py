"""Tests of fastgpt/patching."""
