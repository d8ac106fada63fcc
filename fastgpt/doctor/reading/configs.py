"""nanoGPT's configs, parsed and never executed: a Python file of assignments, then ``--key=value`` over it.

A config is untrusted input. A line that assigns a literal, or arithmetic on literals and on names set before, is read;
anything else (imports, calls, f-strings, conditions) is listed, and a name it may have set counts as unknown from there on.
fastgpt's own TOML is configs_fastgpt.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastgpt.common import UserError, nearest
from fastgpt.doctor.evidence import ConfigFacts, Note, Place, Setting, Source, Unread
from fastgpt.doctor.reading import configs_fastgpt
from fastgpt.doctor.reading.literals import (
    PARSE_ERRORS,
    assign,
    comment_of,
    literal_or_text,
    names_set_by,
    parse,
)
from fastgpt.doctor.reading.values import DEFAULTS, Refused, checked, store

COMMAND_LINE = Place("command line")
HARMLESS = re.compile(
    r"(?:adamw?|backend|batch|betas?\d?|checkpoints?|ckpt|clip|compile|cooldown|data|dataset|date|ddp|debug|decay|eval|exp|experiment"
    r"|gpus?|grad|keep|learning|log|logging|lr|momentum|muon|notes?|nproc|optimizer|patience|profile|project|ranks?|resume|run|sample"
    r"|save|schedule|seed|tags?|tokens|train|val|verbose|wandb|warmup|world)(?:_.*)?"
    r"|.*_(?:accum|decay|dir|epochs|folder|iters|log|lr|notes|optimizer|rate|samples|schedule|scheduler|seed|steps|tag|tokens|workers)"
)
"""A setting that nanoGPT does not have leaves the model alone if its name begins or ends like this. Any other may change it."""

OF_A_SHAPE = (
    "n_layer",
    "n_head",
    "n_embd",
    "num_layers",
    "num_hidden_layers",
    "hidden_size",
    "d_model",
    "dim",
    "depth",
)
"""What dicts and calls that describe a model name in it, here and elsewhere."""


ASSUMED_OF_A_FORK = ("n_layer", "n_head", "n_embd", "block_size", "bias", "batch_size", "gradient_accumulation_steps")


def parse_nanogpt(text: str, file: str, first_line: int = 1, source: Source = "config") -> ConfigFacts:
    """A nanoGPT config as facts; never raises, whatever the text. ``first_line`` is the line of ``file`` on which the text
    begins (a log may repeat the config: ``source``)."""
    facts = ConfigFacts("nanogpt", defaults=dict(DEFAULTS))
    known = dict(DEFAULTS)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    comments = [comment_of(line) for line in lines]
    used: set[int] = set()  # lines whose comment belongs to a setting
    helpers: set[str] = set()  # names that other lines compute with: no settings of their own
    for i, node in _statements(text, lines):
        helpers |= (
            {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} - names_set_by(node)
            if node
            else set()
        )
        written, place = lines[i].strip()[:200], Place(file, i + first_line)
        spanned = range(i, i + (node.end_lineno or node.lineno) - node.lineno + 1) if node else range(i, i + 1)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            facts.comments.append(Setting(None, place, written, " ".join(node.value.value.split())))
            continue
        try:
            if node is None:
                raise Refused("it is not a line of Python")
            assigned = {name: checked(name, v, DEFAULTS.get(name)) for name, v in assign(node, known).items()}
        except Refused as error:
            facts.unread.append(Unread(place, written, str(error)))
            names = names_set_by(node) if node else set(re.findall(r"^\s*(\w+)\b[^=\w]*=(?!=)", lines[i]))
            facts.unread_shapes += [name for name in names if node and name not in DEFAULTS and _describes(node)]
            facts.forget(names)
            known = {name: value for name, value in known.items() if name not in names}
            continue
        known.update(assigned)
        comment = next((comments[j] for j in spanned if j < len(lines) and comments[j]), "")
        for name, value in assigned.items():
            facts.settings[name] = Setting(value, place, written, comment, source)
            meant = nearest(name, DEFAULTS, likeness=0.85)  # nanoGPT takes any name without a word
            if meant and name not in DEFAULTS and not name.startswith("_"):
                why = f"nanoGPT has no setting {name}{meant}, so this line changes nothing"
                facts.unread.append(Unread(place, written, why))
        if assigned:
            used.update(spanned)
    for i, comment in enumerate(comments):
        if comment and i not in used:
            facts.comments.append(Setting(None, Place(file, i + first_line), lines[i].strip(), comment))
    facts.comments.sort(key=lambda found: found.place.line or 0)
    _note_foreign(facts, helpers)
    return facts


def _note_foreign(facts: ConfigFacts, helpers: Collection[str] = ()) -> None:
    """List what nanoGPT has no setting for, apart from misspellings and names that only other lines use."""
    misspelt = {unread.text for unread in facts.unread}
    facts.foreign = [
        name
        for name, setting in facts.settings.items()
        if name not in DEFAULTS and name not in helpers and not name.startswith("_") and setting.text not in misspelt
    ]
    facts.foreign_model = [
        name
        for name in facts.foreign
        if facts.settings[name].value not in (None, False)  # a part that is switched off
        if not HARMLESS.fullmatch(name.lower())
    ]
    facts.foreign += facts.unread_shapes
    facts.foreign_model += facts.unread_shapes
    if facts.foreign:  # what a fork's config leaves out is the fork's own; of model and batch nanoGPT's is assumed
        facts.defaults = {name: value for name, value in facts.defaults.items() if name in ASSUMED_OF_A_FORK}
    if facts.foreign_model:  # beside which n_layers and n_heads are no misspellings
        facts.unread = [unread for unread in facts.unread if "mean 'n_" not in unread.why]


def _describes(node: ast.stmt) -> bool:
    """Whether a statement sets a name to a dict or a call with numbers for the shape: ``model = {"n_layer": 24}``."""
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    names: list[tuple[Any, ast.expr]] = []
    if isinstance(value, ast.Dict):
        names = [(getattr(key, "value", None), number) for key, number in zip(value.keys, value.values)]
    elif isinstance(value, ast.Call):
        names = [(keyword.arg, keyword.value) for keyword in value.keywords]
    return any(name in OF_A_SHAPE and isinstance(number, ast.Constant) for name, number in names)


def is_nanogpt(text: str) -> bool:
    """Whether a text is valid Python that sets at least one of nanoGPT's names."""
    try:
        tree = parse(text)
    except PARSE_ERRORS:
        return False
    return any(name in DEFAULTS for node in tree.body for name in names_set_by(node))


