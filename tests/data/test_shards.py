"""The shard format: what is whole is read, what is damaged is refused with the numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.common import UserError
from fastgpt.data import shards
from fastgpt.data.shards import check_ids, open_shard
from tests.shards import write_shard

tokens_lists = st.lists(st.integers(0, 65535), min_size=1, max_size=300)


@settings(deadline=None)
@given(tokens=tokens_lists)
def test_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    write_shard(path, np.array(tokens))
    assert open_shard(path).tolist() == tokens


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 50256), min_size=1, max_size=300))
def test_nanogpt_files_are_read_as_they_are(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("nanogpt") / "train.bin"
    np.array(tokens, np.uint16).tofile(path)
    assert open_shard(path).tolist() == tokens


def test_layout_is_llmcs(tmp_path):
    write_shard(tmp_path / "x.bin", np.array([1, 2, 50256], np.uint16))
    raw = (tmp_path / "x.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert np.frombuffer(raw[1024:], "<u2").tolist() == [1, 2, 50256]


# bug 26: header count = bytes / 2.
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: raw[:-2], "truncated: its header says 100 tokens, 1224 bytes, and it has 1222 bytes"),
        (lambda raw: raw[:-1], "truncated.*1223 bytes"),
        (lambda raw: raw[:500], "truncated: 500 bytes"),
        (lambda raw: raw + b"xx", "too long.*1226 bytes"),
        (lambda raw: raw[:8] + bytes(1016), "holds no tokens"),
        (lambda raw: raw[:4] + b"\7\0\0\0" + raw[8:], "version 7"),
        (lambda raw: np.int32(20240801).tobytes() + raw[4:], "Llama 3"),
        (lambda raw: b"abc", "3 bytes, an odd number"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    path = tmp_path / "bad.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        open_shard(path)
    assert "bad.bin" in str(error.value)


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "a Git LFS pointer"),
        ("b.bin", b"  <!doctype HTML><html><body>Not found</body></html>", "a web page"),
        ("c.bin", b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
        ("d.bin", b"\x93NUMPY\1\0" + bytes(122), r"a NumPy array: let its name end in \.npy"),
        ("e.bin", b"PAR1" + bytes(60), "a parquet table"),
        ("f.bin", b"\x1f\x8b\x08" + bytes(61), "compressed with gzip"),
        ("g.bin", b"PK\3\4" + bytes(60), "a zip archive"),
        ("h.bin", "Ein Märchen für alle, die noch nicht schlafen können.\r\n".encode() * 4, "text: run"),
        ("i.bin", b'\x40\0\0\0\0\0\0\0{"__metadata__":{}}', "a safetensors file"),
        ("j.npy", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_what_is_not_tokens_is_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name[0]}.{name[2:]}' holds no tokens, it is {what}"):
        open_shard(tmp_path / name)


def test_numpy_arrays_of_uint16_are_read_in_place(tmp_path):
    np.save(tmp_path / "x_train_000001.npy", np.arange(3000, dtype=np.uint16))
    tokens = open_shard(tmp_path / "x_train_000001.npy")
    assert isinstance(tokens, np.memmap) and tokens.tolist() == list(range(3000))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.arange(9), r"holds int64 of shape \(9,\): it must be one row of uint16"),
        (np.zeros((2, 3), np.uint16), r"shape \(2, 3\)"),
        (np.arange(9, dtype=">u2"), "holds >u2"),
        (np.array([], np.uint16), "holds no tokens"),
        (np.array([{}], object), "cannot be read as a NumPy array"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message):
        open_shard(tmp_path / "x.npy")


def test_a_cut_array_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(900, dtype=np.uint16))
    raw = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(raw[:-2])
    with pytest.raises(UserError, match="cannot be read as a NumPy array"):
        open_shard(tmp_path / "x.npy")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.bin' does not exist"):
        open_shard(tmp_path / "none.bin")


# bug 26: ids < vocab.
@settings(deadline=None)
@given(tokens=tokens_lists, vocab=st.integers(1, 65536), chunk=st.integers(1, 64))
def test_ids_are_checked_against_the_vocabulary(tokens, vocab, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK", chunk)
        first = next((i for i, t in enumerate(tokens) if t >= vocab), None)
        if first is None:
            check_ids(np.array(tokens, np.uint16), vocab, "x.bin")
        else:
            with pytest.raises(UserError, match=rf"id {tokens[first]} at token {first}, and vocab_size is {vocab}"):
                check_ids(np.array(tokens, np.uint16), vocab, "x.bin")
