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
of the help page; its fields are flags like the others. ``options`` turns the dataclass into one list, from which the words
are read (``read``) and the help page is drawn (by argparse).
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from fastgpt.common import UserError, as_typed, nearest, number, unknown

AnyConfig = TypeVar("AnyConfig")

WIDTH = 80
"""Columns of a help page, or those of a narrower terminal."""
TRUTH = {"true": True, "1": True, "false": False, "0": False}
"""What may follow a flag that is on or off, in upper or lower case: ``--bias=False`` as in nanoGPT, ``--bias 0``."""


ELSEWHERE = {
    "--learning-rate": "--lr",
    "--dtype": "--precision",
    "--gradient-accumulation-steps": "--grad-accum",
    "--per-device-train-batch-size": "--batch-size",
    "--device-batch-size": "--batch-size",
    "--context-length": "--block-size",
    "--seq-len": "--block-size",
    "--max-steps": "--max-iters",
    "--steps": "--max-iters",
    "--warmup-steps": "--warmup-iters",
    "--max-grad-norm": "--grad-clip",
    "--dataset": "--data",
    "--out-dir": "--out",
    "--output-dir": "--out",
    "--wandb-project": "--wandb",
}
"""What nanoGPT, nanochat, torchtitan and Hugging Face call our flags, where the names are too far apart to be guessed."""


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
    def flags(self) -> list[str]:
        """All spellings; none of a positional one."""
        return [] if self.arg.positional else [self.flag, *self.arg.aliases]

    @property
    def metavar(self) -> str:
        if self.arg.metavar:
            return self.arg.metavar
        if get_origin(self.type) is Literal:
            return "{" + ",".join(get_args(self.type)) + "}"
        shown = {int: "N", float: "X", bool: "{True,False}"}.get(self.type)
        return shown or self.name.rsplit("_", 1)[-1].upper()

    @property
    def label(self) -> str:
        """The option in an error."""
        return self.metavar if self.arg.positional else self.flag

    @property
    def note(self) -> str:
        """What stands behind its help."""
        if self.default is MISSING:
            return "(required)"
        if self.default is None or self.default is False or self.default in ("", ()):
            return ""
        values = self.default if self.many else ["on" if self.default is True else self.default]
        words = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        shown = (repr(word) if re.search(r"\s", word) else word for word in words)
        return f"(default: {' '.join(shown)})"

    def value(self, words: Sequence[str]) -> Any:
        """The value behind the words of the command line. Raises UserError."""
        return tuple(map(self._one, words)) if self.many else self._one(words[0])

    def _one(self, word: str) -> Any:
        if word in self.arg.words:
            return word
        if self.optional and word == "None":
            return None
        if not word.strip(" "):
            raise UserError(f"{self.label} is {word!r}: give {self.metavar}")
        if self.type is bool and word.lower() in TRUTH:
            return TRUTH[word.lower()]
        if choices := ("True", "False") if self.type is bool else get_args(self.type):
            if word not in choices:
                raise UserError(unknown(self.label, word, choices))
            return word
        if self.type not in (int, float):
            return self.type(word)
        if (value := number(word, whole=self.type is int)) is None:
            kind = "a whole number below 2^63" if self.type is int else "a finite number"
            also = "".join(f", or {word}" for word in self.arg.words)
            raise UserError(f"{self.label} is {word!r}: it must be {kind}{also}")
        return value


# ---------------------------------------------------------------- what a command's main() calls


def parse(cls: type[AnyConfig], args: Sequence[str], module: str, description: str | None = None) -> AnyConfig:
    """``cls`` from a command line; prints help and exits for --help. ``module``: what the command is called after
    ``python -m``. ``description`` replaces the docstring of ``cls`` on the help page.

    Raises UserError for a word that is not known and for a value of the wrong type."""
    values, rest = parse_known(cls, args, module, description)
    refuse(rest, cls)
    return cls(**values)


