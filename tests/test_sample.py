"""Sampling from a checkpoint: text comes piece by piece and whole; bad values are refused in one sentence."""

import pickle

import numpy as np
import pytest

from fastgpt import sample, train
from fastgpt.common import UserError, as_typed
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


@pytest.fixture
def run_on_letters(tmp_path, capsys):
    """A run of two steps on a character dataset of nanoGPT's, by its folder alone; and what it printed."""
    text = "the cat sat on the mat\n" * 200
    letters, data = sorted(set(text)), tmp_path / "data"
    data.mkdir()
    ids = np.array([letters.index(letter) for letter in text], np.uint16)
    ids.tofile(data / "train.bin")
    ids[:2000].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(letters), "itos": dict(enumerate(letters))}))
    out = tmp_path / "run"
    flags = "--device cpu --kernels eager --n-layer 1 --n-embd 16 --block-size 16 --max-iters 2 --eval-iters 1 --no-tensorboard"
    more = ["--sample-interval", "1", "--sample-prompt", "cat"]
    assert train.main([*flags.split(), *more, "--data", str(data), "--out", str(out)]) == 0
    return out, letters, " ".join(capsys.readouterr().out.split())


def test_a_model_of_letters_trains_by_its_folder_and_samples_in_its_letters(run_on_letters, capsys):
    out, letters, printed = run_on_letters
    assert "vocabulary 11" in printed and "(chars, 11 letters): 4.6k tokens, and 2k to validate" in printed
    assert "run 2 steps, 256 tokens: 5.6% of the data" in printed
    assert "sample at step 1: 'cat" in printed
    assert "done 2 steps, 256 tokens; validation loss " in printed and " text cat" in printed
    assert printed.endswith(as_typed(f"next python -m fastgpt.sample {out} python -m fastgpt.plot {out}"))
    assert "rank" not in printed and "mfu" not in printed and "GB of main memory are free" in printed
    words = [str(out), "--tokens", "40", "--device", "cpu"]
    assert sample.main([*words, "--prompt", "the "]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the ") and set(text.split("-----")[0]) <= set(letters)
    with pytest.raises(UserError, match="the text has 'x', which is none of the 11 letters"):
        sample.main([*words, "--prompt", "x"])


def test_what_letters_cannot_do_is_refused_before_the_run(run_on_letters, tmp_path):
    out, _, _ = run_on_letters
    for flag in (
        ["--mask-documents"],
        ["--hellaswag", "x.jsonl"],
        ["--sample-interval", "5", "--sample-prompt", "XYZ"],
    ):
        with pytest.raises(UserError, match="11 letters"):
            train.main(["--data", str(out.parent / "data"), "--device", "cpu", *flag, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