def of_values(values: Mapping[Any, Any], place: Place) -> ConfigFacts:
    """nanoGPT's settings as its checkpoints hold them: all of them, so that no default stands in for one that is not there."""
    facts = ConfigFacts("nanogpt")
    for name, value in values.items():
        store(
            facts,
            str(name),
            Setting(value, place, f"{name} = {value!r}"[:200], source="checkpoint"),
            DEFAULTS.get(str(name)),
        )
    _note_foreign(facts)
    return facts


def apply_overrides(facts: ConfigFacts, overrides: Sequence[str]) -> None:
    """``--key=value`` (and ``--key value``) over a config, in place, under the names of the program it is for.

    Raises UserError for an argument of another form. A key that is not known, or a value that the program would stop at,
    goes into ``facts.unread``."""
    arguments = list(overrides)
    while arguments:
        argument = arguments.pop(0)
        if re.fullmatch(r"--[A-Za-z_][\w.-]*", argument) and arguments and not arguments[0].startswith("--"):
            argument = f"{argument}={arguments.pop(0)}"
        form = re.fullmatch(r"--([A-Za-z_][\w.-]*)=(.*)", argument, re.DOTALL)
        if form is None:
            raise UserError(f"override is {argument!r}: write it as --key=value, for example --batch_size=8")
        value = literal_or_text(form[2])
        if facts.kind == "fastgpt":
            field = form[1].replace("-", "_").split(".")[-1]
            configs_fastgpt.set_field(facts, field, Setting(value, COMMAND_LINE, argument))
        else:
            _override(facts, form[1], Setting(value, COMMAND_LINE, argument, source="override"))


def apply_logged(facts: ConfigFacts, notes: Sequence[Note]) -> None:
    """Over a nanoGPT config, in place, what its log says was overridden."""
    for note in notes:
        if note.kind == "override" and facts.kind == "nanogpt":
            name, value = note.value
            _override(facts, name, Setting(value, note.place, note.text, source="log"))


def _override(facts: ConfigFacts, name: str, setting: Setting) -> None:
    """One override as nanoGPT takes it: a setting that exists, a value of the very type that it has."""
    value, place, text = setting.value, setting.place, setting.text
    if name not in facts.settings and name not in DEFAULTS:
        if setting.source == "log":  # the program did not stop at it: a fork
            facts.settings[name] = setting
            _note_foreign(facts)
        else:
            why = f"nanoGPT's train.py has no setting {name}{nearest(name, DEFAULTS)} and stops at it"
            facts.unread.append(Unread(place, text, why))
        return
    present = facts.get(name, DEFAULTS.get(name))
    if present is not None and type(present) is not type(value):
        why = f"nanoGPT stops at it: {name} takes a value of type {type(present).__name__}"
        facts.unread.append(Unread(place, text, why))
    try:
        facts.settings[name] = replace(setting, value=checked(name, value, present))
    except Refused as error:
        facts.unread.append(Unread(place, text, str(error)))


def _statements(text: str, lines: list[str]) -> Iterator[tuple[int, ast.stmt | None]]:
    """The statements of a config, each with the index of its line. Where the whole is not Python (cut off, edited in
    haste), line by line, and None for a line that is not."""
    try:
        yield from [(node.lineno - 1, node) for node in parse(text).body]
        return
    except PARSE_ERRORS:
        pass
    for i, line in enumerate(lines):
        try:
            yield from [(i, node) for node in parse(line).body]
        except PARSE_ERRORS:
            yield i, None
