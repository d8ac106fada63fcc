"""Hugging Face datasets, streamed: read here from a local folder through the datasets library, which needs no network."""

from __future__ import annotations

import json
import sys
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastgpt.common import UserError
from fastgpt.data import encoding, hub
from fastgpt.data import preparation as module
from fastgpt.data.corpora import is_hub_name, open_corpus
from fastgpt.data.preparation import prepare
from fastgpt.data.resolution import resolve
from fastgpt.data.tokenizer import BytesTokenizer, get_tokenizer

BYTES = get_tokenizer("bytes")
TEXTS = [f"document {i}" for i in range(120)]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Three parquet shards of a train split, one of a test split; the library's caches lie in the test's folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "hf" / "modules"))
    folder = tmp_path / "corpus" / "data"
    folder.mkdir(parents=True)
    for i in range(3):
        part = TEXTS[i * 40 : i * 40 + 40]
        pq.write_table(
            pa.table({"text": part, "n": list(range(40))}),
            folder / f"train-{i:05d}-of-00003.parquet",
            row_group_size=15,
        )
    pq.write_table(
        pa.table({"text": ["a test", None, "another"], "n": [1, 2, 3]}), folder / "test-00000-of-00001.parquet"
    )
    return str(tmp_path / "corpus")


def _files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_split_of_a_dataset_is_a_corpus(dataset):
    corpus = open_corpus(f"hf:{dataset}")
    assert [document.text for document in corpus.read()] == TEXTS
    assert [d.text for d in open_corpus(f"hf:{dataset}", split="test").read()] == ["a test", "another"]
    assert (
        corpus.recipe() == open_corpus(f"hf:{dataset}").recipe() != open_corpus(f"hf:{dataset}", split="test").recipe()
    )


def test_every_position_of_a_stream_can_be_gone_on_from(dataset):
    corpus = open_corpus(f"hf:{dataset}")
    reading = corpus.read()
    for i, _ in enumerate(reading, 1):
        if i % 13 == 0 or i in (1, 40, 41, 120):
            position = json.loads(json.dumps(reading.position()))
            resumed = corpus.read(position)
            assert resumed.position() == position
            assert [d.text for d in resumed] == TEXTS[i:]


class _Interrupted(BytesTokenizer):
    calls = 0

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


def test_an_interrupted_stream_is_gone_on_with(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 150)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    options = {"shard_tokens": 300, "workers": 1}
    prepare(f"hf:{dataset}", tmp_path / "want", BYTES, **options)
    with pytest.raises(KeyboardInterrupt):
        prepare(f"hf:{dataset}", tmp_path / "out", _Interrupted(), **options)
    assert json.loads((tmp_path / "out.partial" / "progress.json").read_text())["position"]["row"] > 30
    manifest = prepare(f"hf:{dataset}", tmp_path / "out", BYTES, **options)
    assert _files(tmp_path / "out") == _files(tmp_path / "want")
    assert manifest["source"] == f"hf:{dataset}" and manifest["source_split"] == "train" and manifest["revision"]
    assert sum(manifest["documents"].values()) == len(TEXTS)


def test_a_local_dataset_that_changed_is_something_else(dataset, tmp_path):
    prepare(f"hf:{dataset}", tmp_path / "out", BYTES, workers=1)
    pq.write_table(pa.table({"text": ["new"]}), tmp_path / "corpus" / "data" / "train-00000-of-00003.parquet")
    with pytest.raises(UserError, match=r"already holds something else \(revision '.*' then, '.*' now\)"):
        prepare(f"hf:{dataset}", tmp_path / "out", BYTES, workers=1)


def test_max_tokens_ends_a_stream(dataset, tmp_path):
    manifest = prepare(f"hf:{dataset}", tmp_path / "out", BYTES, max_tokens=400, val_fraction=0.2, workers=1)
    assert 400 <= sum(manifest["tokens"].values()) < 400 + 13


