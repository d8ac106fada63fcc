"""Hand every command what it has to refuse, and see whether it does: exit code 2, one sentence, in no time, nothing written.

Wrong numbers and words for every flag that there is, unknown words, files that are damaged, hostile, without an end or of
another kind, checkpoints whose checksums are right and whose values are not, folders that cannot be written, more memory
than there is. Commands run in this process, one after the other, under a time and a memory limit.

Examples:
  python -m bench.refusals                       all of them: tried and fell short, by kind
  python -m bench.refusals --kind checkpoint     one kind
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import psutil
import torch

from bench.reports.tables import print_table, terminal
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, write_json

ROOT = Path(__file__).parents[1]
SECONDS = 60
"""Wall time after which a command counts as hanging; it refuses in milliseconds."""
MEMORY = 4 << 30
"""Bytes that a command may map beside what this process holds."""
LONGEST = 1200
"""Characters of a sentence: more is a dump of the input."""
TRAIN = "train --kernels eager --device cpu --tokenizer bytes --eval-iters 1 --no-tensorboard"
SHAPE = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 16 --vocab-size 256 --batch-size 2 --max-iters 4"
REPORTS = (0, 1, 2)
"""Exit codes of the doctor: it says what it could not read, and goes on with the rest."""

Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Input:
    kind: str
    words: str
    """The command line, split at blanks; ``''`` is an empty word."""
    make: Make | None = None
    """Puts files into the folder in which the command runs, a copy of ``prepared``."""
    says: str = ""
    """What its sentence has to hold (a regular expression)."""
    codes: tuple[int, ...] = (2,)
    writes: tuple[str, ...] = ()
    """Names of what it may write: prepare's lock stays after a failure, since another process may be waiting for it."""
    about: str = ""
    """What is wrong with the files, where the command line does not say it."""


# ---------------------------------------------------------------- every command's flags


class _Captured(Exception):
    pass


def commands() -> Iterator[tuple[str, type]]:
    """(the words typed, the dataclass of its options) of every command that has one, found by asking each for its help."""
    names = [name for name in _entry().COMMANDS if name not in ("bench", "nanogpt", "data")] + ["data check"]
    sources = sorted((ROOT / "bench").glob("*.py"))
    names += [f"bench {path.stem}" for path in sources if "command.parse(" in path.read_text(encoding="utf-8")]

    def capture(cls: type, *_: Any, **__: Any) -> None:
        raise _Captured(cls)

    original, command.show_help = command.show_help, capture  # type: ignore[assignment]
    try:
        for name in names:
            try:
                _main([*name.split(), "--help"])
            except _Captured as found:
                yield name, found.args[0]
    finally:
        command.show_help = original


def _entry() -> Any:
    """The dispatcher, by its name as a shell finds it: no code depends on a command."""
    return importlib.import_module("fastgpt.__main__")


def _main(args: list[str]) -> int:
    """``python -m fastgpt ARGS``."""
    return _entry().main(args)


WRONG = {
    int: ("1e30", "1.5", "many", "nan", "0x10", "99999999999999999999"),
    float: ("inf", "nan", "1e400", "-inf", "0,5", "fast"),
    bool: ("=perhaps", "="),
    str: (),
    Path: (),
}
"""Words that no option of the type takes. Every one that takes a word refuses the empty one, too."""


def of_flags() -> Iterator[Input]:
    for name, cls in commands():
        known = command.options(cls)
        yield from (
            Input("unknown word", f"{name} {word}") for word in ("--no-such-flag", "-x", "---", "--no-such_flag 3")
        )
        if name != "doctor":  # which takes --key=value of the run's
            yield Input("unknown word", f"{name} --no-such-flag=1", says="which is not known")
        positionals = [option for option in known if option.arg.positional]
        if not any(option.many for option in positionals):
            yield Input(
                "unknown word", " ".join([name, *(["x.toml"] * len(positionals)), "stray"]), says="one word too many"
            )
        for option in known:
            wrong = WRONG.get(option.type, ("nonsense",))
            for number, word in enumerate((*wrong, "''")):
                if option.arg.positional:
                    yield Input("wrong value", f"{name} {word}", says=" is missing|give " if word == "''" else "")
                elif option.type is bool:
                    if word != "''":
                        yield Input("wrong value", f"{name} {option.flag}{word}", says=f"^error: {option.flag} is")
                else:
                    equals = "=" if number % 2 else " "
                    yield Input("wrong value", f"{name} {option.flag}{equals}{word}", says=f"^error: {option.flag} is")
            if option.arg.positional:
                continue
            value = "" if option.type is bool else f" {_right(option)}"
            yield Input(
                "given twice", f"{name} {option.flag}{value} {option.flag}{value}", says=f"{option.flag} is given twice"
            )
            if option.type is not bool and option.arg.bare is None:
                yield Input("no value", f"{name} {option.flag}", says=f"{option.flag} has no value")


