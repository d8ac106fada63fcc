"""Configs that were chosen while a test replaced something are chosen again in the next one."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _choose_again():
    from fastgpt.kernels import tuning  # not earlier: tests/conftest.py first says whether triton interprets

    yield
    tuning.choose_again()
