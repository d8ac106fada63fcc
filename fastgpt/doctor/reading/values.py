"""Which values a run's settings can have: whatever is read passes through here before it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastgpt.common import packaged_toml
from fastgpt.doctor.evidence import ConfigFacts, Setting, Unread

_TABLE: dict[str, list[Any]] = packaged_toml("fastgpt.doctor.reading", "settings.toml")
DEFAULTS: Mapping[str, Any] = {name: default for name, (default, *_) in _TABLE.items()}
"""The defaults of nanoGPT's train.py."""
RANGES = {name: tuple(bounds) for name, (_, *bounds) in _TABLE.items() if bounds} | {"world_size": (1, 1_000_000)}
"""Lowest and highest value of a setting. Bounds that are ints are those of whole numbers."""
_BOUNDS = {"max_iters", "warmup_iters", "lr_decay_iters"}  # only compared with: 3e9 / 524288 works, and means its floor


class Refused(Exception):
    """Why a statement or value is not read, in one sentence."""


def checked(name: str, value: Any, like: Any) -> Any:
    """``value`` as a setting called ``name`` can have it, whose default is ``like`` (None: unknown, any plain value).

    True for 1 where a boolean is meant, 20 for 20.0 where a whole number is. Raises Refused."""

    def wrong(why: str) -> Refused:
        text = repr(value)
        return Refused(f"{name} is {text if len(text) <= 40 else text[:37] + '...'}: it must be {why}")

    if isinstance(value, int) and value.bit_length() > 50:
        raise Refused(f"{name} cannot be that large")
    if isinstance(like, bool):
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise wrong("True or False")
    if isinstance(like, str) and not isinstance(value, str):
        raise wrong("a string")
    low, high = RANGES.get(name, (-1e15, 1e15))
    if isinstance(like, (int, float)) or name in RANGES:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise wrong("a number")
        whole = isinstance(low if name in RANGES else like, int)
        if whole and value != int(value) and name not in _BOUNDS:
            raise wrong("a whole number")
        value = int(value) if whole else float(value)
        if value < low:
            raise wrong(f"at least {low:g}")
        if value > high:
            raise Refused(f"{name} cannot be that large")
    return value


def store(facts: ConfigFacts, name: str, setting: Setting, like: Any = None) -> None:
    """Add a setting whose value its program can have, like its default or ``like``. Any other is listed, and neither an earlier
    value nor the default holds. None is no value: as if the setting were not there."""
    if setting.value is None:
        return
    try:
        value = checked(name, setting.value, facts.defaults.get(name, like))
    except Refused as error:
        facts.unread.append(Unread(setting.place, setting.text or name, str(error)))
        facts.forget([name])
    else:
        facts.settings[name] = replace(setting, value=value)
