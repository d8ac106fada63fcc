"""Configs are parsed and never executed: what is read, what is listed as unread, and that nothing runs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.common import UserError
from fastgpt.doctor.evidence import ConfigFacts, Place
from fastgpt.doctor.reading.configs import apply_overrides, is_nanogpt, parse_nanogpt
from fastgpt.doctor.reading.configs_fastgpt import parse_fastgpt
from fastgpt.doctor.reading.literals import NOT_READ
from fastgpt.doctor.reading.values import DEFAULTS

REAL = Path(__file__).parents[3] / "docs" / "rtx4070-runs"


def values(text: str) -> dict[str, object]:
    return {name: setting.value for name, setting in parse_nanogpt(text, "c.py").settings.items()}


def overridden(facts: ConfigFacts, *arguments: str) -> ConfigFacts:
    apply_overrides(facts, arguments)
    return facts


def test_the_real_config_is_read_whole():
    facts = parse_nanogpt((REAL / "train_fineweb_40m.py").read_text(encoding="utf-8"), "c.py")
    assert not facts.unread
    assert len(facts.settings) == 25
    assert [facts.get(name) for name in ("n_embd", "dropout", "learning_rate", "batch_size")] == [384, 0.1, 1e-3, 16]
    assert facts.get("wandb_run_name") == "125M-single-parquet-4070"


def test_settings_carry_their_line_and_its_comment():
    facts = parse_nanogpt((REAL / "train_fineweb_40m.py").read_text(encoding="utf-8"), "c.py")
    accumulation = facts.settings["gradient_accumulation_steps"]
    assert str(accumulation.place) == "c.py:12"
    assert accumulation.comment == "Effective batch size: 16 * 32 = 512 sequences"
    assert accumulation.text.startswith("gradient_accumulation_steps = 32")
    claim = facts.comments[0]
    assert (claim.place.line, claim.comment) == (16, "Model (~125M parameters) – perfect for 12 GB VRAM")


def test_defaults_stand_in_for_what_is_not_set():
    facts = parse_nanogpt("batch_size = 4", "c.py")
    assert facts.get("gradient_accumulation_steps") == 40
    assert not facts.is_set("gradient_accumulation_steps")
    assert DEFAULTS["max_iters"] == 600000 and DEFAULTS["vocab_size"] == 50304


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gradient_accumulation_steps = 5 * 8", {"gradient_accumulation_steps": 40}),
        ("learning_rate = 1e-3\nmin_lr = learning_rate / 10", {"learning_rate": 1e-3, "min_lr": 1e-4}),
        ("max_iters = lr_decay_iters // 2", {"max_iters": 300000}),
        ("x = -1\ny = not x", {"x": -1, "y": False}),
        ("dataset = 'fine' + \"web\"", {"dataset": "fineweb"}),
        ("n_layer = n_head = 6", {"n_layer": 6, "n_head": 6}),
        ("beta1, beta2 = 0.9, 0.99", {"beta1": 0.9, "beta2": 0.99}),
        ("max_iters: int = 2_000", {"max_iters": 2000}),
        ("max_iters = 100\nmax_iters *= 2", {"max_iters": 200}),
        ("batch_size = 8; block_size = 256", {"batch_size": 8, "block_size": 256}),
        ("max_iters = 1e4", {"max_iters": 10000}),
        ("max_iters = 1e9 / 524288", {"max_iters": 1907}),
        ("bias = 1", {"bias": True}),
        ("learning_rate = 1", {"learning_rate": 1.0}),
        ("out_dir = 'a'  # not '#'\nout_dir = 'b#c'", {"out_dir": "b#c"}),
        ("\ufefflearning_rate = 1e-3".lstrip("\ufeff"), {"learning_rate": 1e-3}),
        ("batch_size = 8\r\nn_layer = 6\r\n", {"batch_size": 8, "n_layer": 6}),
    ],
)
def test_literals_and_arithmetic_on_them_are_read(text, expected):
    assert values(text) == expected


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("import time", NOT_READ),
        ("from os import *", NOT_READ),
        ("exec(open('x').read())", NOT_READ),
        ("max_iters = int(6e5)", NOT_READ),
        ("max_iters = f'{1}'", NOT_READ),
        ("max_iters = 5 if True else 6", NOT_READ),
        ("if True:\n    max_iters = 5", NOT_READ),
        ("for max_iters in (1, 2): pass", NOT_READ),
        ("max_iters = [1, 2][0]", NOT_READ),
        ("max_iters = somewhere.else_", NOT_READ),
        ("max_iters = unknown_name", "unknown_name is not known"),
        ("max_iters = 10 ** 10 ** 10", "too large"),
        ("max_iters = 2 ** 64 ** 1", "cannot be that large"),
        ("max_iters = 1 / 0", "cannot be computed"),
        ("max_iters = 'many'", "max_iters is 'many': it must be a number"),
        ("max_iters = 1e999", "it must be a number"),
        ("max_iters = True", "it must be a number"),
        ("eval_iters = 2.5", "it must be a whole number"),
        ("max_iters = -", "not a line of Python"),
    ],
)
def test_everything_else_is_listed_and_leaves_the_name_unknown(line, why):
    facts = parse_nanogpt(f"max_iters = 7\nbatch_size = 4\n{line}\n", "c.py")
    assert why in facts.unread[0].why
    assert facts.unread[0].place == Place("c.py", 3)
    assert facts.get("batch_size") == 4
    if "max_iters" in line:
        assert facts.get("max_iters") is None, "neither the earlier value nor nanoGPT's default holds"


def test_a_value_that_hangs_on_an_unknown_one_is_unknown_too():
    facts = parse_nanogpt("max_iters = int(1e5)\nlr_decay_iters = max_iters\nmin_lr = 1e-5", "c.py")
    assert facts.get("lr_decay_iters") is None
    assert facts.get("min_lr") == 1e-5


def test_a_name_set_again_is_known_again():
    assert parse_nanogpt("max_iters = int(1e5)\nmax_iters = 9", "c.py").get("max_iters") == 9


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "batch_size", "vocab_size"])
@pytest.mark.parametrize("value", ["0", "-3", "2.5", "'8'"])
def test_impossible_sizes_are_listed_instead_of_believed(name, value):
    facts = parse_nanogpt(f"{name} = {value}", "c.py")
    assert not facts.is_set(name)
    assert facts.unread[0].why.startswith(f"{name} is ")


def test_a_misspelt_setting_is_pointed_out():
    facts = parse_nanogpt("learning_rte = 3e-4\nmy_own_name = 3", "c.py")
    assert [u.why for u in facts.unread] == [
        "nanoGPT has no setting learning_rte (did you mean 'learning_rate'?), so this line changes nothing"
    ]


def test_prose_in_strings_is_a_comment():
    facts = parse_nanogpt('"""GPT-2,\n~125M parameters"""\nn_layer = 6', "c.py")
    assert facts.comments[0].comment == "GPT-2, ~125M parameters"


def test_a_config_cut_off_is_read_up_to_there():
    facts = parse_nanogpt("n_layer = 6\nn_head = 6 # six\nn_embd = (384", "c.py")
    assert values("n_layer = 6\nn_head = 6 # six\nn_embd = (384") == {"n_layer": 6, "n_head": 6}
    assert [u.text for u in facts.unread] == ["n_embd = (384"]
    assert facts.settings["n_head"].comment == "six"
    assert facts.get("n_embd") is None


@pytest.mark.parametrize(
    "code", ["-" * 5000 + "1", "(" * 3000, "x = " + "1+" * 4000 + "1", "x='" + "a" * 20000 + "'", "\0"]
)
def test_texts_that_break_parsers_are_listed(code):
    facts = parse_nanogpt(f"n_layer = 6\n{code}\n", "c.py")
    assert facts.get("n_layer") == 6


def test_what_is_and_is_not_a_nanogpt_config():
    assert is_nanogpt("batch_size = 8")
    assert not is_nanogpt("x = 8")
    assert not is_nanogpt("step 0: train loss 10.9, val loss 10.9")


# --- overrides ---


def test_overrides_come_after_the_file():
    facts = parse_nanogpt("batch_size = 8\nn_layer = 6", "c.py")
    overridden(facts, "--batch_size=4", "--compile=False", "--dataset=shakespeare", "--learning_rate", "1e-3")
    assert [facts.get(k) for k in ("batch_size", "n_layer", "compile", "dataset", "learning_rate")] == [
        *(4, 6, False),
        *("shakespeare", 1e-3),
    ]
    assert str(facts.settings["batch_size"].place) == "command line"
    assert not facts.unread


def test_an_override_that_nanogpt_would_stop_at_is_listed():
    facts = overridden(parse_nanogpt("", "c.py"), "--dropout=0", "--batchsize=8", "--batch_size=many", "--n_layer=0")
    reasons = {u.text: u.why for u in facts.unread}
    assert "takes a value of type float" in reasons["--dropout=0"]
    assert "did you mean 'batch_size'?" in reasons["--batchsize=8"]
    assert "must be a number" in reasons["--batch_size=many"]
    assert "at least 1" in reasons["--n_layer=0"]
    assert facts.get("dropout") == 0.0
    assert facts.get("batch_size") == 12


@pytest.mark.parametrize("argument", ["batch_size=8", "--batch_size", "--", "-b=3", "--=3", ""])
def test_an_override_of_another_form_is_refused_with_an_example(argument):
    with pytest.raises(UserError, match="write it as --key=value"):
        overridden(parse_nanogpt("", "c.py"), argument)


# --- nothing runs, nothing raises ---

ATTACKS = (
    "open({canary!r}, 'w')",
    "__import__('pathlib').Path({canary!r}).touch()",
    "batch_size = [open({canary!r}, 'w') for _ in (1,)][0] and 8",
    "import os; os.system('touch ' + {canary!r})",
    "exec(\"open({canary!r}, 'w')\")",
    "x: open({canary!r}, 'w') = 8",
    "def f(a=open({canary!r}, 'w')): pass",
    "class A(metaclass=lambda *a: open({canary!r}, 'w')): pass",
    "n_layer = (lambda: open({canary!r}, 'w'))()",
    "batch_size = f\"{{open({canary!r}, 'w')}}\"",
    "assert open({canary!r}, 'w')",
    "@open({canary!r}, 'w')\ndef g(): pass",
)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("also_broken", [False, True])
def test_code_in_a_config_is_never_executed(attack, also_broken, tmp_path):
    canary = tmp_path / "canary"
    facts = parse_nanogpt(f"n_layer = 6\n{attack.format(canary=str(canary))}\n" + "(\n" * also_broken, "c.py")
    assert not canary.exists()
    assert facts.unread or "x:" in attack


@pytest.mark.parametrize("attack", ["__import__('os').system('touch {0}')", "[open('{0}', 'w')]"])
def test_code_in_an_override_is_never_executed(attack, tmp_path):
    canary = tmp_path / "canary"
    overridden(parse_nanogpt("", "c.py"), f"--dataset={attack.format(canary)}", f"--batch_size={attack.format(canary)}")
    assert not canary.exists()


DAMAGE = ["", "(", "'", '"""', "\n", "#", "=", "9", "\0", "**", "\\", "é", "import os"]
QUIET = settings(max_examples=150, deadline=None, database=None)
pieces = st.sampled_from(
    [
        "batch_size",
        "max_iters",
        "=",
        "==",
        "+=",
        "1e-3",
        "5",
        "*",
        "**",
        "'a'",
        "(",
        ")",
        "[",
        "\n",
        " ",
        "    ",
        "#",
        ":",
        ",",
    ]
    + ["if", "def f", "lambda", "import os", '"""', "\\", "\t", "\0", "-", "f'{1}'", "True", "é", "\x0c", "\r"]
)


