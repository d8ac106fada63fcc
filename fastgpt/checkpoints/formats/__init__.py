"""One file for each checkpoint format, each to and from the same portable weights."""