def test_a_stream_that_breaks_says_so_and_can_be_gone_on_with(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 150)
    prepare(f"hf:{dataset}", tmp_path / "want", BYTES, workers=1)
    opened = hub.HubCorpus._open

    class Breaks:
        def __init__(self, stream):
            self.stream = stream
            self.info = stream.info

        def __iter__(self):
            yield from islice(self.stream, 70)
            raise ConnectionResetError("Connection reset by peer")

        def __getattr__(self, name):
            return getattr(self.stream, name)

    with monkeypatch.context() as patch:
        patch.setattr(hub.HubCorpus, "_open", lambda self: Breaks(opened(self)))
        with pytest.raises(UserError, match=r"broke after 70 rows \(ConnectionResetError.*same command again"):
            prepare(f"hf:{dataset}", tmp_path / "out", BYTES, workers=1)
    saved = json.loads((tmp_path / "out.partial" / "progress.json").read_text())
    assert 50 < saved["position"]["row"] < 70, "what came before is kept at once"
    prepare(f"hf:{dataset}", tmp_path / "out", BYTES, workers=1)
    assert _files(tmp_path / "out") == _files(tmp_path / "want")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "nope"}, r"cannot be opened: Bad split: nope\. Available splits: \[.*train"),
        ({"config_name": "nope"}, r"cannot be opened: BuilderConfig 'nope' not found\. Available: \['default'\]"),
        ({"text_column": "body"}, r"no column 'body', only text, n: name the one"),
        ({"text_column": "n"}, r"column 'n' must hold strings, not int"),
    ],
)
def test_bad_options_are_one_sentence(dataset, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(f"hf:{dataset}", tmp_path / "out", BYTES, workers=1, **options)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def _hub_that_answers(monkeypatch, answer):
    """The hub's API without the network: ``answer`` is a commit or an exception."""
    import huggingface_hub

    asked = []

    class Api:
        def dataset_info(self, name, timeout):
            asked.append(name)
            if isinstance(answer, Exception):
                raise answer
            return type("Info", (), {"sha": answer})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def _not_found(cls):
    from unittest.mock import Mock

    return cls("404 Client Error", response=Mock(headers={}, request=Mock()))


def test_unknown_datasets_and_no_network_are_one_sentence(dataset, monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for answer, message in (
        (_not_found(RepositoryNotFoundError), r"'no/such' is not a file or folder here, and the .* no public dataset"),
        (_not_found(GatedRepoError), r"'no/such' needs your consent on huggingface\.co"),
        (OSError("[Errno -2] Name or service not known\nmore"), r"hub cannot be asked .*\(OSError: \[Errno -2\] Name"),
    ):
        _hub_that_answers(monkeypatch, answer)
        with pytest.raises(UserError, match=message) as error:
            open_corpus("no/such")
        assert "\n" not in str(error.value)


def test_the_revision_is_fixed_when_a_preparation_begins(dataset, tmp_path, monkeypatch):
    """The dataset is pinned to the commit that the hub named first; a later run does not even ask."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", 150)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    opened, revisions = hub.HubCorpus._open, []

    def from_folder(self):
        revisions.append(self.revision)
        return opened(hub.HubCorpus(dataset, text_column=self.text_column))

    monkeypatch.setattr(hub.HubCorpus, "_open", from_folder)
    asked = _hub_that_answers(monkeypatch, "abc123")
    with pytest.raises(KeyboardInterrupt):
        prepare("some/name", tmp_path / "out", _Interrupted(), workers=1)
    _hub_that_answers(monkeypatch, "def456")  # an upload in between
    assert prepare("some/name", tmp_path / "out", BYTES, workers=1)["revision"] == "abc123"
    assert prepare("some/name", tmp_path / "out", BYTES, workers=1)["revision"] == "abc123", "and is found again"
    assert revisions == ["abc123", "abc123"] and asked == ["some/name"]
    with pytest.raises(
        UserError, match=r"source 'hf:some/name' then, 'hf:other/name' now; revision 'abc123' then, 'def"
    ):
        prepare("other/name", tmp_path / "out", BYTES, workers=1)


@pytest.mark.parametrize(
    "source, is_one",
    [
        ("HuggingFaceFW/fineweb", True),
        ("openwebtext", True),
        ("hf:./folder", True),
        ("stdlib", False),
        ("a/b/c", False),
        ("./fineweb", False),
        ("~/fineweb", False),
        ("texts/input.txt", False),
        ("part.jsonl.zst", False),
        ("data/train.bin", False),
    ],
)
def test_what_is_taken_for_the_name_of_a_dataset(source, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(source) is is_one
    (tmp_path / "HuggingFaceFW" / "fineweb").mkdir(parents=True)
    assert not is_hub_name("HuggingFaceFW/fineweb"), "a folder of that name is meant"


def test_training_on_a_name_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`python -m fastgpt\.data prepare some/corpus --out data/corpus`"):
        resolve("some/corpus", "bytes", 256)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"not a file or folder here.*pip install datasets"):
        open_corpus("some/name")


def test_a_config_name_for_a_file(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=r"config_name is 'a', and data .*x\.txt' is not a hub dataset"):
        open_corpus(tmp_path / "x.txt", config_name="a")
