"""Tests of bench/compiler."""
