"""Tests of bench/numerics."""
