"""Tests of fastgpt/optim."""
