"""One training step: run, traced, named and judged."""
