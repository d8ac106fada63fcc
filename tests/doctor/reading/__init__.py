"""Tests of fastgpt/doctor/reading."""