def _right(option: command.Option) -> str:
    return str(next(iter(get_args(option.type)), {int: "1", float: "0.5"}.get(option.type, "x")))


# ---------------------------------------------------------------- files


def write(name: str, content: bytes | str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def fifo(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link(name: str, to: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return make


def a_folder(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return make


def without(pattern: str) -> Make:
    """Without the file of that name; "shards/train*.bin": the first that fits."""

    def make(folder: Path) -> None:
        for path in sorted(folder.glob(pattern))[:1]:
            path.unlink()

    return make


def endless(name: str) -> Make:
    """A sparse file of 8 GB: one line of zeros that costs no disk."""

    def make(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            file.truncate(8 << 30)

    return make


DEEP = 100_000
NO_TABLES: dict[str, Callable[[str], Make]] = {
    "a FIFO": fifo,
    "a device": lambda name: link(name, "/dev/zero"),
    "a loop of links": lambda name: link(name, name),
    "a folder": a_folder,
    "nothing": without,
    "one endless line": endless,
    "Latin-1": lambda name: write(name, b"# caf\xe9\n"),
    "deep brackets": lambda name: write(name, "a = " + "[" * DEEP),
    "deep objects": lambda name: write(name, '{"a":' * DEEP + "1" + "}" * DEEP),
    "a long number": lambda name: write(name, '{"format": ' + "9" * 5000 + "}"),
    "half a word": lambda name: write(name, '{"for'),
    "a list": lambda name: write(name, "[1]"),
    "binary": lambda name: write(name, bytes(range(256)) * 8),
}
"""What cannot be read as a table, by the name of a file."""

TOMLS = {
    "an unknown section": "[modle]\nn_layer = 1",
    "an unknown field": "[model]\nn_layers = 1",
    "no section": "n_layer = 1",
    "a number for a section": "model = 1",
    "cuda as a number": "cuda = 1",
    "a section of cuda that is not known": "[cuda.modle]\nx = 1",
    "a word for a number": "[optim]\nlr = 'high'",
    "inf": "[optim]\nlr = inf",
    "nan": "[optim]\nweight_decay = nan",
    "inf for a share": "[optim]\nmin_lr_ratio = inf",
    "a number that is too long": "[train]\nmax_iters = 99999999999999999999",
    "a float of 400 digits": "[optim]\nlr = 1" + "0" * 400,
    "a fraction for a whole number": "[train]\nmax_iters = 2.5",
    "on for a number": "[train]\nmax_iters = true",
    "a list": "[train]\nmax_iters = [1]",
    "a date": "[train]\nmax_iters = 1979-05-27",
    "an empty word": "[train]\nout = ''",
    "an unknown choice": "[train]\nkernels = 'cuda'",
    "a width that is too large": "[model]\nn_embd = 1000000000000000003",
    "a width that no number of heads divides": "[model]\nn_embd = 99991",
    "layers without end": "[model]\nn_layer = 1000000000",
    "a key twice": "[model]\nn_layer = 1\nn_layer = 2",
}


def of_configs() -> Iterator[Input]:
    for what, make in NO_TABLES.items():
        if what not in ("a list", "half a word"):
            yield Input("config", f"{TRAIN} c.toml --out o", make("c.toml"), "c.toml")
            yield Input("config", "plan --gpu rtx4070 --model c.toml", make("c.toml"), "c.toml")
            yield Input("config", "doctor c.toml", make("c.toml"), "c.toml")
    for text in TOMLS.values():
        yield Input("config", f"{TRAIN} c.toml --out o", write("c.toml", text), "c.toml")
        yield Input("config", "plan --gpu rtx4070 --model c.toml", write("c.toml", text), "c.toml")
    for word in ("no-such-file", "no-such.toml", "config.py", "gpt2-124m", "configs/gpt2-124m", ".", "/dev/null"):
        yield Input("config", f"{TRAIN} --out o {word}", write("config.py", "n_layer = 1"), re.escape(word))
    for word in ("no-such-preset", "GPT2-124M", "../configs/demo", "no.toml"):
        yield Input("config", f"plan --gpu rtx4070 --model {word}", None, re.escape(word))


# ---------------------------------------------------------------- checkpoints


def forge(name: str, change: Callable[[Any], Any]) -> Make:
    """Change a JSON file of the run's checkpoint, and vouch for it in the manifest."""

    def make(folder: Path) -> None:
        path = next((folder / "run").glob("step-*"))
        content = json.loads((path / name).read_text())
        changed = change(content)
        data = json.dumps(content if changed is None else changed).encode()
        (path / name).write_bytes(data)
        if name != "manifest.json":
            manifest = json.loads((path / "manifest.json").read_text())
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            write_json(path / "manifest.json", manifest)

    return make


def _instead(value: Any, _: Any) -> Any:
    return value


def put(*keys: str, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def in_checkpoint(name: str, make: Callable[[str], Make]) -> Make:
    return lambda folder: make(str(next((folder / "run").glob("step-*")).relative_to(folder) / name))(folder)


STATES: dict[tuple[str, ...], list[Any]] = {
    ("config",): [1, [], {}, {"model": 3}, {"model": {}, "data": [], "optim": 1, "train": None}],
    ("config", "model"): [{}, {"n_layer": 2}],
    ("config", "model", "rope"): [True],
    ("config", "model", "n_layer"): ["1", -1, 0, 10**9, 1.5, True, None, [1], 10**30],
    ("config", "model", "n_embd"): [10**18 + 3, 99991, "32"],
    ("config", "model", "dropout"): ["none", 2, float("nan")],
    ("config", "data", "tokenizer"): [5, ["bytes"], "klingon"],
    ("best_val_loss",): ["low", None, [1], float("nan")],
    ("model",): [3, [], {}, {"transformer.wte.weight": 5}],
}
RESTORED: dict[tuple[str, ...], list[Any]] = {
    ("run",): [5, {}],
    ("loader",): [5, [], {}, {"position": "x", "seed": 0, "windows": 1, "block_size": 16}],
    ("loader", "position"): [-1, "3", 1.5, 10**30, None],
    ("loader", "windows"): [10**6, "many"],
    ("loader", "seed"): [-1, "x"],
    ("geometry",): [5, [], {"asked": 1, "used": 2}, {"asked": [2, 1], "used": [0, 0]}],
    ("spikes",): [5, ["a"], {}, [None]],
    ("scaler",): [5, [1]],
    ("metrics",): ["all", -1],
    ("optimizer",): [3, [], {"state": 3, "param_groups": []}],
}
TABLES: dict[str, list[Any]] = {
    "shape": [[10**9, 32], [-1], "x", None, [1.5]],
    "dtype": ["F99", 3, "I64"],
    "chunks": [[], 5, [{}], [{"offsets": [0, 0], "sizes": [10**6, 32], "file": "../../x", "key": "k"}]],
}

HF: dict[str, list[Any]] = {
    "n_layer": ["1", 10**9, 0],
    "n_embd": [10**18 + 3, None],
    "resid_pdrop": [[1], "x", 5],
    "model_type": [3, "llama"],
    "activation_function": [[], 5],
    "fastgpt": [{"bias": "x"}],
}
"""Wrong values in config.json."""


def of_checkpoints() -> Iterator[Input]:
    resume = f"{TRAIN} {SHAPE} --data shards --out run --resume"
    others = (
        "sample run --tokens 2 --device cpu",
        "convert run out --to hf",
        f"{TRAIN} --data shards --out o --init-from run",
    )
    for table, uses in ((STATES, (resume, *others)), (RESTORED, (resume,))):
        for (keys, values), use in itertools.product(table.items(), uses):
            for value in values:
                if keys == ("best_val_loss",) and value is None:
                    continue
                about = f"{'.'.join(keys)} is {common.shortened(repr(value))}"
                yield Input(
                    "checkpoint",
                    use,
                    forge("state.json", put("state", *keys, value=value)),
                    "checkpoint|run",
                    about=about,
                )
    for value in (-1, "3", 1.5, None, [1], True):
        yield Input("checkpoint", resume, forge("state.json", put("step", value=value)), "checkpoint")
    for key, values in TABLES.items():
        for value in values:
            change = put("model.transformer.wte.weight", key, value=value)
            yield Input("checkpoint", resume, forge("tensors.json", change), "checkpoint", about=f"{key} is {value}")
            yield Input("checkpoint", others[0], forge("tensors.json", change), "checkpoint")
    for name in ("manifest.json", "state.json", "tensors.json"):
        for make in NO_TABLES.values():
            yield Input("checkpoint", others[0], in_checkpoint(name, make), "checkpoint|run")
            yield Input("checkpoint", "doctor run", in_checkpoint(name, make), codes=REPORTS)
    for value in ({}, {"format": 99, "files": {}}, {"format": 2, "files": 3}, {"format": 2, "files": {}}):
        yield Input("checkpoint", resume, forge("manifest.json", partial(_instead, value)), "checkpoint")
    for keys, values in STATES.items():
        for value in values:
            yield Input(
                "checkpoint", "doctor run", forge("state.json", put("state", *keys, value=value)), codes=REPORTS
            )
    for make in NO_TABLES.values():
        yield Input("checkpoint", "sample hf --device cpu", make("hf/config.json"), "hf")
    for key, wrong in HF.items():
        for value in wrong:
            yield Input("checkpoint", "sample hf --device cpu", _in_json("hf/config.json", key, value), "hf")
    for name in ("no-such-folder", "hf/nothing.pt", "ok.toml", "shards"):
        for use in ("sample {} --device cpu", "convert {} out --to hf", "hellaswag {} --data rows.jsonl"):
            yield Input("checkpoint", use.format(name), None, re.escape(name))
    for what in ("model", "model_args"):
        for value in (3, {}, None):
            yield Input("checkpoint", "convert ckpt.pt out --to fastgpt", _in_pickle(what, value), "ckpt.pt")
    yield Input(
        "checkpoint", "convert ckpt.pt out --to fastgpt", _in_pickle("model_args", {"n_layer": 10**9}), "ckpt.pt"
    )
    yield Input("checkpoint", "convert ckpt.pt out --to fastgpt", _in_pickle("optimizer", {"state": 3}), "ckpt.pt")
    yield Input("checkpoint", "convert ckpt.pt out", None, "--to fastgpt or --to hf")


def _in_json(name: str, key: str, value: Any) -> Make:
    return lambda folder: write_json(folder / name, {**json.loads((folder / name).read_text()), key: value})


def _in_pickle(key: str, value: Any) -> Make:
    def make(folder: Path) -> None:
        torch.save({**torch.load(folder / "ckpt.pt"), key: value}, folder / "ckpt.pt")

    return make


# ---------------------------------------------------------------- data


LOCK = (".p.lock",)
PREPARE = (
    "--val-fraction 0 | --val-fraction 1 | --val-fraction -1 | --shard-tokens 0 | --max-tokens 0 | --workers 0 | "
    "--workers 100000 | --text-column x | --config-name x | --seed -1"
)
ROWS = (
    "",
    "{",
    '{"ctx": "a"}',
    '{"ctx": "", "endings": ["a", "b"], "label": 0}',
    '{"ctx": 5, "endings": ["a", "b"], "label": 0}',
    '{"ctx": "a", "endings": [], "label": 0}',
    '{"ctx": "a", "endings": ["a", "b"], "label": 9}',
    "[" * DEEP,
)
"""HellaSwag files that cannot be scored."""


def of_data() -> Iterator[Input]:
    train = f"{TRAIN} {SHAPE} --data shards --out o"
    for what, make in NO_TABLES.items():
        if what not in ("nothing", "a list", "a folder", "a loop of links"):
            yield Input("data", train, make("shards/manifest.json"), "manifest")
            yield Input("data", "data check shards", make("shards/manifest.json"), "manifest")
    for key, values in (("format", [99]), ("shards", [5, {}, [1], [{}]]), ("tokenizer", ["gpt2", 5])):
        for value in values:
            yield Input("data", train, _in_json("shards/manifest.json", key, value), "shards")
    for name in ("shards/train*.bin", "shards/val*.bin"):
        yield Input("data", train, without(name), "shards")
    for content in (b"", b"\0" * 11, b"\xff" * 64):
        yield Input("data", train, write("shards/train_9.bin", content), "shards")
    yield Input("data", train, fifo("shards/train_9.bin"), "shards")
    for data in (
        "no-such-folder",
        "ok.toml/x",
        "''",
        "owner/name",
        "/dev/zero",
        "empty",
        "fifo.txt",
    ):
        yield Input("data", f"{TRAIN} {SHAPE} --out o --data {data}", _some_sources)
        yield Input("data", f"prepare {data} --out p --tokenizer bytes", _some_sources, writes=LOCK)
    for line in (b"{", b"[]", b"3", b'{"text": 5}', b'{"x": "y"}', b"\xff\xfe", b"[" * DEEP):
        yield Input(
            "data", "prepare a.jsonl --out p --tokenizer bytes", write("a.jsonl", line + b"\n"), "a.jsonl", writes=LOCK
        )
    bomb = gzip.compress(bytes(400 << 20), 1)
    yield Input(
        "data",
        "prepare a.jsonl.gz --out p --tokenizer bytes",
        write("a.jsonl.gz", bomb),
        "line 1 is longer than",
        writes=LOCK,
    )
    yield Input("data", "prepare a.jsonl.gz --out p", write("a.jsonl.gz", b"no gzip"), "a.jsonl.gz", writes=LOCK)
    yield Input(
        "data", "prepare a.parquet --out p", write("a.parquet", b"no parquet"), "a.parquet|pyarrow", writes=LOCK
    )
    for flags in PREPARE.split(" | "):
        yield Input("data", f"prepare rows.jsonl --out p --tokenizer bytes {flags}", None, writes=LOCK)
    for rows in ROWS:
        yield Input("data", "hellaswag run --data h.jsonl --device cpu", write("h.jsonl", rows), "hellaswag")
        yield Input("data", f"{train} --hellaswag h.jsonl", write("h.jsonl", rows), "hellaswag")
    for what, make in NO_TABLES.items():
        yield Input("data", "hellaswag run --data h.jsonl --device cpu", make("h.jsonl"), "hellaswag", about=what)


def _some_sources(folder: Path) -> None:
    (folder / "empty").mkdir()
    os.mkfifo(folder / "fifo.txt")


# ---------------------------------------------------------------- sizes, folders, cards, files of results


OF_TRAIN = r"""
--preset gpt2-124m --batch-size 1000000 | batch_size is 1000000: it needs about .* free
--preset gpt2-124m --batch-size 1e7 | it needs about .* free
--preset gpt2-124m --batch-size 1e18 | batch_size
--batch-size auto --grad-accum 1e18 | grad_accum
--batch-size auto --grad-accum 1000000000000000000000000000000 | --grad-accum
--batch-size auto --grad-accum 1e9 --block-size 1e6 | tokens_per_step
--n-layer 1e4 --n-embd 1e5 --n-head 100 | does not fit|it needs about
--n-layer 1e9 | n_layer
--n-embd 1e17 | n_embd
--n-embd 99991 | n_head can be 1
--n-head 0 | n_head
--vocab-size 1e12 | vocab_size
--vocab-size 100 | vocab_size is 100
--block-size 1e12 | block_size
--block-size 1e7 | fit|needs
--block-size 1e5 --batch-size 1 | block_size|fit|needs
--dropout 1 | dropout
--dropout -0.1 | dropout
--lr -1 | lr
--beta1 1 | beta1
--decay-share 2 | decay_share
--max-iters 0 | max_iters
--keep-checkpoints 0 | keep_checkpoints
--max-skipped 0 | max_skipped
--log-interval 0 | log_interval
--spike-zscore -1 | spike_zscore
--seed -1 | seed
"""
"""Flags that are numbers and cannot be obeyed | what the sentence has to hold."""
OTHERS = r"""
sample run --tokens 0 | tokens
sample run --samples 0 | samples
sample run --temperature -1 | temperature
sample run --top-p 0 | top_p
sample run --top-p 2 | top_p
sample run --top-k 0 | top_k
hellaswag run --examples 0 --data rows.jsonl | examples
plot run --tokens-per-step 0 | tokens_per_step
data check shards --vocab-size 0 | vocab_size
hardware rtx4070 --nanogpt-mfu 0 | nanogpt_mfu
doctor ok.toml --corpus-tokens 0 | corpus
plan --gpu rtx4070 --tokens 0 | tokens
plan --gpu rtx4070 --tokens-per-step 1e18 | tokens_per_step
plan --gpu rtx4070 --tokens-per-step 1 | tokens_per_step
plan --gpu rtx4070 --world-size 0 | world_size
plan --gpu rtx4070 --vram 0 | vram
plan --gpu rtx4070 --vram 1e9 | vram
plan --gpu rtx4070 --n-embd 1e17 | n_embd
plan --gpu rtx4070 --n-layer 1e4 | does not fit
bench project --batch 0 | batch
bench project --seq 0 | seq|block_size|T is
bench project --dropout 1 | dropout
bench project --tokens-per-step 0 | tokens_per_step
bench project --kernels x | kernels
bench project --precision x | precision
bench project --model x | model
bench mfu --device cpu --batch 0 | batch
bench mfu --device cpu --batch 1e9 | batch_size is 1000000000: it needs about
bench mfu --device cpu --seq 0 | seq
bench mfu --device cpu --steps 0 | steps
bench mfu --device cpu --grad-accum 0 | grad-accum
bench mfu --device cpu --model L1H1C0T8V8 | n_embd
bench mfu --device cpu --model nonsense | model
bench mfu --device cpu --backends x | backends
bench audit --jobs 0 | jobs
bench audit --shard 3/2 | shard
bench audit --arch sm_1 | arch
bench audit --only *** | only
bench tune --kernel *** | kernel
bench tune --budget 0 | budget
bench tune --budget soon | budget
bench tune --rank --sms 0 | sms
bench tune --arch sm_89 | rank
bench kill_campaign --tries 0 | tries
bench kill_campaign --window 0 | window
bench training_parity --steps 0 | steps
bench memory --seconds 0 | seconds|CUDA
bench gpu --out o --minutes 0 | minutes|CUDA
bench ablation --models x | models
bench ablation --budget x | budget
bench kernels --only x | only
prepare | SOURCE is missing
sample | CHECKPOINT is missing
convert run | OUT is missing
plot no-such-run | no-such-run
doctor | no file is given
bench compare a | B is missing
nanogpt | TRAIN.PY is missing
nanogpt no-such.py | no-such.py
nanogpt --no-such train.py | --no-such
nanogpt ok.toml | model.py
trian | did you mean 'train'
bench mfuu | did you mean 'mfu'
data chek | did you mean 'check'
--no-such | --no-such
"""


def of_sizes() -> Iterator[Input]:
    for kind, start, table in (("size", f"{TRAIN} --data shards --out o ", OF_TRAIN), ("command line", "", OTHERS)):
        for line in table.strip().splitlines():
            words, says = line.split(" | ")
            yield Input(kind, start + words, None, says)


def of_folders() -> Iterator[Input]:
    long = "n" * 5000
    commands = {
        f"{TRAIN} {SHAPE} --data shards --out {{}}": "out",
        "prepare rows.jsonl --tokenizer bytes --text-column ctx --out {}": "",
        "convert ckpt.pt {} --to fastgpt": "",
        "convert ckpt.pt {}.pt": "",
        "plot run --out {}/x.png": "out|matplotlib",
        "doctor ok.toml --html {}/x.html": "",
        "bench mfu --from mfu.json --out {}": "",
        "bench precision --quick --out {}": "out",
        "bench kernels --device cpu --out {}": "out",
        "bench kill_campaign --out {}": "",
        "bench training_parity --steps 1 --out {}/x.png": "",
        "bench ablation --json {}/x.json": "",
        "bench diagrams --out {}": "out",
    }
    for words, says in commands.items():
        yield Input("folder", words.format(long), None, says)
        yield Input("folder", words.format("file/below"), write("file", "x"), says)
        yield Input("folder", words.format("/proc/nothing"), None, says)
    start = next(iter(commands))
    for name in ("config.json", "environment.json", "metrics.jsonl", "best.json"):
        yield Input("folder", start.format("o"), a_folder(f"o/{name}"), name)
    tensorboard = start.format("o").replace("--no-tensorboard", "--tensorboard")
    yield Input("folder", tensorboard, write("o/tensorboard", ""), "tensorboard")
    yield Input("folder", start.format("file"), write("file", "x"), "file")
    yield Input("folder", start.format("."), write("metrics.jsonl", "{}\n"), "earlier run")
    yield Input("folder", start.format("o --resume"), None, "checkpoint o does not exist")
    yield Input("folder", start.format("o --resume nowhere"), None, "nowhere")
    yield Input("folder", start.format("o --wandb x"), None, "wandb")
    yield Input("folder", start.format("o --cuda-graphs on"), None, "cuda_graphs")
    yield Input("folder", "convert ckpt.pt run --to hf", None, "run exists")
    yield Input("folder", "convert run out.pt --to hf", None, "leave .pt out")


NAMED = (
    "hardware {} | plan --gpu {} | doctor ok.toml --gpu {} | bench project --gpu {} | bench ablation --gpu {} | "
    "bench audit --gpu {} | bench tune --rank --gpu {} | train --explain-kernels {} | bench mfu --device cpu --gpu {}"
)
ON_CUDA = (
    "train --device cuda --out o | sample run --device cuda | hellaswag run --data rows.jsonl --device cuda | "
    "bench gpu --out o | bench memory | bench kernels --device cuda | bench mfu --device cuda | bench tune | "
    "bench ablation --measure | bench training_parity --device cuda"
)


def of_cards() -> Iterator[Input]:
    for words, name in itertools.product(NAMED.split(" | "), ("rtx9999", "nvidia")):
        says = f"(gpu|explain_kernels) is '{name}', which is not in the table: nearest are "
        yield Input("card", words.format(name), None, says)
    if not torch.cuda.is_available():
        for words in ("hardware", "plan", "train --explain-kernels"):
            yield Input("card", words, None, "gpu is not given and .*: name one, such as rtx4070")
        for words in ON_CUDA.split(" | "):
            yield Input("card", words, None, "CUDA")


RESULTS = (
    "{}",
    "[]",
    "null",
    '{"schema": 1}',
    '{"environment": 5}',
    '{"environment": {"device": 5}}',
    '{"schema": "fastgpt.mfu", "schema_version": 1}',
    '{"schema": "fastgpt.bench", "schema_version": 1, "entries": {"a": 1}}',
)


def of_results() -> Iterator[Input]:
    for use in ("bench compare x.json x.json", "bench project --measured x.json", "bench mfu --from x.json --out o"):
        for content in RESULTS:
            yield Input("results", use, write("x.json", content), "x.json")
        for what, make in NO_TABLES.items():
            if what != "a list":
                yield Input("results", use, make("x.json"), "x.json")
    for name, use in itertools.product(("metrics.jsonl", "a.log"), ("plot {}", "doctor {}")):
        for what, make in NO_TABLES.items():
            if (name, what) != ("a.log", "one endless line"):  # logs of any size are read, block by block
                yield Input("results", use.format(name), make(name), f"{name}|no training step")


CAMPAIGN = (of_flags, of_configs, of_checkpoints, of_data, of_sizes, of_folders, of_cards, of_results)


# ---------------------------------------------------------------- run and judge


class _Hangs(BaseException):
    """Not an Exception: nothing on the way catches it."""


def prepare(folder: Path) -> None:
    """What the cases copy and damage: a config, token shards, rows of HellaSwag, a run, and the run in other formats."""
    (folder / "ok.toml").write_text("[model]\nn_layer = 1\n")
    row = {"ctx": "a b", "endings": ["c", "d"], "label": 0}
    (folder / "rows.jsonl").write_text("".join(json.dumps({**row, "ctx": f"a b {i} " * 20}) + "\n" for i in range(40)))
    for words in (
        "prepare rows.jsonl --tokenizer bytes --text-column ctx --out shards",
        f"{TRAIN} {SHAPE} --data shards --out run".replace("--max-iters 4", "--max-iters 2"),
        "convert run ckpt.pt",
        "convert run hf --to hf",
    ):
        code, said = attempt(words, folder)
        if code != 0:
            raise RuntimeError(f"{words} ended with {code}: {said}")


def attempt(words: str, folder: Path) -> tuple[int | str, str]:
    """Run a command in ``folder``: (its exit code, or what it ended with; what it wrote to stderr)."""
    import resource  # Windows has none: the campaign runs on Linux and macOS

    def hang(*_: Any) -> None:
        raise _Hangs

    args = [word.replace("''", "") for word in words.split()]
    err, limit = io.StringIO(), resource.getrlimit(resource.RLIMIT_AS)
    cwd, argv, environ, alarm = os.getcwd(), sys.argv, dict(os.environ), signal.signal(signal.SIGALRM, hang)
    ended: int | str = "no exit"
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, limit[1]))
    signal.alarm(SECONDS)
    try:
        os.chdir(folder)
        sys.argv = ["fastgpt", *args]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            common.run(_main)
    except SystemExit as end:
        ended = end.code if isinstance(end.code, int) else str(end.code)
    except _Hangs:
        ended = "hangs"
    except BaseException as error:
        ended = (
            f"{type(error).__name__}: {common.first_line(error)} ({traceback.extract_tb(error.__traceback__)[-1][:2]})"
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        os.chdir(cwd)
        sys.argv = argv
        for name in os.environ.keys() - environ.keys():
            del os.environ[name]
    return ended, err.getvalue()


def judge(case: Input, folder: Path) -> str | None:
    """What falls short; None if the command refused as it should."""
    if case.make is not None:
        case.make(folder)
    before = _files(folder)
    ended, said = attempt(case.words, folder)
    if ended not in case.codes:
        return f"ended with {ended!r}{': ' + said.strip()[:200] if said else ''}"
    changed = {name for name, _ in _files(folder) ^ before if name.split("/")[0] not in case.writes}
    if ended == 2:
        if not said.startswith("error: ") or said.count("\n") != 1 or len(said) > LONGEST:
            return f"said {said[:300]!r}"
        if not re.search(case.says, said):
            return f"said {said.strip()!r}, without {case.says!r}"
    return f"wrote {', '.join(sorted(changed)[:5])}" if changed else None


def _files(folder: Path) -> set[tuple[str, Any]]:
    """(name, what tells a file from a changed one) of all that is below ``folder``."""
    found = set()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            stat = path.lstat()
            found.add((str(path.relative_to(folder)), (stat.st_mode, stat.st_size, name in files and stat.st_mtime_ns)))
    return found


@dataclass
class Outcome:
    tried: Counter[str] = field(default_factory=Counter)
    short: list[tuple[Input, str]] = field(default_factory=list)


def campaign(kind: str | None = None) -> Outcome:
    """Judge every case, or those of one kind, each in a fresh copy of what they need."""
    cases = [case for family in CAMPAIGN for case in family() if kind in (None, case.kind)]
    if not cases:
        kinds = sorted({case.kind for family in CAMPAIGN for case in family()})
        raise UserError(common.unknown("kind", str(kind), kinds))
    tally = Outcome()
    kept = dict(os.environ)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as each command would set it, but all of them share this process
    with tempfile.TemporaryDirectory() as temporary:
        prepared, folder, bare = (Path(temporary, name) for name in ("prepared", "case", "bare"))
        prepared.mkdir()
        bare.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary, "cache"))
        try:
            prepare(prepared)
            for case in cases:
                tally.tried[case.kind] += 1
                of_words = case.kind in ("unknown word", "wrong value", "given twice", "no value")  # ends in the parser
                if not of_words:
                    shutil.copytree(prepared, folder, symlinks=True)
                problem = judge(case, bare if of_words else folder)
                if problem is not None:
                    tally.short.append((case, problem))
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.environ.clear()
            os.environ.update(kept)
    return tally


@dataclass(frozen=True)
class RefusalsConfig:
    kind: Annotated[str | None, Arg("KIND")] = None
    """Only the cases of this kind: checkpoint, config, data, folder, size, ..."""


def main(argv: list[str]) -> int:
    """Exit code 1 if anything fell short."""
    asked = command.parse(RefusalsConfig, argv, "bench.refusals", __doc__)
    tally = campaign(asked.kind)
    console = terminal(120)
    for case, problem in tally.short:
        console.print(f"{case.kind}: {case.words} {case.about}\n    {problem}", markup=False, soft_wrap=True)
    fell = Counter(case.kind for case, _ in tally.short)
    rows = [[kind, str(tried), str(fell[kind])] for kind, tried in sorted(tally.tried.items())]
    total = ["sum", str(tally.tried.total()), str(fell.total())]
    print_table(console, "Inputs that have to be refused", [["kind", "tried", "fell short"], *rows, total])
    return 1 if tally.short else 0


if __name__ == "__main__":
    common.run(main)
