"""Tests of fastgpt/doctor/checks."""
