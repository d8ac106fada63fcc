"""Logs: nanoGPT's, nanochat's, llm.c's and fastgpt's (train.py's lines, metrics.jsonl), of any size, as they come.

One pass, a megabyte at a time. Records are looked for anywhere in a line, since ranks and shells glue lines together, and
across a line's end, since terminals wrap. Once a series of steps is thinned, lines that would be dropped are counted and
not parsed: that, and nothing else, makes a gigabyte a matter of seconds.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.doctor.evidence import ConfigFacts, Evals, LogFacts, LogKind, Note, Place, Steps, Unread
from fastgpt.doctor.reading import configs, configs_fastgpt, literals
from fastgpt.doctor.reading import log_formats as forms
from fastgpt.doctor.reading.encoding import blocks

MOST_STEPS, MOST_EVALS, MOST_NOTES = 1 << 16, 1 << 16, 1000
"""Steps and evaluations kept before they are thinned; notes of one kind (past it, the last one replaces the one before)."""
_PLAIN = 600  # a longer line is never one step's
_WRAPPED, _PIECES = 600, 4  # a wrapped line: characters and pieces at most
_ECHO = 2000  # lines of a config that a log repeats, at most
_START_LINES = 100_000  # what a program says when it starts is looked for in as many lines


def read_log(path: Path, limit: int = MOST_STEPS) -> LogFacts:
    """What a log says. Never raises for its content; a file that says nothing has kind "unknown" and no steps.

    ``limit``: steps kept before thinning. Raises OSError."""
    reader = LogReader(str(path), limit)
    for block in blocks(path):
        reader.take(block)
    return reader.facts()


class LogReader:
    """Reads a log in blocks that end where a line ends; ``facts`` then returns what it says.

    Each line goes first to ``_reads_on``, where something that takes several lines has begun: a line that the terminal
    wrapped (``_continue``), or a config that nanoGPT repeats (``_echoed``). What that leaves is looked through for steps and
    evaluations (``_records``), then for notes."""

    def __init__(self, file: str, limit: int = MOST_STEPS) -> None:
        self.file = file
        self.lines = 0
        self.steps = Series(7, limit)  # step, loss, ms, mfu, tokens per second, lr, line
        self.evals = Series(4, MOST_EVALS)  # step, train, val, line
        self.notes: dict[str, list[Note]] = {}
        self.kinds: Counter[LogKind] = Counter()
        self.config: ConfigFacts | None = None
        self._forms = list(forms.STEPS)
        self._fits: forms.StepForm | None = None  # the form that the last step had
        self._skipped: tuple[bytes, int] | None = None
        self._reads_on: Callable[[bytes, int], bool] | None = None  # has the next line first; True: it is dealt with
        self._held: list[tuple[bytes, int]] = []  # the beginning of a line that seems to be wrapped
        self._echo: list[str] = []  # a config that the log repeats
        self._echo_line = 0
        self._starts_until = _START_LINES
        self._note_words: list[bytes] = []  # that the block contains
        self._ended = True  # whether the last block ended with its line
        self._step = 0  # last seen
        self._last_row: list[float] | None = None

    # --- lines ---

    def take(self, block: bytes) -> None:
        """The next lines. Most of a long log is passed over: what is no step is looked through for words first, and steps
        that a thinned series would drop are only counted."""
        lines = block.split(b"\n")
        self._ended = not lines[-1]
        if self._ended:
            lines.pop()
        # The first nan is noted with its line, so a block that may hold it is read whole.
        thinned = self.steps.stride > 1 and (b"nan" not in block or "nan" in self.notes)
        odd = _not_plain(lines) if thinned else []
        text = b"\n".join([lines[i] for i in odd]) if thinned else block
        candidates = forms.NOTE_WORDS + (() if self.lines > self._starts_until else forms.START_WORDS)
        self._note_words = [word for word in candidates if word in text]
        words = [word for word in forms.RECORD_WORDS if thinned or word in text] + self._note_words
        if thinned:
            self._take_thinned(lines, odd, words)
        elif words or self._reads_on is not None:
            for i, line in enumerate(lines, self.lines + 1):
                self._feed(line, i, words)
        self.lines += len(lines)

    def _take_thinned(self, lines: list[bytes], odd: list[int], words: list[bytes]) -> None:
        """Lines of which all but ``odd`` are steps and nothing else."""
        steps, before = self.steps, self.lines + 1
        i = 0  # the next line
        for end in [*odd, len(lines)]:
            while i < end:
                # -seen % stride lines come before the next that the series keeps.
                if self._reads_on is None and (dropped := min(-steps.seen % steps.stride, end - i)):
                    steps.seen += dropped
                    i += dropped
                    self._skipped = (lines[i - 1], before + i - 1)
                else:
                    self._feed(lines[i], before + i, words)
                    i += 1
            if i < len(lines):
                self._feed(lines[i], before + i, words)
                i += 1

    def _feed(self, line: bytes, number: int, words: list[bytes]) -> None:
        for part in line.split(b"\r") if b"\r" in line else (line,):
            if self._reads_on is not None and self._reads_on(part, number):
                continue
            for word in words:
                if word in part:
                    self._line(part, number)
                    break

    def _line(self, line: bytes, number: int) -> None:
        end = self._records(line, number)
        if (b"iter" in line or b"step" in line) and forms.START.search(line, end):
            self._held, self._reads_on = [(line[end:], number)], self._continue
            return
        for word in self._note_words:
            if word in line:
                self._note(line[end:], number)
                return

    def _continue(self, line: bytes, number: int) -> bool:
        """``line`` follows a beginning that lacks its end: join them if that makes a record, else read each by itself."""
        pieces = [*self._held, (line, number)]
        for glue in itertools.product((b" ", b""), repeat=len(pieces) - 1):
            joined = pieces[0][0] + b"".join(g + piece for g, (piece, _) in zip(glue, pieces[1:]))
            if self._records(joined, pieces[0][1], crossing=len(joined) - len(line)):
                self._held, self._reads_on = [], None
                return True
        if len(pieces) < _PIECES and len(joined) < _WRAPPED and line and not forms.START.search(line):
            self._held = pieces
            return True
        self._give_up(pieces)
        return True

    def _give_up(self, pieces: list[tuple[bytes, int]]) -> None:
        self._held, self._reads_on = [], None
        first, number = pieces[0]
        self._loose(first, number)
        self._note(first, number)
        for piece, number in pieces[1:]:
            if self._reads_on is None or not self._reads_on(piece, number):
                self._line(piece, number)

    # --- steps and evaluations ---

    def _records(self, line: bytes, number: int, crossing: int = 0) -> int:
        """Take every whole step and evaluation of a line; returns where the last one ends (0 if the line has none).

        With ``crossing`` a line counts only if a record lies over that place: the seam of a wrapped line."""
        if line.startswith(b"{"):
            return len(line) if not crossing and self._json(line, number) else 0
        found = [] if b"loss" not in line and b"trl:" not in line else self._steps_in(line)
        if (b"val" in line and forms.VAL_LOSS.search(line)) or b"tel:" in line:
            found += [(kind, m) for kind, pattern in forms.EVALS for m in pattern.finditer(line) if _is_whole(m)]
        if crossing and not any(m.start() < crossing < m.end() for _, m in found):
            return 0
        for kind, match in sorted(found, key=lambda pair: pair[1].start()):
            self.kinds[kind] += 1
            if "val" in match.re.groupindex:
                said = match.groupdict()
                step = int(said["step"]) if said.get("step") else self._step
                self.evals.add((step, _float(said.get("train")), _float(said["val"]), number))
            else:
                self._step_from(match, line, number)
        return max((match.end() for _, match in found), default=0)

    def _steps_in(self, line: bytes) -> list[tuple[LogKind, re.Match[bytes]]]:
        for form in self._forms:
            if form.mark in line:
                found = [(form.kind, match) for match in form.strict.finditer(line)]
                if found:
                    if form is not self._fits:
                        self._fits = form
                        # It comes first from now on, behind fastgpt's only, whose lines nanoGPT's form fits too.
                        self._forms.sort(key=lambda other: (other.kind != "fastgpt", other is not form))
                    return found
        return []

    def _loose(self, line: bytes, number: int) -> None:
        """What a line that was cut short still says for certain."""
        for form in self._forms:
            if match := form.loose.search(line):
                self.kinds[form.kind] += 1
                self._step_from(match, line, number)
                return

    def _step_from(self, match: re.Match[bytes], line: bytes, number: int) -> None:
        said = match.groupdict()
        values = [_float(said.get(name)) for name in ("loss", "ms", "mfu", "rate", "lr")]
        self._take_step(int(said["step"]), values, line, number)

    def _take_step(self, step: int, values: list[float], line: bytes, number: int) -> None:
        loss, ms, mfu, rate, lr = values
        if mfu < 0:  # nanoGPT prints -100 until it has measured, llm.c for a card that it does not know
            mfu = math.nan
        self._step, self._skipped = step, None
        self._last_row = [step, loss, ms, mfu, rate, lr, number]
        self.steps.add(self._last_row)
        if not math.isfinite(loss):
            self._add_note("nan", line, number, loss)

    def _json(self, line: bytes, number: int) -> bool:
        """A line of metrics.jsonl."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(record, dict):
            return False
        if isinstance(record.get("config"), dict):
            self.config = configs_fastgpt.of_sections(record["config"], Place(self.file, number))
            return True
        if record.get("event") == "out_of_memory":
            self._add_note("oom", line, number, None)
        step = _number(record.get("step"))
        if not (0 <= step < 1e12):
            return "event" in record
        if "loss" in record:
            self.kinds["fastgpt"] += 1
            loss, ms, mfu, *rest = (_number(record.get(k)) for k in ("loss", "ms", "mfu", "tokens_per_second", "lr"))
            self._take_step(int(step), [loss, ms, 100 * mfu, *rest], line, number)
        if record.get("val_loss") is not None:
            self.kinds["fastgpt"] += 1
            self.evals.add((int(step), _number(record.get("train_loss")), _number(record["val_loss"]), number))
        return True

    # --- everything else ---

    def _note(self, line: bytes, number: int) -> None:
        if forms.ECHO_START.search(line):
            self._end_echo()
            self._echo_line, self._reads_on = number + 1, self._echoed
            self.kinds["nanogpt"] += 1
        for kind, program, pattern in forms.NOTES:
            if match := pattern.search(line):
                if program is not None:
                    self.kinds[program] += 1
                self._add_note(kind, line, number, _note_value(kind, _text(match[1])))
                if kind in ("resume", "override"):
                    self._starts_until = number + _START_LINES

    def _add_note(self, kind: str, line: bytes, number: int, value: Any) -> None:
        notes = self.notes.setdefault(kind, [])
        if len(notes) >= MOST_NOTES:
            notes.pop()
        notes.append(Note(kind, Place(self.file, number), _text(line).strip()[:300], value))

    def _echoed(self, line: bytes, number: int) -> bool:
        """Whether the line belongs to a config that nanoGPT repeats in its log."""
        if number - self._echo_line < _ECHO and not forms.ECHO_END.match(line):
            self._echo += [""] * (number - self._echo_line - len(self._echo)) + [_text(line[:1000])]
            return True
        self._end_echo()
        self._reads_on = None
        return False

    def _end_echo(self) -> None:
        config = configs.parse_nanogpt("\n".join(self._echo), self.file, self._echo_line)
        if config.settings:
            self.config = config
        self._echo = []

    # --- the end ---

    def facts(self) -> LogFacts:
        unread = []
        if self._held:
            (line, number), cut = self._held[0], not self._ended
            self._give_up(self._held)
            if cut:
                why = "the log ends in the middle of this line"
                unread.append(Unread(Place(self.file, number), _text(line)[:200], why))
        self._end_echo()
        if self._skipped is not None:  # counted and not parsed, but the last step is always kept
            line, number = self._skipped
            self._records(line, number)
        if self._last_row is not None and not np.array_equal(self.steps.rows()[-1:], [self._last_row], equal_nan=True):
            self.steps.add_last(self._last_row)
        rows, back = in_order(self.steps.rows())
        evals, evals_back = in_order(self.evals.rows())
        for i, top, step in back or evals_back:
            number = int((self.steps if back else self.evals).rows()[i, -1])
            text = b"the log goes back from step %d to %d: the later run counts" % (top, step)
            self._add_note("resume", text, number, step)
        if self.config is not None and self.config.kind == "nanogpt":
            for note in self.notes.get("override", []):
                name, value = note.value
                configs.override(self.config, name, value, note.place, note.text)
        step, loss, ms, mfu, rate, lr, at = (column.copy() for column in rows.T)
        eval_step, train, val, eval_at = (column.copy() for column in evals.T)
        notes = [note for kind in self.notes.values() for note in kind]
        return LogFacts(
            kind=max(self.kinds, key=lambda kind: self.kinds[kind], default="unknown"),
            file=self.file,
            steps=Steps(step.astype(np.int64), loss, ms, mfu, rate, lr, at.astype(np.int64), self.steps.stride),
            evals=Evals(eval_step.astype(np.int64), train, val, eval_at.astype(np.int64)),
            notes=sorted(notes, key=lambda note: note.place.line or 0),
            lines=self.lines,
            unread=unread,
            config=self.config,
        )


