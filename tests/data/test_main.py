"""The command: what it prints, and that bad input is one sentence, exit code 2 and no file."""

import json
import os
import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastgpt
from fastgpt.common import UserError, duration
from fastgpt.data import __main__ as command
from fastgpt.data import progress
from fastgpt.data.loader import TokenLoader
from fastgpt.data.progress import ProgressReport
from fastgpt.data.resolution import resolve


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    return str(path)


def test_prepare_then_check(tmp_path, texts, capsys):
    out = str(tmp_path / "out")
    assert command.main(["prepare", texts, "--out", out, "--tokenizer", "bytes", "--shard-tokens", "100"]) == 0
    printed = capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert f"train on it with --data {out}" in " ".join(printed.split())
    for side in ("train", "val"):
        assert f"{manifest['documents'][side]:,}" in printed and f"{manifest['tokens'][side]:,}" in printed
    assert manifest["tokenizer"] == "bytes" and manifest["fastgpt"] == fastgpt.__version__
    assert sum(manifest["documents"].values()) == 50
    assert command.main(["check", out]) == 0
    assert "files are whole (the manifest's sha256), every id is below 256" in capsys.readouterr().out
    with pytest.raises(UserError, match="every id must be below it"):
        command.main(["check", out, "--vocab-size", "100"])
    (tmp_path / "out" / manifest["shards"][0]["file"]).unlink()
    with pytest.raises(UserError, match=r"lacks train_000000\.bin, which its manifest names"):
        command.main(["check", out])


