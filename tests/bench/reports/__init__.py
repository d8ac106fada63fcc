"""Tests of bench/reports."""
