"""fastgpt's own configs (TOML, presets, what its checkpoints and metrics.jsonl store) under nanoGPT's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from fastgpt.common import nearest, parse_toml
from fastgpt.config import SECTIONS, Config
from fastgpt.doctor.evidence import ConfigFacts, Place, Setting, Unread
from fastgpt.doctor.reading.literals import comment_of
from fastgpt.doctor.reading.values import store

# fastgpt's field -> nanoGPT's name; fields that are not here keep their name.
_RENAMED = {
    "data": "dataset",
    "grad_accum": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "out": "out_dir",
    "precision": "dtype",
}
# The experimental precisions keep their names: nanoGPT has nothing like them. auto: on a GPU that has bf16.
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "bfloat16"}


def parse_fastgpt(text: str, file: str) -> ConfigFacts:
    """A fastgpt TOML file (a config or a preset) under nanoGPT's names; [cuda.*] sections count, as on a GPU.

    Raises UserError if it is not TOML; keys that fastgpt does not have go into ``unread``."""
    table = parse_toml(text, f"config file {file}")
    facts = ConfigFacts("fastgpt", defaults=_defaults())
    lines = text.split("\n")
    where: dict[tuple[str, str], int] = {}
    section = ""
    for i, line in enumerate(lines):
        assignment = re.match(r"\s*([\w-]+)\s*=", line)
        if assignment:
            where[section, assignment[1]] = i
        elif header := re.match(r"\s*\[\s*([\w.]+)\s*\]", line):
            section = header[1]
        if not assignment and (comment := comment_of(line)):
            facts.comments.append(Setting(None, Place(file, i + 1), line.strip(), comment))
    cuda = table.pop("cuda", {})
    for prefix, sections in (("", table), ("cuda.", cuda if isinstance(cuda, dict) else {})):
        for section, values in sections.items():
            if section not in SECTIONS or not isinstance(values, dict):
                facts.unread.append(Unread(Place(file), f"[{prefix}{section}]", f"fastgpt has no section {section}"))
                continue
            for key, value in values.items():
                i = where.get((prefix + section, key), -1)
                written = lines[i] if i >= 0 else ""
                place = Place(file, i + 1 if i >= 0 else None)
                set_field(facts, key, Setting(value, place, written.strip(), comment_of(written)), section)
    return facts


def is_fastgpt(text: str) -> bool:
    """Whether a text has one of fastgpt's section headers."""
    return re.search(rf"^\s*\[(cuda\.)?({'|'.join(SECTIONS)})\]\s*(#.*)?$", text, re.MULTILINE) is not None


def of_sections(sections: Mapping[Any, Any], place: Place) -> ConfigFacts:
    """fastgpt's ``Config.to_dict()`` (checkpoints and metrics.jsonl hold it) under nanoGPT's names."""
    facts = ConfigFacts("fastgpt", defaults=_defaults())
    for section, values in sections.items():
        if section in SECTIONS and isinstance(values, Mapping):
            for key, value in values.items():
                set_field(facts, str(key), Setting(value, place, f"{key} = {value!r}"[:200]), section)
    return facts


def set_field(facts: ConfigFacts, key: str, setting: Setting, section: str | None = None) -> None:
    """One of fastgpt's fields under nanoGPT's name and in nanoGPT's terms: min_lr is a rate there, not a share, and the
    decay's end is a number of steps. What fastgpt does not have, or cannot be, goes into ``facts.unread``."""
    known = {field.name for name, kind in SECTIONS.items() if section in (None, name) for field in fields(kind)}
    if key not in known:
        why = f"fastgpt has no field {key}{nearest(key, known)}"
        facts.unread.append(Unread(setting.place, setting.text or key, why))
        return
    name, value = _RENAMED.get(key, key), setting.value
    if key == "precision" and value == "auto":  # as if it were not set
        facts.settings.pop(name, None)
        return
    if key == "precision":
        value = _DTYPES.get(str(value), value)
    store(facts, name, replace(setting, value=value))
    if not facts.is_set(name):
        return
    value = facts.settings[name].value
    if key in ("lr", "min_lr_ratio"):
        lr, share = facts.get("learning_rate"), facts.get("min_lr_ratio")
        if lr is not None and share is not None:
            store(facts, "min_lr", replace(setting, value=lr * share))
    if key == "max_iters":
        store(facts, "lr_decay_iters", replace(setting, value=value))
    if key == "resume":
        store(facts, "init_from", replace(setting, value="resume" if value else "scratch"))


def _defaults() -> dict[str, Any]:
    facts = ConfigFacts("fastgpt")
    for section, values in Config().to_dict().items():
        for key, value in values.items():
            set_field(facts, key, Setting(value, Place("fastgpt")), section)
    return {name: setting.value for name, setting in facts.settings.items()} | {"dtype": "bfloat16"}


def in_fastgpts_names(advice: str) -> str:
    """Config lines under nanoGPT's names as lines of a fastgpt TOML, where the decay ends with the run and the floor is
    a share."""
    fields_of = {nanogpt: field for field, nanogpt in _RENAMED.items()}
    lines = []
    for line in advice.split("\n"):
        name, equals, value = line.partition(" = ")
        if equals and name == "lr_decay_iters":
            continue
        if equals and name == "min_lr":
            name, value = "min_lr_ratio", "0.1"
        if equals and name == "dtype":
            value = value.replace("bfloat16", "bf16").replace("float16", "fp16")
        lines.append(f"{fields_of.get(name, name) if equals else name}{equals}{value}")
    return "\n".join(lines)
