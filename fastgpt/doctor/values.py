"""Settings as numbers that can be reckoned with: what is no number, or none that a run could have, counts as unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastgpt.doctor.evidence import ConfigFacts, Place

WHOLE = {
    "n_layer": (1, 10_000),
    "n_head": (1, 10_000),
    "n_embd": (1, 1_000_000),
    "block_size": (1, 100_000_000),
    "vocab_size": (1, 100_000_000),
    "batch_size": (1, 1_000_000),
    "gradient_accumulation_steps": (1, 10_000_000),
    "world_size": (1, 1_000_000),
    "max_iters": (0, 10**12),
    "lr_decay_iters": (0, 10**12),
    "warmup_iters": (0, 10**12),
    "eval_interval": (0, 10**12),
    "eval_iters": (0, 10**12),
    "log_interval": (0, 10**12),
}
REAL = {
    "learning_rate": (0.0, 1e3),
    "min_lr": (0.0, 1e3),
    "dropout": (0.0, 1.0),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "weight_decay": (0.0, 1e6),
}


def possible(name: str, value: Any) -> bool:
    """Whether a run could have this value."""
    if name in WHOLE:
        low, high = WHOLE[name]
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if name in REAL:
        least, most = REAL[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value) and least <= value <= most
    return True


def clean(config: ConfigFacts) -> tuple[ConfigFacts, list[tuple[Place, str]]]:
    """The config without impossible values, and what they were. A name whose value is impossible has no default either."""
    wrong = {name for name, setting in config.settings.items() if not possible(name, setting.value)}
    kept = ConfigFacts(config.kind, config.settings, config.defaults, config.comments, config.unread)
    kept.forget(wrong | {name for name, value in config.defaults.items() if not possible(name, value)})
    said = [
        (config.settings[n].place, f"{n} = {config.settings[n].value!r}: no run can have this") for n in sorted(wrong)
    ]
    return kept, said


def shape_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The possible ones of a checkpoint's dimensions."""
    return {name: value for name, value in values.items() if possible(name, value)}
