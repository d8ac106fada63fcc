"""Tests of bench/steps."""
