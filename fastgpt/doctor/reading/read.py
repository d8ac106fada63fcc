"""What the user gave, as evidence. Whether a file is a config, a log or a checkpoint follows from its content, not its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG

from fastgpt.common import UserError, read_json
from fastgpt.config import SECTIONS, config_folder, preset_names
from fastgpt.doctor.evidence import CheckpointFacts, ConfigFacts, Evidence, LogFacts, Place, Unread
from fastgpt.doctor.reading import checkpoints, configs, configs_fastgpt, surroundings
from fastgpt.doctor.reading.encoding import decode, is_text
from fastgpt.doctor.reading.logs import read_log
from fastgpt.doctor.reading.values import DEFAULTS

LARGEST_CONFIG = 1 << 18
"""A larger file (in bytes) is not a config."""


def read(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Evidence:
    """Everything that the given files say. ``paths``: a config (nanoGPT's .py, fastgpt's .toml, or a preset's name), a log, a
    checkpoint, in any order, or a folder: a run's, from which everything is taken that was not named. ``overrides``: nanoGPT's
    ``--key=value``.

    A config is, in this order: the file given, with what the log says was overridden; what the log repeats; what the
    checkpoint stores. Raises UserError for a path that cannot be read or says nothing, and for two files of one kind."""
    evidence = Evidence()
    files = [_preset(path) for path in paths]
    folders = [path for path in files if os.path.isdir(path) and not checkpoints.is_checkpoint(path, b"")]
    given: dict[str, Path] = {}
    for path in files:
        if path not in folders:
            facts = _read_one(path)
            kind = _KINDS[type(facts)]
            if kind in given:
                both = f"{given[kind]} and {path} are both a {kind}"
                raise UserError(f"{both}: the doctor looks at one run, so name one of them")
            given[kind] = path
            setattr(evidence, kind, facts)
    for path in folders:
        _read_folder(path, evidence)
    _settle_config(evidence, overrides)
    return evidence


_KINDS = {ConfigFacts: "config", LogFacts: "log", CheckpointFacts: "checkpoint"}


def _settle_config(evidence: Evidence, overrides: Sequence[str]) -> None:
    log, checkpoint = evidence.log, evidence.checkpoint
    logged = log.all("override") if log is not None else []
    if evidence.config is None:
        stored = [log and log.config, checkpoint and checkpoint.config]
        if checkpoint and checkpoint.kind == "fastgpt":  # of the last start; metrics.jsonl has that of the first
            stored.reverse()
        evidence.config = next((config for config in stored if config), None)
        logged = [] if evidence.config else logged  # the log's config has them
    if evidence.config is None and (logged or overrides):
        evidence.config = ConfigFacts("nanogpt", defaults=dict(DEFAULTS) if overrides else {})
    if evidence.config is not None:
        configs.apply_logged(evidence.config, logged)
        configs.apply_overrides(evidence.config, overrides)


def _preset(path: Path) -> Path:
    """The file of a preset that was given by name."""
    if str(path) in preset_names() and not os.path.exists(path):
        return config_folder() / f"{path}.toml"
    return path


def _read_one(path: Path) -> ConfigFacts | LogFacts | CheckpointFacts:
    try:
        if os.path.isdir(path):  # not Path.is_dir: it raises for a name that is too long
            return checkpoints.read_checkpoint(path)
        if not S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a file: write what it gives into one")
        with open(path, "rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
        if checkpoints.is_checkpoint(path, data[:4]):
            return checkpoints.read_checkpoint(path)
        return _text_file(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name with a NUL in it
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error


def _text_file(path: Path, data: bytes) -> ConfigFacts | LogFacts:
    """A config or a log. ``data``: the file as far as a config could reach."""
    if not data.strip():
        raise UserError(f"{path} is empty")
    if not is_text(data[: 1 << 16]):
        hint = "a damaged checkpoint, or" if path.suffix in checkpoints.FILE_ENDINGS else "no text, so"
        raise UserError(f"{path} is {hint} nothing that the doctor reads (a config, a log, a checkpoint)")
    text = decode(data) if len(data) <= LARGEST_CONFIG else ""
    if configs_fastgpt.is_fastgpt(text) or (text and path.suffix == ".toml"):
        config = configs_fastgpt.parse_fastgpt(text, str(path))
        if config.settings:
            return config
        raise UserError(f"{path} has none of fastgpt's settings: its sections are [model], [data], [optim] and [train]")
    run = (read_json(path) if path.suffix == ".json" else None) or {}
    if SECTIONS.keys() & run.keys():  # config.json of a run's folder
        return configs_fastgpt.of_sections(run, Place(str(path)))
    if text and configs.is_nanogpt(text):
        return configs.parse_nanogpt(text, str(path))
    log = read_log(path)
    log.notes += surroundings.environment(path)
    if len(log.steps) or len(log.evals) or log.notes or log.config is not None or log.step_like:
        return log
    config = configs.parse_nanogpt(text, str(path))  # damaged, or of names that nanoGPT does not have
    if any(name in DEFAULTS for name in config.settings) or (config.settings and path.suffix == ".py"):
        return config
    raise UserError(
        f"{path} says nothing that the doctor knows: it is neither a config (nanoGPT's, or fastgpt's TOML), nor a "
        "log of nanoGPT, its relatives, llm.c, litgpt or fastgpt (docs/doctor.md lists them), nor a checkpoint"
    )


def _read_folder(folder: Path, evidence: Evidence) -> None:
    """Take from a run's folder what was not given by name: metrics.jsonl or the newest log, the newest checkpoint, the
    config if there is only one. What is left, and what cannot be read, is listed. Raises UserError if there is nothing."""
    try:
        newest = checkpoints.newest(folder)
        files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: -path.stat().st_mtime)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    found = Evidence(log=evidence.log, checkpoint=evidence.checkpoint)
    configs_here: list[ConfigFacts] = []
    texts = sorted((path for path in files if path.suffix in _ORDER), key=lambda path: _ORDER.index(path.suffix))
    for path in [newest, *texts] if newest is not None and evidence.checkpoint is None else texts:
        if found.log is not None and path.suffix in _LOGS:
            if evidence.log is None:
                found.unread.append(Unread(Place(str(path)), "", f"it was left alone: the log is {found.log.file}"))
            continue
        try:
            facts = _read_one(path)
        except UserError as error:
            found.unread.append(Unread(Place(str(path)), "", str(error)))
            continue
        if isinstance(facts, ConfigFacts):
            configs_here.append(facts)
        else:
            setattr(found, _KINDS[type(facts)], facts)
    if len(configs_here) > 1:
        why = f"{len(configs_here)} configs lie in it: name the one that was used"
        found.unread.append(Unread(Place(str(folder)), "", why))
    if not configs_here and found.log is None and (newest is None or found.checkpoint is None):
        why = f": {found.unread[0].why}" if found.unread else ""
        raise UserError(f"{folder} has no config, log or checkpoint that can be read in it{why}")
    evidence.log, evidence.checkpoint = found.log, found.checkpoint
    if evidence.config is None and len(configs_here) == 1:
        evidence.config = configs_here[0]
    evidence.unread += found.unread


_LOGS = (".jsonl", ".log", ".txt", ".out")
_ORDER = (*_LOGS, ".py", ".toml")  # the likeliest first
