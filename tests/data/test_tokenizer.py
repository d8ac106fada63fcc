"""GPT-2's ids are those of tiktoken, from the vocabulary that the package holds."""

import gzip
import hashlib
import json
from itertools import islice

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


def _no_network(*_):
    raise ConnectionError("no route to host")


@pytest.fixture(scope="module")
def tiktokens_own(tmp_path_factory):
    """tiktoken's own route, run offline: its cache holds the two files that it would download, whose sha256 it checks."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for name, text in {"vocab.bpe": module.gpt2_merges(), "encoder.json": json.dumps(module.gpt2_vocabulary())}.items():
        (cache / hashlib.sha1((URL + name).encode()).hexdigest()).write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        patch.setattr(tiktoken.load, "read_file", _no_network)
        patch.setattr(tiktoken.registry, "ENCODINGS", {})
        return tiktoken.get_encoding("gpt2")


def test_ours_is_tiktokens_encoding(tiktokens_own):
    ours = get_tokenizer("gpt2").encoding
    assert ours._mergeable_ranks == tiktokens_own._mergeable_ranks
    assert ours._special_tokens == tiktokens_own._special_tokens
    assert (ours.name, ours.n_vocab) == (tiktokens_own.name, tiktokens_own.n_vocab)
    texts = [document.text for document in islice(open_corpus("stdlib").read(), 40)]
    texts += ["naïve café ﬁ 東京 🙂🙂 \u200b", " \n\n\t  x  ", "<|endoftext|>", "'s 'RE 12345 \r\n", ""]
    texts += ["we'll I'd 've", "x \n", "x\n ", "  \u00a0\u2003 y", "½³Ⅷ٣ a1b2", "\x00\x1f\x7f", "e\u0301\u0301"]
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


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: None,
        lambda content: content[:-9],
        lambda content: b"version https://git-lfs.github.com/spec/v1",
        lambda content: gzip.compress(gzip.decompress(content).replace(b"t he", b"h et", 1)),
    ],
)
def test_a_vocabulary_that_is_missing_or_altered_is_refused(monkeypatch, tmp_path, damaged):
    there = tmp_path / "vocab.bpe.gz"
    if (content := damaged(module.MERGES.read_bytes())) is not None:
        there.write_bytes(content)
    monkeypatch.setattr(module, "MERGES", there)
    with pytest.raises(UserError, match="is not GPT-2's vocabulary as it was installed: install fastgpt again"):
        module.gpt2_vocabulary()


def test_unknown_name():
    with pytest.raises(UserError, match=r"'gpt5'.*gpt2, bytes"):
        get_tokenizer("gpt5")
