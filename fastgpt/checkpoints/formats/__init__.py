"""One file for each checkpoint format, each to and from the same portable weights."""

from typing import Literal

Format = Literal["nanogpt", "fastgpt", "hf", "nanochat"]
