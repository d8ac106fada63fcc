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
