"""Token shards for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fastgpt.data.shards import header


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write the tokens as a shard and return the file's sha256."""
    content = header(len(tokens)) + tokens.astype("<u2").tobytes()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
