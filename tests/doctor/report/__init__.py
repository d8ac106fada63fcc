"""Tests of fastgpt/doctor/report."""