def parse_known(
    cls: type, args: Sequence[str], module: str, description: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The options that ``args`` gives, by field name (whatever their section), and the words that belong to none; prints help
    and exits for --help. Raises UserError for a value of the wrong type, and for one that is missing."""
    if {"-h", "--help"} & set(args):
        show_help(cls, module, description)
    known = options(cls)
    found, rest = read(args, known)
    for option in known:
        # With a word left over, a flag that does not exist is the likelier mistake: the caller says so.
        if option.default is MISSING and option.name not in found and not rest:
            raise UserError(f"{option.label} is missing: {program(module)} --help says what it is")
    return found, rest


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """No line ends at a hyphen inside a word: a flag in a sentence stays whole. Of several names of a flag the last one has the
    placeholder, as from Python 3.13 on."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, str(action.metavar))}"


def show_help(
    cls: type,
    module: str,
    description: str | None = None,
    default: Any = None,
    groups: Mapping[str, tuple[str, Sequence[str]]] | None = None,
) -> NoReturn:
    """Print the help page and exit. ``default``: an instance of ``cls`` whose values the page shows. ``groups``: titles with a
    text and the fields that stand there instead of in their section; the first group comes first, in its order."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    groups, hints = groups or {}, get_type_hints(cls)
    group_of = {name: title for title, (_, names) in groups.items() for name in names}
    first = next((list(names) for _, names in groups.values()), [])
    known = sorted(options(cls, default), key=lambda o: first.index(o.name) if o.name in first else len(first))
    usage = [program(module), "[-h] [OPTIONS]"]
    for option in known:
        if option.arg.positional:
            shown = f"{option.metavar} ..." if option.many else option.metavar
            usage.append(shown if option.default is MISSING else f"[{shown}]")
    parser = argparse.ArgumentParser(
        usage=" ".join(usage),
        description=_filled(as_typed(description or inspect.cleandoc(cls.__doc__ or ""), way=False), width),
        formatter_class=lambda prog: _Formatter(prog, width=width, max_help_position=26),
    )
    sections: dict[str, Any] = {"": parser}
    for option in known:
        name = group_of.get(option.name, option.section)
        help = as_typed(option.help, way=False)
        about: dict[str, Any] = {"help": f"{help} {option.note}".replace("%", "%%").strip()}
        if name not in sections:
            text = groups[name][0] if name in groups else inspect.cleandoc(hints[name].__doc__)
            text = text.split("\n\n")[0]  # the rest is for those who call the dataclass from Python
            sections[name] = parser.add_argument_group(f"{name} options", _filled(text, width - 2))
        if option.type is bool and not option.optional:
            about["action"] = argparse.BooleanOptionalAction if name else "store_true"
        else:
            about |= {"nargs": "*" if option.many else None, "metavar": option.metavar}
        sections[name].add_argument(*(option.flags or [option.name]), **about)
    parser.print_help()
    sys.exit(0)


def _filled(description: str, width: int) -> str:
    """A description within the width: paragraphs are filled; in a block of examples each line stays, and what an example says
    about itself goes below it where both do not fit."""
    out = []
    for block in re.split(r"\n\s*\n", description.replace("``", "").strip()):
        if "\n  " not in f"\n{block}":
            out += [textwrap.fill(block, width, break_long_words=False, break_on_hyphens=False), ""]
            continue
        for line in block.splitlines():
            example = re.fullmatch(r"( +)(\S.*?) {2,}(\S.*)", line)
            if len(line) <= width or example is None:
                out.append(line)
                continue
            indent, words, about = example.groups()
            out += [indent + words, textwrap.indent(textwrap.fill(about, width - len(indent) - 4), f"{indent}    ")]
        out.append("")
    return "\n".join(out).rstrip()


def refuse(words: Sequence[str], cls: type) -> None:
    """Raise UserError for one of ``words``, a flag if there is one: nothing on a command line is passed over."""
    for word in words:
        if word.startswith("-"):
            flag, known = word.split("=")[0], options(cls)
            for option in known:  # --config FILE, --job.config_file FILE
                if option.arg.positional and flag.strip("-").rpartition(".")[2].startswith(option.name):
                    raise UserError(
                        f"flag is {flag!r}, which is not known: {option.metavar} stands alone, without a flag"
                    )
            flags = [option.flag for option in known if not option.arg.positional]
            last = (
                f"--{flag.rpartition('.')[2].strip('-').replace('_', '-')}"  # of --optim.lr, as other programs spell it
            )
            last = ELSEWHERE.get(last, last)
            meant = f" (did you mean {last!r}?)" if last in flags else nearest(flag, [*flags, "--help"])
            raise UserError(f"flag is {flag!r}{meant}, which is not known: --help lists those there are")
    if words:
        raise UserError(f"{words[0]!r} is one word too many: --help says what the command takes")


def subcommand(
    args: Sequence[str],
    known: Mapping[str, str],
    usage: str,
    footer: str = "",
    kind: str = "command",
    foremost: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The first word, which has to be one of ``known`` (name: what it does), and those behind it. Without a word and for
    --help, prints what there is, without a word only the ``foremost`` if any are named, and exits. Raises UserError for
    another word."""
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, known))
        print(f"usage: {usage}\n")
        for each in (not args and foremost) or known:
            first, *others = known[each].splitlines()
            print(f"  {each:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in others), sep="\n")
        if not args and foremost:
            print(f"\n{len(known) - len(foremost)} more: --help lists all.")
        if footer:
            print(f"\n{footer}")
        sys.exit(0 if args else 2)
    name, *rest = args
    if name not in known:
        raise UserError(unknown(kind, name, known))
    return name, rest


def program(module: str) -> str:
    """How the user called this: ``python train.py``, ``fastgpt sample``, ``python -m fastgpt.sample``."""
    script = Path(sys.argv[0])
    if script.stem == "fastgpt" or (script.name == "__main__.py" and script.parent.name == "fastgpt"):
        return " ".join(["fastgpt", *sys.argv[1 : 3 if sys.argv[1:2] == ["bench"] else 2]])
    if script.name == "train.py" and script.parent.name != "fastgpt":
        return "python train.py"
    return f"python -m {module}"


# ---------------------------------------------------------------- from a dataclass to options


@functools.cache
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


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(above.target): " ".join(str(below.value.value).split())
        for above, below in itertools.pairwise(body)
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def read(args: Sequence[str], known: Sequence[Option]) -> tuple[dict[str, Any], list[str]]:
    """The values given, by field name, and the words that belong to no option. ``--no-compile`` is ``--compile False``,
    ``--batch_size`` is ``--batch-size``, and a flag may be followed by its value or by = and its value. Raises UserError for
    a flag that is given twice, or whose value is missing or of the wrong type."""
    by_flag = {name: option for option in known for name in option.flags}
    positionals = [option for option in known if option.arg.positional]
    given: dict[str, list[str]] = {}
    words, rest = list(args), []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        option, opposite = by_flag.get(flag), by_flag.get(flag.replace("--no-", "--", 1))
        off = option is None and opposite is not None and opposite.type is bool and not equals
        option = opposite if off else option
        if option is None:
            if word.startswith("-") or not positionals:
                rest.append(word)
                continue
            given.setdefault(positionals[0].name, []).append(word)
            if not positionals[0].many:
                positionals.pop(0)
            continue
        if option.name in given:  # the first would be dropped in silence
            raise UserError(f"{option.flag} is given twice: leave one out")
        if off:
            given[option.name] = ["False"]
        elif equals:
            given[option.name] = [value]
        elif option.type is bool:
            given[option.name] = [words.pop(0) if words and words[0].lower() in TRUTH else "True"]
        elif option.arg.bare is not None and (not words or words[0].startswith("-") or words[0].endswith(".toml")):
            given[option.name] = [option.arg.bare]  # a .toml file behind it is the command's config
        elif not words or words[0].partition("=")[0] in by_flag:
            raise UserError(f"{option.flag} has no value: give {option.metavar} behind it")
        elif option.many:
            given[option.name] = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
            del words[: len(given[option.name])]
        else:
            given[option.name] = [words.pop(0)]
    return {option.name: option.value(given[option.name]) for option in known if option.name in given}, rest
