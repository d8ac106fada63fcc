"""The benchmarks: ``python -m bench.NAME``, or ``fastgpt bench NAME``."""

import fastgpt  # noqa: F401 (first of all: it keeps Ctrl-C silent while ``python -m`` imports)
