"""Sampling from a checkpoint: text comes piece by piece and whole; bad values are refused in one sentence."""

import pytest

from fastgpt.common import UserError
from fastgpt.data.tokenizer import get_tokenizer
from fastgpt.sample import SampleConfig, pieces


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_streamed_pieces_add_up_and_never_show_half_a_character(name):
    tokenizer = get_tokenizer(name)
    prompt, ids = list(tokenizer.encode("def ")), list(tokenizer.encode("naïve 日本語 🎉 x"))
    shown = list(pieces(tokenizer, prompt, ids))
    assert "".join(shown) == "naïve 日本語 🎉 x"
    assert not any("\ufffd" in piece for piece in shown) and len(shown) > 5


def test_text_that_ends_inside_a_character_is_not_lost():
    tokenizer = get_tokenizer("bytes")
    assert "".join(pieces(tokenizer, [], list("aé".encode())[:-1])) == "a\ufffd"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("samples", 0),
        ("temperature", -1.0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("prompt", ""),
    ],
)
def test_bad_values_name_the_field(field, value):
    with pytest.raises(UserError, match=f"^{field} is"):
        SampleConfig(**{"checkpoint": ".", field: value})
