"""The front end of every command: a frozen dataclass of options becomes flags, a help page and errors of one sentence.

    @dataclass(frozen=True)
    class SampleConfig:
        '''Print text from a checkpoint.'''
        checkpoint: Annotated[Path, Arg("CHECKPOINT", positional=True)]
        '''A checkpoint, or a run's folder.'''
        tokens: int = 200
        '''How many tokens to add.'''

    config = command.parse(SampleConfig, args, "fastgpt.sample")

A field is a flag (``top_k`` is ``--top-k``), its docstring the flag's help. A field that is itself a dataclass is a section
of the help page; its fields are flags like the others. tyro reads the words and draws the page. Where it is not installed (a
rented GPU machine with nothing but torch and triton), the standard library's argparse does, with the same flags and the same
errors. Both are imported when a command line is parsed, so that library code may import this module.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from fastgpt.common import UserError

AnyConfig = TypeVar("AnyConfig")

UNSET = object()
"""The value of an option that is not on the command line."""
WIDTH = 80
"""Columns of a help page, or those of a narrower terminal."""


class Arg(NamedTuple):
    """How an option is spelled where its type does not say it: ``Annotated[Path, Arg("FILE")]``."""

    metavar: str = ""
    """What stands for the value in help. Without it: N for a number, the field's last word for text."""
    positional: bool = False
    flag: str = ""
    """The flag's name, where it is not the field's (``from`` is not a name in Python)."""
    aliases: tuple[str, ...] = ()
    """Further names of the flag."""
    bare: str | None = None
    """The value that the flag has when none follows it."""
    words: tuple[str, ...] = ()
    """Words that are taken as they are, beside the values of the type: ``--batch-size auto``."""


class Option(NamedTuple):
    """One field of a command's dataclass."""

    name: str
    type: Any
    """bool, int, float, str, Path or a Literal."""
    default: Any
    """MISSING where it has to be given."""
    help: str
    section: str
    """The name of the nested dataclass that it is in; "" for the command's own."""
    many: bool
    """tuple[type, ...]: any number of values."""
    optional: bool
    """``| None``: the word None is a value."""
    arg: Arg

    @property
    def flag(self) -> str:
        return "--" + (self.arg.flag or self.name.replace("_", "-"))

    @property
    def metavar(self) -> str:
        if self.arg.metavar:
            return self.arg.metavar
        if get_origin(self.type) is Literal:
            return "{" + ",".join(get_args(self.type)) + "}"
        shown = {int: "N", float: "X", bool: "{True,False}"}.get(self.type)
        return shown or self.name.rsplit("_", 1)[-1].upper()

    @property
    def usage(self) -> str:
        """The metavariable, with brackets around what may be left out."""
        shown = f"{self.metavar} ..." if self.many else self.metavar
        return f"[{shown}]" if self.arg.positional and self.default is not MISSING else shown

    @property
    def label(self) -> str:
        """The option in an error."""
        return self.metavar if self.arg.positional else self.flag

    @property
    def note(self) -> str:
        """What stands behind its help."""
        if self.default is MISSING:
            return "(required)"
        if self.default in (None, False, ""):
            return ""
        values = self.default if self.many else [self.default]
        shown = [repr(value) if re.search(r"\s", str(value)) else str(value) for value in values]
        return f"(default: {' '.join(shown)})" if shown else ""

    def value(self, words: Sequence[str]) -> Any:
        """The value behind the words of the command line. Raises UserError."""
        if self.many:
            return tuple(self._one(word) for word in words)
        return self._one(words[0])

    def _one(self, word: str) -> Any:
        if word in self.arg.words:
            return word
        if self.optional and word == "None":
            return None
        choices = ("True", "False") if self.type is bool else get_args(self.type)
        if choices:
            if word not in choices:
                raise UserError(f"{self.label} is {word!r}{nearest(word, choices)}: it can be {', '.join(choices)}")
            return word == "True" if self.type is bool else word
        try:
            return self.type(word)
        except ValueError:
            kind = "a whole number" if self.type is int else "a number"
            also = "".join(f", or {word}" for word in self.arg.words)
            raise UserError(f"{self.label} is {word!r}: it must be {kind}{also}") from None


