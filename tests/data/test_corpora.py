"""Documents from every kind of source, in a fixed order; what cannot be read is said or counted."""

import csv
import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.common import UserError
from fastgpt.data import readers
from fastgpt.data.corpora import open_corpus


def texts(source, **options):
    return [document.text for document in open_corpus(source, **options).read()]


def test_stdlib_is_the_running_interpreters_sources():
    corpus = open_corpus("stdlib")
    names = [path.relative_to(corpus.root).as_posix() for path in corpus.files]
    assert {"os.py", "asyncio/tasks.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    docs = texts("stdlib")
    assert len(docs) > 300 and sum(map(len, docs)) > 5e6
    assert docs == texts("stdlib")
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
    reading = corpus.read()
    assert [document.text for document in reading] == ["# mark\n", "text é\n", "one", "two", "p", "q"]
    assert reading.undecoded == ["f.txt"] and reading.done() == 1.0
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
        patch.setattr(readers, "PIECE", piece)
        patch.setattr(readers, "LONG_LINE", line)
        pieces = [row.text for row in readers.read_text(path)]
        assert "".join(pieces) == text
        cut = readers.cut_position(path, fraction)
        parts = [(row.side, row.text) for row in readers.read_text(path, cut=cut)]
        assert "".join(piece for _, piece in parts) == text
        assert "".join(piece for side, piece in parts if side == "train") == text.encode()[:cut].decode()
        for skip in range(0, len(parts) + 1, 7):
            assert [row.text for row in readers.read_text(path, skip=skip)] == pieces[skip:]
            assert [(row.side, row.text) for row in readers.read_text(path, skip, cut)] == parts[skip:]


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
        ("b.parquet", _parquet({"body": ["x"], "n": [1]}), "no column 'text', only body, n: name .* --text-column"),
        ("h.jsonl", lambda p: p.write_text('{"body": "x"}\n'), "line 1: .*no field 'text', only body: .*--text-column"),
        ("a.json", lambda p: p.write_text('[{"body": "x"}]'), "item 1: .*no field 'text', only body"),
        ("b.json", lambda p: p.write_text('["x"]'), "item 1: each line must be a JSON object"),
        ("c.json", lambda p: p.write_text('[{"text": "x"}'), "is damaged: it is not JSON"),
        ("d.json", lambda p: p.write_text('{\n"a": 1}'), "line 1: each line must be a JSON object"),
        ("a.csv", lambda p: p.write_text("body;n\nx;1\n"), "no column 'text', only body, n"),
        ("b.csv", lambda p: p.write_text('text\n"' + "x" * 500 + "\n"), "cannot be read as CSV"),
        ("a.html", lambda p: p.write_text("<p>x"), "text among other things"),
        ("a.ipynb", lambda p: p.write_text("{}"), "text among other things"),
        ("lfs.txt", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        ("lfs.parquet", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        ("c.parquet", _parquet({"text": [1]}), "must hold strings, not int64"),
        ("e.jsonl.gz", lambda p: p.write_bytes(b"not gzip"), "cannot be decompressed"),
        ("f.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-9]), "cannot be decompressed"),
        ("g.jsonl.zst", lambda p: p.write_bytes(b"not zstd"), "cannot be decompressed"),
    ],
)
def test_bad_sources_are_one_sentence(tmp_path, monkeypatch, name, write, message):
    monkeypatch.setattr(readers, "LONGEST_LINE", 300)
    path = tmp_path / name
    if write is not None:
        write(path)
    with pytest.raises(UserError, match=message) as error:
        texts(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def _compressed(kind, data):
    return gzip.compress(data) if kind == "gz" else pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_json_lines(tmp_path, kind):
    lines = "".join(json.dumps({"body": f"té {i}", "text": "no"}) + "\n" for i in range(1000))
    (tmp_path / f"x.jsonl.{kind}").write_bytes(_compressed(kind, lines.encode()))
    found = texts(tmp_path / f"x.jsonl.{kind}", text_column="body")
    assert found == [f"té {i}" for i in range(1000)]
    assert texts(tmp_path, text_column="body") == found, "found in a folder too"


ROWS = ["one\r\ntwo", None, 'thrée, "four"', None, "five"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "y.json", "x.csv", "y.csv", "x.tsv", "x.parquet"])
def test_every_format_gives_the_same_rows_and_counts_those_without_text(tmp_path, name, mark):
    path, rows = tmp_path / name, [{"body": text, "n": i} for i, text in enumerate(ROWS)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name in ("x.jsonl", "y.json"):
        path.write_bytes(mark + "".join(json.dumps(row) + "\n" for row in rows).encode())
    elif name == "x.json":
        path.write_bytes(mark + json.dumps(rows, indent=1).encode())
    else:
        out = io.StringIO(newline="")
        table = csv.DictWriter(out, ["n", "body"], delimiter={"x.csv": ",", "y.csv": ";", "x.tsv": "\t"}[name])
        table.writeheader()
        table.writerows(rows)
        path.write_bytes(mark + out.getvalue().encode())
    reading = open_corpus(path, text_column="body").read()
    assert [document.text for document in reading] == [text for text in ROWS if text]
    assert reading.position() == {"file": 1, "row": 0, "undecoded": [], "nulls": 2, "replaced": 0}
    assert open_corpus(path).split_by_position(0.1) is None
    assert next(iter(open_corpus(path, text_column="body").read({"file": 0, "row": 2}))).text == ROWS[2]


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(tmp_path / "x.txt") == ["one\r\ntwo"]


@pytest.mark.parametrize("name, line", [("x.jsonl", b'{"text": "\xff"}\n'), ("x.csv", b"\xff\n")])
def test_a_row_that_is_not_utf_8_is_counted_and_the_others_are_read(tmp_path, name, line):
    good = b'{"text": "good"}\n' if name == "x.jsonl" else b"good\n"
    (tmp_path / name).write_bytes((b"" if name == "x.jsonl" else b"text\n") + good + line + good)
    reading = open_corpus(tmp_path / name).read()
    assert [document.text for document in reading] == ["good", "good"] and reading.nulls == 1


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.csv", "x.parquet", "y.parquet"])
def test_bytes_that_are_not_utf_8_are_replaced_and_counted_in_every_format(tmp_path, name):
    text, path = b"caf\xe9 cr\xe8me and U+FFFD \xef\xbf\xbd of its own", tmp_path / name
    if name.endswith("parquet"):
        column = pa.array([text], pa.large_binary()).view(pa.large_string())
        if name == "y.parquet":
            column = column.dictionary_encode()
        pq.write_table(pa.table({"text": column}), path)
    else:
        row = b'{"text": "%s"}' % text
        path.write_bytes({"x.txt": text, "x.jsonl": row, "x.json": b"[%s]" % row, "x.csv": b"text\n" + text}[name])
    reading = open_corpus(path).read()
    assert [document.text for document in reading] == [text.decode(errors="replace")]
    assert (reading.replaced, reading.nulls) == (2, 0)


def test_utf_16_is_named_and_zero_bytes_are_no_text(tmp_path):
    for content, what in (
        ("Привет".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        (b"a\0b\0", "50% of its char"),
    ):
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"x.txt' cannot be read as UTF-8 text: {what}"):
            texts(tmp_path / "x.txt")


@pytest.mark.parametrize("value", ["5", "true", '["a"]', '{"a": "b"}', "null"])
@pytest.mark.parametrize("form", ["%s\n%s\n", "[%s, %s]"])
def test_a_field_that_holds_no_text_is_counted_where_others_do(tmp_path, value, form):
    path, good, other = tmp_path / "x.json", '{"text": "x"}', f'{{"text": {value}}}'
    for rows in ((good, other), (other, good)):
        path.write_text(form % rows)
        reading = open_corpus(path).read()
        assert [document.text for document in reading] == ["x"] and reading.nulls == 1


def test_a_large_json_array_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text('[{"text": "x"}]')
    monkeypatch.setattr(readers, "LARGEST_TEXT", 8)
    with pytest.raises(UserError, match=r"is a JSON array of more than .*jq -c '\.\[\]'"):
        texts(tmp_path / "x.json")


def test_every_position_can_be_gone_on_from(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xff\xff\xff broken")
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(10)]}), tmp_path / "c.parquet", row_group_size=3)
    (tmp_path / "d.jsonl.gz").write_bytes(_compressed("gz", b'{"text": "x"}\n{"text": "y"}\n'))
    (tmp_path / "e.jsonl.zst").write_bytes(_compressed("zst", b'{"text": "x"}\n{"text": "y"}\n'))
    (tmp_path / "f.txt").write_text("plain")
    corpus = open_corpus(tmp_path)
    everything = list(corpus.read())
    assert len(everything) == 17
    reading = corpus.read()
    for i, _ in enumerate(reading, 1):
        resumed = corpus.read(json.loads(json.dumps(reading.position())))
        assert list(resumed) == everything[i:]
        assert resumed.undecoded == ["b.txt"] and 0 < reading.done() <= 1


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_text("x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        texts(path)


def test_jsonl_surrogates_survive(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "\ud800"}))
    assert texts(path) == ["\ud800"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_without_an_end_is_not_read_as_a_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    content = json.dumps({"text": "a"}).encode() + b"\n" + bytes(10**6)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=r"line 2 is longer than .* put a document on a line"):
        texts(tmp_path / name)
