"""fsync is left out in these tests: it guards against a power cut, which no test here can show, and on a busy disk it
takes most of their time. That it is called, and what happens when it fails, is tested where it is patched again."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