# ---------------------------------------------------------------- what a command's main() calls


def parse(cls: type[AnyConfig], args: Sequence[str], module: str, description: str | None = None) -> AnyConfig:
    """``cls`` from a command line; prints help and exits for --help. ``module``: what the command is called after
    ``python -m``. ``description`` replaces the docstring of ``cls`` on the help page.

    Raises UserError for a word that is not known and for a value of the wrong type."""
    values, rest = parse_known(cls, args, module, description)
    refuse(rest, options(cls))
    return cls(**values)


def parse_known(
    cls: type, args: Sequence[str], module: str, description: str | None = None, default: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """The options that ``args`` gives, by field name (whatever their section), and the words that belong to none.
    ``default``: an instance of ``cls`` whose values the help page shows. Raises UserError for a value of the wrong type."""
    known = options(cls, default)
    usage = Usage(program(module), description or inspect.cleandoc(cls.__doc__ or ""), cls)
    words = spelled_out(args, known)
    read = _with_argparse if _tyro() is None else _with_tyro
    found, rest = read(known, words, usage)
    if default is None:
        for option in known:
            if option.default is MISSING and option.name not in found:
                raise UserError(f"{option.label} is missing: {usage.program} --help says what it is")
    return found, rest


def refuse(words: Sequence[str], known: Sequence[Option]) -> None:
    """Raise UserError for the first of ``words``: nothing on a command line is passed over."""
    if not words:
        return
    flags = [option.flag for option in known if not option.arg.positional]
    for word in words:
        if word.startswith("-"):
            flag = word.split("=")[0]
            raise UserError(f"flag is {flag!r}{nearest(flag, flags)}, which is not known: --help lists those there are")
    raise UserError(f"{words[0]!r} is one word too many: --help says what the command takes")


def subcommand(args: Sequence[str], known: Mapping[str, type], module: str) -> tuple[str, list[str]]:
    """The first word, which has to be one of ``known`` (name: its options), and those behind it; prints them and exits for
    --help. Raises UserError."""
    if not args:
        raise UserError(f"command is missing: it can be {', '.join(known)}")
    name, *rest = args
    if name in ("-h", "--help"):
        print(f"usage: {program(module)} COMMAND ...\n")
        for each, cls in known.items():
            print(f"  {each:<10} {(cls.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    if name not in known:
        raise UserError(unknown("command", name, known))
    return name, rest


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A sentence for a name that does not exist: the nearest that does, and all there are."""
    names = list(known)
    return f"{what} is {name!r}{nearest(name, names)}: it can be {', '.join(names)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'this'?)", or "" if nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def program(module: str) -> str:
    """How the user called this: ``python train.py``, ``fastgpt sample``, ``python -m fastgpt.sample``."""
    script = Path(sys.argv[0])
    if script.stem == "fastgpt" or (script.name == "__main__.py" and script.parent.name == "fastgpt"):
        return " ".join(["fastgpt", *sys.argv[1 : 3 if sys.argv[1:2] == ["bench"] else 2]])
    if script.name == "train.py" and script.parent.name != "fastgpt":
        return "python train.py"
    return f"python -m {module}"


# ---------------------------------------------------------------- from a dataclass to options


def options(cls: type, default: Any = None, section: str = "") -> list[Option]:
    """The options of a dataclass, those of its sections included. ``default``: an instance that holds the defaults."""
    hints, helps = get_type_hints(cls, include_extras=True), _field_docs(cls)
    found = []
    for each in fields(cls):
        value = getattr(default, each.name) if default is not None else each.default
        if value is MISSING and each.default_factory is not MISSING:
            value = each.default_factory()
        hint: Any = hints[each.name]
        if isinstance(hint, type) and is_dataclass(hint):
            found += options(hint, value, each.name)
            continue
        arg = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Arg)), Arg())
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        optional = get_origin(kind) in (Union, UnionType)
        if optional:
            kind = next(part for part in get_args(kind) if part is not NoneType)
        many = get_origin(kind) is tuple
        if many:
            kind = get_args(kind)[0]
        found.append(Option(each.name, kind, value, helps.get(each.name, ""), section, many, optional, arg))
    return found


def _field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(above.target): " ".join(str(below.value.value).split())
        for above, below in itertools.pairwise(body)
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def spelled_out(args: Sequence[str], known: Sequence[Option]) -> list[str]:
    """``args`` with every flag in its first spelling and with a value: ``--no-compile`` is ``--compile=False``,
    ``--compile False`` too, a bare ``--resume`` is ``--resume=newest``, ``--batch_size 8`` is ``--batch-size=8``. Raises
    UserError for a flag whose value is missing."""
    by_flag = {option.flag: option for option in known if not option.arg.positional}
    by_flag |= {alias: option for option in known for alias in option.arg.aliases}
    out: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        option, positive = by_flag.get(flag), "True"
        if option is None and flag.startswith("--no-"):
            option, positive = by_flag.get("--" + flag.removeprefix("--no-")), "False"
            option = option if option is not None and option.type is bool and not equals else None
        if option is None:
            out.append(word)
        elif equals:
            out.append(f"{option.flag}={_truth(value) if option.type is bool else value}")
        elif option.type is bool:
            if positive == "True" and words and _truth(words[0]) in ("True", "False"):
                positive = _truth(words.pop(0))
            out.append(f"{option.flag}={positive}")
        elif option.arg.bare is not None and (not words or words[0].startswith("-") or words[0].endswith(".toml")):
            out.append(f"{option.flag}={option.arg.bare}")  # a .toml file behind it is the command's config
        elif option.many:
            out.append(option.flag)
        elif not words or words[0].partition("=")[0] in by_flag:
            raise UserError(f"{option.flag} has no value: give {option.metavar} behind it")
        else:
            out.append(f"{option.flag}={words.pop(0)}")
    return out


def _truth(word: str) -> str:
    return {"true": "True", "false": "False"}.get(word, word)


# ---------------------------------------------------------------- tyro


@dataclass(frozen=True)
class Usage:
    """What a help page says beside the options."""

    program: str
    description: str
    cls: type

    def line(self, known: Sequence[Option]) -> str:
        """What is typed, in one line."""
        positionals = [option.usage for option in known if option.arg.positional]
        return " ".join([self.program, "[-h] [OPTIONS]", *positionals])

    def text(self) -> str:
        """The description within the width: paragraphs are filled, indented lines stay, and what an example says about itself
        goes below it where both do not fit."""
        width, out = min(WIDTH, shutil.get_terminal_size().columns), []
        for block in re.split(r"\n\s*\n", self.description.replace("``", "").strip()):
            paragraph: list[str] = []
            for line in [*block.splitlines(), "  "]:
                if not line.startswith("  "):
                    paragraph.append(line)
                    continue
                if paragraph:
                    out += textwrap.wrap(" ".join(paragraph), width, break_long_words=False, break_on_hyphens=False)
                    paragraph = []
                if len(line) > width and (parts := re.match(r"( +)(\S.*?)(?: {2,})(\S.*)$", line)):
                    out += [parts[1] + parts[2], f"{parts[1]}    {parts[3]}"]
                elif line.strip():
                    out.append(line.rstrip())
            out.append("")
        return "\n".join(out).rstrip()

    def section(self, name: str) -> str:
        """What a section says about itself."""
        return inspect.cleandoc(get_type_hints(self.cls)[name].__doc__ or "")


def _tyro() -> Any:
    """The package, or None."""
    try:
        import tyro
    except ImportError:
        return None
    return tyro


def _with_tyro(known: Sequence[Option], words: Sequence[str], usage: Usage) -> tuple[dict[str, Any], list[str]]:
    """The values given, by name, and the words left over. Prints help and exits if it is asked for."""
    import tyro

    help_page = "-h" in words or "--help" in words

    def typed(option: Option) -> Any:
        """The field of the dataclass that tyro sees. For the help page a switch is a switch; to be read, it has a value."""
        switch = help_page and option.type is bool and not option.optional
        shown = tyro.conf.arg(
            name=option.arg.flag or None,
            metavar=None if switch else option.usage,
            help=option.help or " ",
            help_behavior_hint=option.note,
            aliases=option.arg.aliases or None,
        )
        kind: Any
        if switch:
            kind = Annotated[bool, shown]
            return kind if option.section else Annotated[kind, tyro.conf.FlagCreatePairsOff]
        spec: Any = tyro.constructors.PrimitiveConstructorSpec(
            nargs="*" if option.many else 1,
            metavar=option.metavar,
            # tyro 1.0 gives [[]] to a positional that is not there, where a word before it is not known.
            instance_from_str=lambda words: UNSET if words == [[]] else option.value(words),
            is_instance=lambda _: True,
            str_from_instance=lambda _: [""],
        )
        kind = Annotated[Any, spec, shown]
        return Annotated[kind, tyro.conf.Positional] if option.arg.positional else kind

    def shadow(name: str, members: Sequence[Option], extra: Sequence[Any] = (), doc: str = "") -> type:
        made: list[Any] = []
        for option in members:
            unset = option.default if help_page and option.type is bool else UNSET
            needed = help_page and option.default is MISSING
            made.append((option.name, typed(option), field() if needed else field(default=unset)))
        out = make_dataclass(name, [*made, *extra], kw_only=True)
        out.__doc__ = doc
        return out

    sections = []
    for name in dict.fromkeys(option.section for option in known if option.section):
        part = shadow(name, [option for option in known if option.section == name], doc=usage.section(name))
        sections.append((name, part, field(default_factory=part)))
    whole = shadow("options", [option for option in known if not option.section], sections)
    found: Any
    page = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8")  # tyro draws boxes in UTF-8 only
    try:
        with redirect_stdout(page):
            found, rest = tyro.cli(
                whole,
                args=["--help"] if help_page else list(words),
                prog=usage.program,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit:
        page.seek(0)
        # tyro fills no lines of a description and spells out the usage: only what stands behind those is taken.
        options_page = page.read().partition("\n\n")[2]
        print(f"usage: {usage.line(known)}\n\n{usage.text()}\n\n{options_page}", end="")
        raise
    given = {
        option.name: value
        for option in known
        if (value := getattr(getattr(found, option.section) if option.section else found, option.name)) is not UNSET
    }
    return given, list(rest)


# ---------------------------------------------------------------- argparse, where tyro is not installed


def _with_argparse(known: Sequence[Option], words: Sequence[str], usage: Usage) -> tuple[dict[str, Any], list[str]]:
    """What ``_with_tyro`` does."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(message)

    def formatter(prog: str) -> argparse.HelpFormatter:
        width = min(WIDTH, shutil.get_terminal_size().columns)
        return argparse.RawDescriptionHelpFormatter(prog, width=width)

    parser = Parser(
        usage.program,
        usage=usage.line(known),
        description=usage.text(),
        formatter_class=formatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {"": parser}
    for option in known:
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(
                f"{option.section} options", usage.section(option.section)
            )
        names = [option.name] if option.arg.positional else [option.flag, *option.arg.aliases]
        about: dict[str, Any] = {"help": f"{option.help} {option.note}".replace("%", "%%").strip(), "default": UNSET}
        if option.type is bool and not option.optional and {"-h", "--help"} & set(words):
            about["action"] = argparse.BooleanOptionalAction if option.section else "store_true"
        else:
            single = "?" if option.arg.positional else 1
            about |= {"nargs": "*" if option.many else single, "metavar": option.metavar}
        if not option.arg.positional:
            about["dest"] = option.name
        groups[option.section].add_argument(*names, **about)
    found, rest = parser.parse_known_args(list(words))
    given = {}
    for option in known:
        raw = getattr(found, option.name)
        if raw is not UNSET and raw != []:
            given[option.name] = option.value([raw] if isinstance(raw, str) else raw)
    return given, rest
