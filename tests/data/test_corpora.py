"""Documents from every kind of source, in a fixed order; what cannot be read is said or counted."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import corpora, documents, open_corpus
from fastgpt.errors import UserError


def test_stdlib_is_the_running_interpreters_sources():
    corpus = open_corpus("stdlib")
    docs = dict(corpus.documents())
    assert {"os.py", "asyncio/tasks.py", "json/decoder.py"} <= docs.keys()
    assert len(docs) > 300 and sum(map(len, docs.values())) > 5e6
    assert list(docs) == [name for name, _ in documents("stdlib")]
    assert not [name for name in docs if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert corpus.digest() == open_corpus("stdlib").digest()


def test_a_folder_of_all_kinds(tmp_path):
    (tmp_path / "b.txt").write_text("text é\n", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.md").write_text("# mark\n")
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 1}\n{"text": ""}\n')
    pq.write_table(pa.table({"text": ["p", None, "q"], "n": [1, 2, 3]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe broken")
    (tmp_path / "g.png").write_bytes(b"\x89PNG")
    (tmp_path / "h.txt").write_text("")
    corpus = open_corpus(tmp_path)
    assert list(corpus.documents()) == [
        ("a/c.md", "# mark\n"),
        ("b.txt", "text é\n"),
        ("d.jsonl:1", "one"),
        ("d.jsonl:3", "two"),
        ("e.parquet:1", "p"),
        ("e.parquet:3", "q"),
    ]
    assert corpus.skipped == ["f.txt"]
    before = corpus.digest()
    (tmp_path / "b.txt").write_text("text e..\n")
    assert corpus.digest() != before


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from("ab é東🙂\n"), max_size=300),
    piece=st.integers(1, 40),
    line=st.integers(0, 30),
    fraction=st.floats(0.01, 0.99),
)
def test_long_files_in_pieces_lose_nothing(tmp_path_factory, text, piece, line, fraction):
    path = tmp_path_factory.mktemp("pieces") / "x.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", piece)
        patch.setattr(corpora, "LONG_LINE", line)
        assert "".join(corpora.read_pieces(path)) == text
        cut = corpora.cut_position(path, fraction)
        assert "".join([*corpora.read_pieces(path, 0, cut), *corpora.read_pieces(path, cut)]) == text


def _parquet(column):
    def write(path):
        pq.write_table(pa.table(column), path)

    return write


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", lambda p: p.write_text(""), "is empty"),
        ("bytes.txt", lambda p: p.write_bytes(b"\xff\xff"), "UTF-8"),
        ("folder", lambda p: p.mkdir(), "folder without text"),
        ("a.jsonl", lambda p: p.write_text('{"text": "x"}\n{"txt": "y"}\n'), "line 2: .*'text'"),
        ("b.jsonl", lambda p: p.write_text('{"text": "x"\n'), "line 1"),
        ("c.jsonl", lambda p: p.write_text('{"text": 5}\n'), "line 1"),
        ("d.jsonl", lambda p: p.write_text("[1]\n"), "line 1"),
        ("a.parquet", lambda p: p.write_text("not parquet"), "cannot be read as parquet"),
        ("b.parquet", _parquet({"body": ["x"], "n": [1]}), "no column 'text', only body, n"),
        ("c.parquet", _parquet({"text": [1]}), "must hold strings"),
    ],
)
def test_bad_sources_are_one_sentence(tmp_path, name, write, message):
    path = tmp_path / name
    if write is not None:
        write(path)
    with pytest.raises(UserError, match=message) as error:
        list(documents(path))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_text("x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(documents(path))


def test_jsonl_surrogates_survive(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "\ud800"}))
    assert list(documents(path)) == [("x.jsonl:1", "\ud800")]
