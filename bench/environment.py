"""Where a figure was measured: every results file carries this."""

from fastgpt.env import ROOT, environment

__all__ = ["ROOT", "environment"]