@QUIET
@given(st.one_of(st.text(max_size=300), st.lists(pieces, max_size=40).map("".join)))
def test_any_text_is_a_config_of_something_or_nothing(text):
    facts = parse_nanogpt(text, "c.py")
    for found in (*facts.settings.values(), *facts.comments, *facts.unread):
        assert 1 <= found.place.line <= text.count("\n") + text.count("\r") + 1


@QUIET
@given(st.integers(0, 10**9))
def test_a_mutated_real_config_never_raises(seed):
    rng = random.Random(seed)
    text = list((REAL / "train_fineweb_124m.py").read_text(encoding="utf-8"))
    for _ in range(rng.randint(1, 20)):
        at = rng.randrange(len(text))
        text[at : at + rng.randint(0, 3)] = rng.choice(
            ["", "(", "'", '"""', "\n", "#", "=", "9", "\0", "**", "\\", "é", "import os"]
        )
    facts = parse_nanogpt("".join(text), "c.py")
    for name in ("n_layer", "n_embd", "batch_size"):
        assert facts.get(name) is None or facts.get(name) >= 1


@QUIET
@given(st.lists(st.text(max_size=40), max_size=4))
def test_any_override_is_taken_listed_or_refused(arguments):
    for facts in (parse_nanogpt("", "c.py"), parse_fastgpt("", "c.toml")):
        try:
            overridden(facts, *(f"--{argument}" for argument in arguments))
        except UserError as error:
            assert "--key=value" in str(error)


@QUIET
@given(st.one_of(st.text(max_size=200), st.lists(pieces, max_size=30).map(lambda p: "[model]\n" + "".join(p))))
def test_any_text_is_toml_or_refused_in_one_sentence(text):
    try:
        parse_fastgpt(text, "c.toml")
    except UserError as error:
        assert str(error).startswith("config file c.toml is not valid TOML")
