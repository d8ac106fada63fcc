"""nanoGPT's meta.pkl: letters come out, and nothing that a pickle could do happens."""

import io
import pickle
import struct

import pytest

from fastgpt.common import UserError
from fastgpt.data import letters as module
from fastgpt.data.letters import read_letters
from fastgpt.data.tokenizer import CharTokenizer

LETTERS = sorted(set("Ein Zug fährt ein.\n"))
ITOS = dict(enumerate(LETTERS))
STOI = {letter: i for i, letter in ITOS.items()}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "meta",
    [
        {"vocab_size": len(LETTERS), "itos": ITOS, "stoi": STOI},
        {"itos": ITOS},
        {"stoi": STOI, "vocab_size": len(LETTERS)},
        {"itos": LETTERS, "name": "trains", "ratio": None},
    ],
)
def test_the_letters_are_read_by_id(tmp_path, meta, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    assert read_letters(tmp_path / "meta.pkl") == LETTERS


class Hostile:
    def __reduce__(self):
        return (print, ("this code ran",))


def deep(levels):
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


@pytest.mark.parametrize(
    "content, why",
    [
        (pickle.dumps(Hostile()), "holds more than strings, whole numbers and tables"),
        (pickle.dumps({"itos": ITOS, "x": Hostile()}, 2), "holds more than"),
        (pickle.dumps({"itos": ITOS, "x": (1, 2)}), "holds more than .* \\(TUPLE2\\)"),
        (pickle.dumps({"itos": ITOS, "x": 0.5}), "holds more than .* \\(BINFLOAT\\)"),
        (pickle.dumps({"itos": ITOS}, 0), "holds more than"),
        (b"\x80\x02}r" + struct.pack("<I", 2**31) + b".", "counts more objects than it has bytes"),
        (b"\x80\x04X" + struct.pack("<I", 2**31) + b"a.", "is not read"),
        (b"\x80\x02X\xff\xff\xff\xff.", "is not read"),
        (b"\x80\x02]}s.", "is not read"),
        (b"\x80\x02a.", "is not read"),
        (pickle.dumps({"itos": ITOS})[:-9], "is not read"),
        (deep(10_000), "no table itos"),
        (b"", "is not read"),
        (b"letters", "is not read"),
        (pickle.dumps(LETTERS), "no table itos"),
        (pickle.dumps({"vocab_size": 50257}), "no table itos"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "no table itos"),
        (pickle.dumps({"stoi": {"a": [], "b": 1}}), "no table itos"),
        (pickle.dumps({"itos": {0: "a", 1: 7}}), "not a list of letters"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "of 2 letters: .* no two alike"),
        (pickle.dumps({"itos": ["a"]}), "of 1 letters: it must have 2 to 65536"),
        (pickle.dumps({"itos": ITOS, "stoi": {**STOI, "E": 0, "\n": STOI["E"]}}), "contradicts itself"),
        (pickle.dumps({"itos": ITOS, "vocab_size": 65}), "contradicts itself"),
    ],
)
def test_anything_else_is_refused_unrun(tmp_path, capsys, content, why):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=f"meta.pkl .*{why}") as error:
        read_letters(tmp_path / "meta.pkl")
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_a_large_file_is_not_read_and_code_is_found_by_the_unpickler_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_FILE", 20)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": ITOS}))
    with pytest.raises(UserError, match="is larger than"):
        read_letters(tmp_path / "meta.pkl")
    with pytest.raises(pickle.UnpicklingError, match="print"):
        module._Plain(io.BytesIO(pickle.dumps(Hostile()))).load()


def test_the_tokenizer_has_these_letters_and_no_others():
    tok = CharTokenizer(LETTERS)
    assert tok.decode(tok.encode("ein Zug")) == "ein Zug" and tok.vocab_size == len(LETTERS)
    assert tok.encode_batch(["Z"])[0].tolist() == tok.encode("Z") and tok.decode([999, -1]) == ""
    with pytest.raises(
        UserError, match=r"the text has 'x', which is none of the 15 letters that the model knows:  \.EZ"
    ):
        tok.encode("Zug x")
    for wrong in (["a"], ["a", "a"], "ab", ["a", ""], None):
        with pytest.raises(UserError, match="has a vocabulary"):
            CharTokenizer(wrong)
