"""The forms of log_formats.toml as compiled expressions, and a few that are no program's own."""

from __future__ import annotations

import re

from fastgpt.common import packaged_toml

_NUMBER = r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|NaN|inf)"


def _group(token: re.Match[str]) -> str:
    """<step>, <loss>, <ms?> or <val.4> as a group of that name."""
    name, mark = token.groups()
    if name == "step":
        number = r"\d{1,12}"
    elif mark.startswith("."):
        number = rf"(?:\d+\.\d{{{mark[1:]},12}}|nan|inf)(?!\d)"
    else:
        number = f"(?:{_NUMBER}|n/a)" if mark == "?" else _NUMBER
    return f"(?P<{name}>{number})"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<(\w+)(\?|\.\d|)>", _group, text), re.ASCII | re.MULTILINE)


def _words(form: str) -> list[str]:
    """The words of a form that are in all that it fits: those outside of groups, classes and what may be left out."""
    plain = re.sub(r"<[^>]*>|\\.|\[[^]]*\]", " ", form)
    while (simpler := re.sub(r"\([^()]*\)", " ", plain)) != plain:
        plain = simpler
    return re.findall(r"[A-Za-z_/]{2,}(?![A-Za-z_/?*{])", plain)


_FORMATS: dict[str, dict[str, list[str]]] = packaged_toml("fastgpt.doctor.reading", "log_formats.toml")
RECORDS = [
    (program, _pattern(form), _words(form)) for program, of in _FORMATS.items() for form in of.get("records", ())
]
"""Every form of a step or evaluation: the program whose log it shows, the expression, words that a text with one has."""
NOTES = [
    (kind, program, _pattern(form))
    for program, of in _FORMATS.items()
    for kind, forms in of.items()
    for form in forms
    if kind != "records"
]
"""Lines that say something else: kind, whose log it shows ("any"), pattern with the value in its first group."""

START = _pattern(r"(?:iter|step)\s+\d{1,12}\s*[:/|]")
"""Where a step or evaluation line begins."""
STEP_LINE = _pattern(r"^(?:iter|step)\s+\d{1,12}\s*[:/]|^\{")
STEP_WORDS = ("iter ", "step ", "step:", "Epoch ", "{")
"""How a line begins that may be a step and nothing else; NOT_PLAIN and EVALUATES: what shows that there is more to it."""
NOT_PLAIN = (" nan", ":nan", "NaN", " inf", ":inf", "Infinity", "config", "Error", "Traceback", "memory")
EVALUATES = ("val", "event")
PLAIN_STEP = r"^(?:(?:iter |step |step:|Epoch |\d+ \| loss )[^\nv]*|\{[^\nv]*\})\n"
"""Such a line, where none of NOT_PLAIN are about."""
STEP_LIKE = re.compile(
    r"(?:\b(?:step|iter|iteration|it|batch|epoch|update|global_step)s?['\"]?\s*[:=#\[(]?\s*\d|^\W*\d+\s*[|:,]).{0,200}?"
    r"loss\w*['\"]?\s*(?:[:=(]|\bis\b)?\s*(?:[\d.]|nan)|\{.{0,300}?['\"](?:[\w/]+[_/])?loss['\"]\s*:\s*[\d\"']",
    re.ASCII | re.IGNORECASE,
)
"""A line that counts steps and has a loss: where no form reads it, that is said."""
DOCKER = re.compile(r'^\{"log":("(?:[^"\\\n]|\\.)*"),"stream":"\w*".*\}[ \t]*$', re.ASCII | re.MULTILINE)
"""A line as Docker keeps it: the text in the first group."""
DECIMAL_COMMAS = re.compile(r"^.*loss:?\s+\d{1,2},\d{4,}\b.*$", re.ASCII | re.MULTILINE)
"""A line of a machine that writes 3,1234 for 3.1234."""
JSON = _pattern(r"^\{.*$")
"""What may be a line of metrics.jsonl."""
ECHO = re.compile(
    r"Overriding config with .{1,300}:?\s?\n"
    r"(?P<config>(?:(?![ \t]*(?:tokens per iteration|Overriding|found vocab_size|Initializing |Resuming |defaulting to "
    r"|number of param|Traceback|iter \d|step \d)).*\n){0,2000})",
    re.ASCII | re.MULTILINE,
)
"""The config file that nanoGPT repeats, with the line before it."""

ANSI = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)"  # window titles, links
    r"|[@-Z\\-_])"
)