def _not_plain(lines: list[bytes]) -> list[int]:
    """The lines that may be something other than one step."""
    return [
        i
        for i, line in enumerate(lines)
        if b"loss" not in line or len(line) > _PLAIN or (b"val" in line and b'"val_loss": null' not in line)
    ]


def _note_value(kind: str, text: str) -> Any:
    """A note's value from its text: a count, (name, value), or the text itself."""
    if kind == "override":
        name, _, value = text.partition(" = ")
        return name, literals.literal_or_text(value.strip())
    if kind in ("parameters", "tokens_per_step", "vocab"):
        number = text.replace(",", "")
        try:
            return round(float(number[:-1]) * 1e6) if number.endswith("M") else int(number)
        except ValueError:
            return None
    if kind == "resume":
        return int(text.split()[-1]) if text[-1].isdigit() else None
    return text if kind in ("device", "precision") else None


def _is_whole(match: re.Match[bytes]) -> bool:
    """Whether an evaluation's last number is as long as its first: a line that was cut or wrapped shortens it."""
    said = match.groupdict()
    return not said.get("train") or len(said["val"].partition(b".")[2]) >= len(said["train"].partition(b".")[2])


def _float(text: bytes | None) -> float:
    """A number as logs write it (1,234.5); NaN for none, or n/a."""
    return math.nan if text is None or text == b"n/a" else float(text.replace(b",", b""))


