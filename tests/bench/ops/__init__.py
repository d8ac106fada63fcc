"""Tests of bench/ops."""
