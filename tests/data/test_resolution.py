"""A folder of tokens says itself what it was made with, and train takes that where nobody says otherwise."""

import json
import pickle

import numpy as np
import pytest

from fastgpt import train
from fastgpt.common import UserError
from fastgpt.config import parse
from fastgpt.data.preparation import prepare
from fastgpt.data.resolution import resolve, told
from fastgpt.data.tokenizer import get_tokenizer

TEXT = "The rain in Spain stays mainly in the plain.\n" * 300
LETTERS = sorted(set(TEXT))


def letters(folder):
    folder.mkdir()
    ids = np.array([LETTERS.index(letter) for letter in TEXT], np.uint16)
    ids.tofile(folder / "train.bin")
    ids[:3000].tofile(folder / "val.bin")
    itos = dict(enumerate(LETTERS))
    meta = {"vocab_size": len(LETTERS), "itos": itos, "stoi": {letter: i for i, letter in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def prepared(tokenizer):
    def make(folder):
        rows = [json.dumps({"body": f"row {i}"}) for i in range(50)] + ['{"body": null}']
        folder.with_suffix(".jsonl").write_text("\n".join(rows))
        prepare(folder.with_suffix(".jsonl"), folder, get_tokenizer(tokenizer), text_column="body")
        return folder

    return make


def ids(dtype=np.uint16, top=50257):
    def make(folder):
        folder.mkdir()
        for side in ("train", "val"):
            (np.arange(3000) * 7 % top).astype(dtype).tofile(folder / f"{side}.bin")
        return folder

    return make


@pytest.mark.parametrize(
    "make, said, size",
    [
        (letters, "chars", len(LETTERS)),
        (prepared("bytes"), "bytes", 256),
        (prepared("gpt2"), "gpt2", 50304),
        (ids(), "gpt2", 50304),
    ],
)
@pytest.mark.parametrize("device, preset", [("cpu", "demo"), ("cuda", "demo"), ("cpu", "gpt2-124m")])
def test_train_takes_tokenizer_and_vocabulary_of_the_folder(tmp_path, make, said, size, device, preset):
    config = parse(["--preset", preset, "--data", str(make(tmp_path / "data"))], device, told=told)
    assert (config.data.tokenizer, config.model.vocab_size) == (said, size)


@pytest.mark.parametrize("make", [lambda folder: "stdlib", lambda folder: folder, ids(top=256), ids(top=300)])
def test_what_says_nothing_leaves_the_presets(tmp_path, make):
    config = parse(["--data", str(make(tmp_path / "data"))], "cpu", told=told)
    assert (config.data.tokenizer, config.model.vocab_size) == ("bytes", 256)


def test_a_flag_and_a_file_count_more_than_the_folder_and_a_contradiction_is_refused(tmp_path):
    data = str(letters(tmp_path / "data"))
    (tmp_path / "a.toml").write_text(f'[model]\nvocab_size = 64\n[data]\ndata = "{data}"')
    config = parse([str(tmp_path / "a.toml")], "cpu", told=told)
    assert (config.data.tokenizer, config.model.vocab_size) == ("chars", 64)
    (tmp_path / "b.toml").write_text('[cuda.data]\ntokenizer = "bytes"')
    for args, device in ((["--tokenizer", "bytes"], "cpu"), ([str(tmp_path / "b.toml")], "cuda")):
        config = parse([*args, "--data", data, "--vocab-size", "300"], device, told=told)
        assert (config.data.tokenizer, config.model.vocab_size) == ("bytes", 300)
        with pytest.raises(
            UserError, match="was made with the chars tokenizer: tokenizer is 'bytes', leave --tokenizer"
        ):
            resolve(data, "bytes", 300)


def test_a_vocabulary_smaller_than_the_letters_is_refused(tmp_path):
    data = str(letters(tmp_path / "data"))
    assert resolve(data, "chars", len(LETTERS)).tokenizer.letters == LETTERS
    with pytest.raises(UserError, match=f"vocab_size is 5: the chars tokenizer needs at least {len(LETTERS)}"):
        resolve(data, "chars", 5)


def test_a_meta_file_that_is_not_read_is_refused_unless_the_tokenizer_is_given(tmp_path):
    data = ids(top=200)(tmp_path / "data")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 200, "itos": None}))
    with pytest.raises(UserError, match="no table itos"):
        parse(["--data", str(data)], "cpu", told=told)
    assert resolve(str(data), "bytes", 256).tokenizer.name == "bytes"


def test_letters_without_their_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="'chars', whose letters are those of a folder with nanoGPT's meta"):
        resolve(str(ids()(tmp_path / "data")), "chars", 50304)


def test_what_was_left_out_is_told_and_a_column_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert resolve(str(prepared("bytes")(tmp_path / "data")), "bytes", 256).skipped == "1 rows without text"
    source = str(tmp_path / "data.jsonl")
    with pytest.raises(
        UserError, match="no field 'text', only body: name the one that holds the text with --text-column"
    ):
        resolve(source, "bytes", 256)
    assert resolve(source, "bytes", 256, "body").skipped == "1 rows without text"


def test_a_folder_of_pointers_is_refused_before_anything_else(tmp_path):
    (tmp_path / "train.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="a Git LFS pointer"):
        train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