def test_check_of_nanogpts_files(tmp_path, capsys):
    for name in ("train.bin", "val.bin"):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / name)
    assert command.main(["check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 files are whole (no manifest here" in printed and "2,000 tokens\n" in printed
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate("abc"))}))
    with pytest.raises(UserError, match="holds the id 3 at token 3, and vocab_size is 3"):
        command.main(["check", str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.bin or \.npy files"):
        command.main(["check", str(tmp_path / "empty")])


_random = np.random.default_rng(0)
_normal, _uniform = _random.standard_normal(3000), _random.random(3000)
NOISE = [
    *((a * scale).astype(np.float16).tobytes() for a in (_normal, _uniform) for scale in (0.02, 1.0, 30.0)),
    *((a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes() for a in (_normal, _uniform)),  # bf16
]


@pytest.mark.parametrize(
    "content, what",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 20000\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><title>404</title>" * 30, "a web page"),
        (np.arange(1, 5000, dtype=np.uint32).tobytes(), "wider integers are read as uint16"),
        *((noise, "floating-point numbers are read as uint16") for noise in NOISE),
    ],
)
def test_check_says_what_is_not_tokens_and_training_refuses_it(tmp_path, content, what):
    (tmp_path / "train.bin").write_bytes(content)
    np.arange(3000, dtype=np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match=f"train.bin' .*{what}"):
        command.main(["check", str(tmp_path)])
    data = resolve(str(tmp_path), "gpt2", 50304)
    with pytest.raises(UserError, match=f"train.bin' .*{what}"):
        TokenLoader(data.train_paths, 8, 1, vocab_size=50304)


@pytest.mark.parametrize(
    "tokens",
    [
        np.random.default_rng(0).integers(0, 8192, 3000),  # codes of pictures: none is common
        np.random.default_rng(0).integers(0, 50257, 3000),
        np.minimum(np.random.default_rng(0).zipf(1.2, 3000), 50256),
        29_871
        + np.minimum(np.random.default_rng(0).zipf(1.2, 3000), 2000),  # a vocabulary that ends with the common ones
    ],
)
def test_tokens_without_a_description_pass(tmp_path, tokens):
    for side in ("train", "val"):
        tokens.astype(np.uint16).tofile(tmp_path / f"{side}.bin")
    assert command.main(["check", str(tmp_path)]) == 0


def test_build_nanogpts_arrays_are_checked_and_trained_on(tmp_path, capsys):
    for side in ("train", "val"):
        np.save(tmp_path / f"edufineweb_{side}_000000.npy", np.arange(2000, dtype=np.uint16))
    assert command.main(["check", str(tmp_path)]) == 0
    assert "2 files are whole" in capsys.readouterr().out
    data = resolve(str(tmp_path), "gpt2", 50304)
    with closing(TokenLoader(data.train_paths, 8, 1, vocab_size=50304)) as loader:
        x, y = loader.next_batch()
        assert (y - x == 1).all()


def test_rows_without_text_are_counted(tmp_path, capsys):
    rows = [json.dumps({"text": f"row {i}"}).encode() for i in range(9)]
    rows += [b'{"text": null}', b'{"text": "\xff"}', b'{"text": 5}', b'{"text": "a caf\xe9 au lait"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(rows))
    command.main(["prepare", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"])
    out = capsys.readouterr().out
    assert "left out or replaced: 3 rows without text and 1 places that are not UTF-8" in out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped_rows"] == 3 and manifest["replaced"] == 1 and sum(manifest["documents"].values()) == 10
    assert resolve(str(tmp_path / "out"), "bytes", 256).skipped == "3 rows without text and 1 places that are not UTF-8"


def test_skipped_files_are_said(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in" / "c.txt").write_bytes(b"\xff")
    command.main(["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"])
    assert "left out or replaced: 1 files that are not UTF-8 (c.txt)" in capsys.readouterr().out


def _parquet(column, values):
    def write(folder):
        pq.write_table(pa.table({column: values}), folder / "x.parquet")
        return "x.parquet"

    return write


def _file(name, content):
    def write(folder):
        (folder / name).write_bytes(content)
        return name

    return write


@pytest.mark.parametrize(
    "write, options, message",
    [
        (_file("x.parquet", b"PAR1 nothing"), [], "cannot be read as parquet"),
        (_parquet("body", ["a"]), [], "no column 'text', only body"),
        (_parquet("text", ["", None]), [], "holds no text"),
        (_parquet("text", ["one"]), [], "holds one document"),
        (_file("x.txt", b""), [], "is empty"),
        (lambda folder: "none.txt", [], "does not exist"),
        (_file("x.txt", b"text"), ["--val-fraction", "0"], "val_fraction is 0.0"),
        (_file("x.txt", b"text"), ["--max-tokens", "-5"], "max_tokens is -5"),
        (_file("x.txt", b"text"), ["--workers", "0"], "workers is 0"),
        (_file("x.txt", b"text"), ["--config-name", "sample-10BT"], "config_name is 'sample-10BT'"),
        (lambda folder: "stdlib", ["--config-name", "sample-10BT"], "config_name"),
    ],
)
def test_bad_input_is_one_sentence_and_no_folder(tmp_path, monkeypatch, write, options, message):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        command.main(["prepare", source, "--out", "out", "--tokenizer", "bytes", *options])
    assert "\n" not in str(error.value) and not list(Path().glob("out*"))


def test_the_exit_code_is_2_and_there_is_no_traceback(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    (tmp_path / "x.txt").write_text("text\n" * 100)
    env = {**os.environ, "PYTHONPATH": str(Path(fastgpt.__file__).parents[1])}
    arguments = ["prepare", "x.txt", "--out", "data", "--tokenizer", "bytes"]
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt.data", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: 'data' already holds something else: name another folder, or move it away\n"
    assert (tmp_path / "data" / "mine.txt").read_text() == "mine"


def test_ctrl_c_says_how_to_go_on(tmp_path, texts, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prepare", interrupted)
    assert command.main(["prepare", texts, "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 130
    assert "same command again" in capsys.readouterr().err


def test_log_lines_where_there_is_no_terminal(monkeypatch, capsys):
    from rich.console import Console

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(stderr=True, soft_wrap=True, force_terminal=False)
    with ProgressReport("corpus (gpt2)", 1_000_000, console) as report:
        for now[0], tokens, share in (
            (1.0, 2_000_000, 0.1),
            (40.0, 41_000_000, 0.2),
            (50.0, 5e7, 0.3),
            (80.0, 8.1e7, 0.5),
        ):
            report.show(int(tokens), share)
        now[0] = 120.0
        report.show(121_000_000, None)
    assert capsys.readouterr().err.splitlines() == [
        "corpus (gpt2): 41M tokens, 1M/s, 20.0%, ETA 5 min",
        "corpus (gpt2): 81M tokens, 1M/s, 50.0%, ETA 2 min",
        "corpus (gpt2): 121M tokens, 1M/s",
    ]


def test_a_bar_on_a_terminal():
    import io

    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with ProgressReport("corpus (gpt2)", 0, console) as report:
        report.show(5_000_000, 0.25)
        report.refresh()
        line = report.get_renderable()
    assert "corpus (gpt2)" in screen.getvalue() and "25%" in screen.getvalue() and "5M tokens" in screen.getvalue()
    assert "ETA" in screen.getvalue() and line is not None


@pytest.mark.parametrize(
    "seconds, said", [(5, "5 s"), (59, "1 min"), (100, "2 min"), (7000, "117 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m, out: (out / m["shards"][0]["file"]).unlink(), "lacks train.*, which its manifest names"),
        (lambda m, out: m.update(format=99), "has format 99 and this version reads up to 2: update fastgpt"),
        (lambda m, out: m.update(shards=5), "its shards are not a list"),
        (lambda m, out: m["shards"][0].update(tokens="many"), "its shards are not a list"),
        (lambda m, out: m["shards"][0].update(file="../x.bin"), "its shards are not a list"),
        (lambda m, out: m.clear() or "{", "is damaged: it is not JSON"),
        (lambda m, out: "[" * 100_000, "is damaged: it is not JSON"),
    ],
)
def test_a_folder_whose_manifest_is_wrong_is_neither_checked_nor_trained_on(tmp_path, texts, change, sentence):
    out = tmp_path / "out"
    command.main(["prepare", texts, "--out", str(out), "--tokenizer", "bytes", "--shard-tokens", "100"])
    manifest = json.loads((out / "manifest.json").read_text())
    written = change(manifest, out)
    (out / "manifest.json").write_text(written if isinstance(written, str) else json.dumps(manifest))
    for use in (lambda: command.main(["check", str(out)]), lambda: resolve(str(out), "bytes", 256)):
        with pytest.raises(UserError, match=sentence) as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
@pytest.mark.parametrize("name", ["a\x1b]0;title\x07", "a\udcff"])
def test_a_name_of_any_bytes_is_prepared_and_printed_without_its_control_characters(tmp_path, texts, capsys, name):
    (tmp_path / "in").mkdir()
    Path(texts).replace(tmp_path / "in" / f"{name}.jsonl")
    (tmp_path / "in" / f"{name}.txt").write_bytes(b"\xff\x80" * 200)
    out = str(tmp_path / name)
    assert command.main(["prepare", str(tmp_path / "in"), "--out", out, "--tokenizer", "bytes"]) == 0
    assert command.main(["check", out]) == 0
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and printed.encode()
    assert "left out or replaced: 1 files that are not UTF-8 (a" in printed
