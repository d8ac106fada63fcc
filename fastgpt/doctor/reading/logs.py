"""Logs: nanoGPT's, nanochat's, llm.c's and fastgpt's (train.py's lines, metrics.jsonl), of any size, as they come.

A file is read in blocks. The forms of log_formats.py are looked for in a block as a whole: ranks and shells glue lines
together, so a record (a step or an evaluation) may stand anywhere in a line. Terminals wrap: where a record begins that no
form fits, the next lines are joined to it. What lies between the records is looked through for notes. Of a log with very
many steps every second, fourth, ... is kept, and the others are passed over unread: a gigabyte takes little memory and time.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.checkpoints import METRICS
from fastgpt.common import console, number
from fastgpt.doctor.evidence import ConfigFacts, Evals, LogFacts, Note, Place, Steps, Unread
from fastgpt.doctor.reading import configs, configs_fastgpt, literals
from fastgpt.doctor.reading import log_formats as forms
from fastgpt.doctor.reading.encoding import encoding_of

BLOCK = 1 << 20
"""Characters read at a time."""
LARGE = 64 * BLOCK
"""Bytes of a log that takes seconds."""
MOST_STEPS, MOST_NOTES = 1 << 17, 1000
"""Steps kept before every second one is dropped; notes of one kind, past which the last replaces the one before."""
COUNTS = (
    *("parameters", "tokens_per_step", "vocab", "gpus", "micro_batch", "micro_batch_of_rank", "flops_per_token"),
    *("bits_per_byte", "corpus_tokens"),
)
"""Notes whose value is a number."""
COLUMNS = ("step", "loss", "ms", "mfu", "rate", "lr", "norm")
"""What a form can have of a step."""
WIDTH = len(COLUMNS) + 1
"""Numbers kept of a step: these, and its line."""
_DIGITS = str.maketrans("123456789", "000000000")
MOST_SILENT = 10_000
LONGEST = 10_000
"""Characters of a line that are looked through for a note: those of programs are shorter."""
OF_ITS_RUN = ("nan", "oom", "exception", "traceback", "checkpoint", "bits_per_byte")
"""Notes that are of no later run in the same file."""
_WRAPPED, _PIECES = 600, 4  # a wrapped line: characters and pieces at most
Take = Callable[[str, re.Match[str]], int]


def read_log(path: Path) -> LogFacts:
    """What a log says; on a terminal with a bar for one that takes seconds. Its content raises nothing: a file that says
    nothing has kind "unknown" and no steps. Raises OSError."""
    reader, size, parts = LogReader(str(path)), path.stat().st_size, blocks(path)
    if size > LARGE and sys.stderr.isatty():
        with suppress(ImportError):
            from rich.progress import track

            parts = iter(track(parts, "reading", size // BLOCK + 1, console=console(stderr=True), transient=True))
    for i, block in enumerate(parts):
        reader.take(block)
        if not i and size > 8 * BLOCK:
            reader.foresee(2 * len(block) / size)  # of about twice what is kept, should the rest hold fewer
    return reader.facts()


def blocks(path: Path) -> Iterator[str]:
    """The text of a file in parts of about BLOCK characters. Each but the last ends where the line of a step begins, if there
    is one: what belongs together stays together. Invalid bytes become U+FFFD."""
    with open(path, "rb") as raw:
        encoding = encoding_of(raw.read(400))
    with open(path, encoding=encoding, errors="replace", newline="\n") as file:
        rest = file.read(1).removeprefix("\ufeff")
        while piece := file.read(BLOCK):
            text = rest + piece
            near = max(0, len(text) - BLOCK // 16)
            begins = [match.start() for match in forms.STEP_LINE.finditer(text, near)]
            end = begins[-1] if begins else text.rfind("\n") + 1 or len(text)
            yield text[:end]
            rest = text[end:]
        yield rest


def _damaged(line: str) -> bool:
    """Whether a line of METRICS is no record."""
    try:
        return bool(line.strip()) and not isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return True


class LogReader:
    """Reads a log in blocks; ``facts`` then returns what it says."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.own = Path(file).name == METRICS  # each line is a record, so one that cannot be read is damaged
        self.lines, self.cut = 0, False  # of the blocks before; whether the last one has no end
        self.steps, self.evals = array("d"), array("d")  # rows of the columns of Steps and Evals, one after the other
        self.stride = 1  # one in so many steps is kept
        self.notes: dict[str, list[Note]] = {}
        self.unread: list[Unread] = []
        self.kinds: Counter[str] = Counter()
        self.kind_of_last = "unknown"
        self.config: ConfigFacts | None = None
        self.step = 0.0  # the last one seen
        self.step_like = 0  # lines that look like steps, or have to be records, and are of no known form
        self.first_step_like: Unread | None = None
        self.silent: set[str] = set()  # lines that say nothing, digits apart: programs repeat theirs

    def take(self, block: str) -> None:
        """Take all that the next block holds, from top to bottom."""
        text = block.replace("\r\n", "\n")
        if '{"log":"' in text:
            text = forms.DOCKER.sub(_out_of_docker, text)
        text = self._thinned(text) if self.stride > 1 else text
        if "\x1b" in text:
            text = forms.ANSI.sub("", text)
        if forms.DECIMAL_COMMAS.search(text):
            text = forms.DECIMAL_COMMAS.sub(lambda line: re.sub(r"(?<=\d),(?=\d)", ".", line[0]), text)
        self.counted, self.line_there, self.lined = 0, self.lines + 1, text
        self.text = text.replace("\r", "\n")  # a progress bar's, which ends no line as grep -n counts them
        self.text = forms.ECHO.sub(self._echo, self.text)
        # Of two that begin at one place the first counts: fastgpt's form before nanoGPT's, which fits its lines too, and
        # every whole record before the bare beginning of one.
        found: list[tuple[int, Take, str, re.Match[str]]] = []
        for kind, form, words in forms.RECORDS:
            if not all([word in self.text for word in words]):
                continue
            matches = form.finditer(self.text)
            if "val" in form.groupindex:
                matches = (match for match in matches if _is_whole(match.groupdict()))
            found += [(match.start(), self._record, kind, match) for match in matches]
        if "{" in self.text:
            found += [(match.start(), self._json, "fastgpt", match) for match in forms.JSON.finditer(self.text)]
        whole = {start for start, *_ in found}
        begun = (match for match in forms.START.finditer(self.text) if match.start() not in whole)
        found += [(match.start(), self._unfinished, "unknown", match) for match in begun]
        found.sort(key=itemgetter(0))
        end = 0  # of what has been taken
        for start, take, kind, match in found:
            if start >= end and (taken := take(kind, match)):
                if start - end > 2:  # a line's end is all there is, nearly always
                    self._notes_between(end, start)
                end = taken
        self._notes_between(end, len(self.text))
        self.lines += text.count("\n")
        self.cut = text[-1] != "\n" if text else self.cut
        self.foresee(1.0)

    def foresee(self, share: float) -> None:
        """Thin the steps out as far as a file needs of which only this share was taken: later blocks are then passed over
        quickly."""
        while len(self.steps) > WIDTH * MOST_STEPS * share:
            self.steps = array("d", np.frombuffer(self.steps).reshape(-1, WIDTH)[::2].tobytes())
            self.stride *= 2

    def _thinned(self, text: str) -> str:
        """The block with most of the lines that are steps and nothing else left empty; the last ones stay."""
        *_, near_the_end = itertools.islice(_backwards(text), 10)
        text, rest = text[:near_the_end], text[near_the_end:]
        words = [word for word in forms.NOT_PLAIN if word in text]
        if not words:  # the usual block: a line without a v is plain
            run = re.compile(
                rf"(?:{forms.PLAIN_STEP}){{0,{self.stride - 1}}}({forms.PLAIN_STEP})", re.ASCII | re.MULTILINE
            )
            return run.sub(lambda lines: "\n" * (lines[0].count("\n") - 1) + lines[1], text) + rest
        lines, plain = text.split("\n"), 0
        for i, line in enumerate(lines):
            plainly = line.startswith(forms.STEP_WORDS) and line.startswith("{") == line.endswith("}")
            if plainly and not any([word in line for word in (*words, *forms.EVALUATES)]):
                plain += 1
                if plain % self.stride:
                    lines[i] = ""
        return "\n".join(lines) + rest

    def _line(self, at: int) -> int:
        """The line of this place; from where one was last asked for on, since they come in order."""
        if at < self.counted:
            self.counted, self.line_there = 0, self.lines + 1
        self.line_there += self.lined.count("\n", self.counted, at)
        self.counted = at
        return self.line_there

    def _text_at(self, at: int) -> str:
        """The line around this place."""
        end = self.text.find("\n", at)
        return self.text[self.text.rfind("\n", 0, at) + 1 : end if end >= 0 else None]

    # --- steps and evaluations: each method returns where what it has taken ends, 0 if that is nothing ---

    def _record(self, kind: str, match: re.Match[str]) -> int:
        return match.end() if self._take(kind, match, match.start()) else 0

    def _take(self, kind: str, match: re.Match[str], at: int) -> bool:
        """Take the record that begins at ``at``; False if its last number seems to be cut."""
        said = match.groupdict()
        if "val" in said:
            if not _is_whole(said):
                return False
            step = float(said["step"]) if said.get("step") else self.step
            self.evals.extend((step, _float(said.get("train")), _float(said["val"]), self._line(at)))
        else:
            step, loss, *others = [_float(said[name]) if name in said else math.nan for name in COLUMNS]
            self._take_step(at, step, loss, *others, has_loss=bool(said.get("loss")))
        self.kinds[kind] += 1
        self.kind_of_last = kind
        return True

    def _take_step(
        self, at: int, step: float, loss: float, ms: float, mfu: float, *rest: float, has_loss: bool
    ) -> None:
        self.step = step
        # nanoGPT prints a negative mfu until it has measured one, llm.c for a card that it does not know.
        self.steps.extend((step, loss, ms, math.nan if mfu < 0 else mfu, *rest, self._line(at)))
        if has_loss and not math.isfinite(loss):
            self._note("nan", at, self._text_at(at), loss)

    def _json(self, kind: str, match: re.Match[str]) -> int:
        """A line of metrics.jsonl."""
        try:
            record = json.loads(match[0])
        except (ValueError, RecursionError):
            return 0
        at, end = match.span()
        if isinstance(record.get("config"), dict):
            self.config = configs_fastgpt.of_sections(record["config"], Place(self.file, self._line(at)))
            return end
        if record.get("event") == "out_of_memory":
            self._note("oom", at, match[0])
        step = _number(record.get("step"))
        if not (0 <= step < 1e12):
            return end if "event" in record else 0
        step = float(int(step))
        if "loss" in record:
            self.kinds[kind] += 1
            keys = ("loss", "ms", "mfu", "tokens_per_second", "lr", "grad_norm")
            loss, ms, mfu, *rest = (_number(record.get(key)) for key in keys)
            self._take_step(at, step, loss, ms, 100 * mfu, *rest, has_loss=True)
        if record.get("val_loss") is not None:
            self.kinds[kind] += 1
            losses = _number(record.get("train_loss")), _number(record["val_loss"])
            self.evals.extend((step, *losses, self._line(at)))
        return end

    def _unfinished(self, kind: str, begin: re.Match[str]) -> int:
        """The beginning of a record that was wrapped: the next lines are joined to it. One that was cut short is left out."""
        at = begin.start()
        following = forms.START.search(self.text, at + 1, at + _WRAPPED)
        pieces = self.text[at : following.start() if following else at + _WRAPPED].split("\n")
        wrapped = list(itertools.takewhile(bool, pieces))[:_PIECES]
        for n in range(2, len(wrapped) + 1):
            for glue in itertools.product((" ", ""), repeat=n - 1):
                joined = wrapped[0] + "".join(g + piece for g, piece in zip(glue, wrapped[1:n]))
                for kind, form, _ in forms.RECORDS:
                    match = form.match(joined)
                    if match and match.end() > len(joined) - len(wrapped[n - 1]) and self._take(kind, match, at):
                        return at + match.end() + glue.count("")  # each "" stands for a line end
        if not following and len(pieces) <= _PIECES and pieces[-1]:
            why = "the log ends in the middle of this line"
            self.unread.append(Unread(Place(self.file, self._line(at)), pieces[0][:200], why))
        return 0

    # --- everything else ---

    def _echo(self, match: re.Match[str]) -> str:
        """Take a config that nanoGPT repeats, and blank it: numbers in its comments are claims."""
        config = configs.parse_nanogpt(match["config"], self.file, self._line(match.start("config")), "log")
        self.kinds["nanogpt"] += 1
        if config.settings:
            self.config = config
        return re.sub(r"[^\n]", " ", match[0])

    def _notes_between(self, start: int, end: int) -> None:
        """Take the notes of the lines, and parts of lines, between two records."""
        for line in self.text[start:end].split("\n"):
            if not line:  # most of them, once a block was thinned
                start += 1
                continue
            if (shape := line.translate(_DIGITS)) in self.silent:
                start += len(line) + 1
                continue
            said, head = False, line[:LONGEST]
            for kind, program, pattern in forms.NOTES if head.strip() else ():
                if (match := pattern.search(head)) and not (said and kind == "exception"):
                    said = True
                    if program != "any":
                        self.kinds[program] += 1
                    self._note(kind, start, line, _note_value(kind, match[1]))
            if (self.own and _damaged(line)) or (not said and "loss" in head.lower() and forms.STEP_LIKE.search(head)):
                self.step_like += 1
                if self.first_step_like is None:
                    self.first_step_like = Unread(Place(self.file, self._line(start)), line.strip()[:200], "")
            elif not said and len(line) < 1000:
                if len(self.silent) >= MOST_SILENT:
                    self.silent.clear()
                self.silent.add(shape)
            start += len(line) + 1

    def _note(self, kind: str, at: int, text: str, value: Any = None) -> None:
        self._add(Note(kind, Place(self.file, self._line(at)), text.strip()[:300], value))

    def _add(self, note: Note) -> None:
        of_kind = self.notes.setdefault(note.kind, [])
        del of_kind[MOST_NOTES - 1 :]
        of_kind.append(note)

    def facts(self) -> LogFacts:
        steps, back = in_order(np.array(self.steps).reshape(-1, WIDTH))
        evals, evals_back = in_order(np.array(self.evals).reshape(-1, 4))
        for line, top, step in back or evals_back:
            text = f"the log goes back from step {top} to {step}: the later run counts"
            self._add(Note("resume", Place(self.file, line), text, step))
        kind = max(self.kinds, key=self.kinds.__getitem__, default="unknown")
        notes = sorted(itertools.chain(*self.notes.values()), key=lambda note: note.place.line or 0)
        lines, begun = np.array(self.steps)[WIDTH - 1 :: WIDTH], self.steps[0] if back else 0
        if again := [line for line, _, step in back if step <= max(begun, 1)]:  # from its first step: another run
            why = f"the log holds {len(again) + 1} runs, one after the other: the last one counts, from this line on"
            self.unread.append(Unread(Place(self.file, again[-1]), "", why))
            before, kind = lines[lines < again[-1]].max(), self.kind_of_last
            notes = [note for note in notes if note.kind not in OF_ITS_RUN or (note.place.line or 0) > before]
        first = self.first_step_like
        if first and (self.own or self.step_like > 1 or not (self.steps or self.unread)):
            why = (
                f"{self.step_like:,} of {self.lines + self.cut:,} lines of {METRICS} could not be read, "
                f"the first is line {first.place.line:,}"
                if self.own
                else f"{self.step_like:,} lines look like steps and could not be read"
                if self.step_like > 1
                else "this line looks like a step and could not be read"
            )
            self.unread.append(replace(first, why=why))
        if self.config is not None:
            configs.apply_logged(self.config, notes)
        return LogFacts(
            kind=kind,
            file=self.file,
            steps=Steps(*_columns(steps)),
            evals=Evals(*_columns(evals)),
            notes=notes,
            unread=self.unread,
            config=self.config,
            step_like=0 if self.own else self.step_like,
        )