def _number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")


# ---------------------------------------------------------------- rows in bounded memory

STRAGGLERS = 8
"""Step lines within which a step that went back is the output of another rank, not a run begun again."""


class Series:
    """Rows of ``columns`` numbers, at most ``limit`` of them. When it is full every second row goes, and from then on one
    row in ``stride`` is kept; the first row always, the last by ``add_last``."""

    def __init__(self, columns: int, limit: int) -> None:
        self._rows = np.empty((limit, columns), np.float64)
        self._used = 0
        self.seen = 0
        self.stride = 1

    def add(self, row: Sequence[float]) -> None:
        """Take the next row. A caller with many rows may count those that would be dropped (``seen % stride``) instead."""
        if self.seen % self.stride == 0:
            if self._used == len(self._rows):
                self._thin()
            if self.seen % self.stride == 0:
                self._rows[self._used] = row
                self._used += 1
        self.seen += 1

    def add_last(self, row: Sequence[float]) -> None:
        """Keep the last row whatever the stride."""
        if self._used == len(self._rows):
            self._thin()
        self._rows[self._used] = row
        self._used += 1

    def rows(self) -> np.ndarray:
        return self._rows[: self._used]

    def _thin(self) -> None:
        half = (self._used + 1) // 2
        self._rows[:half] = self._rows[: self._used : 2].copy()
        self._used, self.stride = half, self.stride * 2


def in_order(rows: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Rows whose first column, the step, strictly rises, and where the run was begun again: (index of the row, step
    before, step it went back to).

    A step that is printed again at once (by another rank) counts as printed last. Where a run was begun again, what it had
    done past that step is dropped. A step that goes back for a moment (a rank that lags, a garbled digit) fills a gap or is
    dropped."""
    steps = rows[:, 0]
    back: list[tuple[int, int, int]] = []
    order: list[float] = []  # steps kept, rising
    row_of: dict[float, int] = {}
    first = top = -np.inf
    for i, step in enumerate(steps):
        if step < top:  # the run was begun again if the next lines stay below top; else a rank lags
            coming = steps[i + 1 : i + 1 + STRAGGLERS]
            lag = len(order) - bisect_right(order, step)
            at_end = len(coming) == 0 or (len(coming) < STRAGGLERS and lag < STRAGGLERS)
            if at_end or (coming > top).any():
                if step > first and step not in row_of:
                    insort(order, step)
                    row_of[step] = i
                continue
            back.append((i, int(top), int(step)))
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