def _columns(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """The columns of rows that begin with a step and end with a line, as Steps and Evals have them."""
    step, *values, line = rows.T.copy()
    return step.astype(np.int64), *values, line.astype(np.int64)


def _note_value(kind: str, text: str) -> Any:
    """A note's value from its text: a count, (name, value), or the text itself."""
    if kind == "override":
        name, _, value = text.partition(" = ")
        return name, literals.literal_or_text(value.strip())
    if kind in COUNTS:
        whole = number(text.replace(",", ""), whole=True)
        return number(text, whole=False) if whole is None else whole
    if kind == "resume":
        return int(text.split()[-1]) if text[-1].isdigit() else None
    return text if kind in ("device", "cpu", "precision", "exception") else None


def _backwards(text: str) -> Iterator[int]:
    """Where the lines of a text begin, from the last one back to 0."""
    at = len(text)
    while (at := text.rfind("\n", 0, at)) >= 0:
        yield at + 1
    yield 0


def _out_of_docker(match: re.Match[str]) -> str:
    """The text of one of Docker's lines."""
    try:
        return str(json.loads(match[1])).rstrip("\n").replace("\n", " ")
    except ValueError:
        return match[0]


def _is_whole(said: dict[str, str]) -> bool:
    """Whether an evaluation's last number is as long as its first: a line that was cut or wrapped shortens it."""
    return not said.get("train") or len(said["val"].partition(".")[2]) >= len(said["train"].partition(".")[2])


def _float(text: str | None) -> float:
    """A number as logs write it (1,234.5); NaN for none, or n/a."""
    if text is None or text == "n/a":
        return math.nan
    return float(text.replace(",", "") if "," in text else text)


def _number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


STRAGGLERS = 8
"""Step lines within which a step that went back is the output of another rank, not a run begun again."""


def in_order(rows: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Rows whose first column, the step, strictly rises, and where the run was begun again: (last column of that row, step
    before, step it went back to).

    A step that is printed again at once (by another rank) counts as printed last. Where a run was begun again, what it had
    done past that step is dropped. A step that goes back for a moment (a rank that lags, a garbled digit) fills a gap or is
    dropped."""
    steps: list[float] = rows[:, 0].tolist()
    back: list[tuple[int, int, int]] = []
    order: list[float] = []  # steps kept, rising
    row_of: dict[float, int] = {}
    first = top = -math.inf
    for i, step in enumerate(steps):
        if step < top:  # the run was begun again if the next lines stay below top; else a rank lags
            coming = steps[i + 1 : i + 1 + STRAGGLERS]
            lag = len(order) - bisect_right(order, step)
            at_end = not coming or (len(coming) < STRAGGLERS and lag < STRAGGLERS)
            if at_end or max(coming) > top:
                if step > first and step not in row_of:
                    insort(order, step)
                    row_of[step] = i
                continue
            back.append((int(rows[i, -1]), int(top), int(step)))
            dropped = bisect_left(order, step)
            for done in order[dropped:]:
                del row_of[done]
            del order[dropped:]
            first = step
        elif not order:
            first = step
        if step not in row_of:
            order.append(step)
        row_of[step] = i
        top = step
    return rows[[row_of[step] for step in order]], back
