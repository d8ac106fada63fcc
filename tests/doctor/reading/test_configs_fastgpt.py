"""fastgpt's TOML, presets and stored configs under nanoGPT's names."""

from __future__ import annotations

from typing import get_args

import pytest

from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, Precision, config_folder, load_preset, preset_names
from fastgpt.doctor.evidence import Place
from fastgpt.doctor.reading.configs import apply_overrides
from fastgpt.doctor.reading.configs_fastgpt import in_fastgpts_names, is_fastgpt, of_sections, parse_fastgpt


def test_toml_comes_under_nanogpts_names():
    text = (
        "# ~40M parameters\n[model]\nn_embd = 384  # narrow\n[data]\ngrad_accum = 32\n[optim]\nlr = 1e-3\nmin_lr_ratio = 0.05\n"
        '[train]\nmax_iters = 20000\nprecision = "fp16"\nout = "runs/a"\nresume = "newest"\n'
    )
    facts = parse_fastgpt(text, "c.toml")
    names = (
        "n_embd",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_decay_iters",
        "dtype",
        "out_dir",
        "init_from",
    )
    assert [facts.get(name) for name in names] == [384, 32, 1e-3, 20000, "float16", "runs/a", "resume"]
    assert facts.get("min_lr") == pytest.approx(5e-5)
    assert str(facts.settings["gradient_accumulation_steps"].place) == "c.toml:5"
    assert facts.settings["n_embd"].comment == "narrow"
    assert facts.comments[0].comment == "~40M parameters"
    assert not facts.unread


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_precision_is_known_as_nanogpts_dtype_or_by_its_own_name(precision):
    facts = parse_fastgpt(f'[train]\nprecision = "{precision}"\n', "c.toml")
    expected = (precision,) if precision in EXPERIMENTAL else ("float32", "bfloat16", "float16")
    assert facts.get("dtype") in expected and not facts.unread


def test_what_toml_does_not_set_has_fastgpts_default():
    facts = parse_fastgpt("[model]\nn_layer = 6\n", "c.toml")
    assert facts.get("learning_rate") == 6e-4
    assert facts.get("min_lr") == pytest.approx(6e-5)
    assert facts.get("dtype") == "bfloat16", "auto, on a GPU"


def test_cuda_sections_count():
    facts = parse_fastgpt("[model]\nn_layer = 2\n[cuda.model]\nn_layer = 6\n", "c.toml")
    assert facts.get("n_layer") == 6
    assert facts.settings["n_layer"].place.line == 4


def test_what_fastgpt_does_not_have_is_listed():
    facts = parse_fastgpt("[model]\nn_layers = 6\nn_head = 'x'\n[modle]\na = 1\n", "c.toml")
    assert [u.why for u in facts.unread] == [
        "fastgpt has no field n_layers (did you mean 'n_layer'?)",
        "n_head is 'x': it must be a number",
        "fastgpt has no section modle",
    ]


def test_toml_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"c\.toml is not valid TOML"):
        parse_fastgpt("[model]\nn_layer = \n", "c.toml")


def test_overrides_of_a_fastgpt_config_have_its_names():
    facts = parse_fastgpt("[model]\nn_layer = 6\n", "c.toml")
    apply_overrides(facts, ["--lr=1e-3", "--data.grad-accum=4", "--nope=1"])
    assert facts.get("learning_rate") == 1e-3
    assert facts.get("gradient_accumulation_steps") == 4
    assert [u.text for u in facts.unread] == ["--nope=1"]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_reads_as_the_library_reads_it(name):
    facts = of_sections(load_preset(name, "cuda").to_dict(), Place("preset"))

    read = parse_fastgpt((config_folder() / f"{name}.toml").read_text(), f"{name}.toml")
    assert not read.unread
    for key in (
        "n_layer",
        "n_embd",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "max_iters",
        "min_lr",
    ):
        assert read.get(key) == facts.get(key), key


def test_what_is_and_is_not_a_fastgpt_config():
    assert is_fastgpt("a = 1\n[optim]\nlr = 1\n")
    assert is_fastgpt("[cuda.model]  # big\n")
    assert not is_fastgpt("n_layer = 6")
    assert not is_fastgpt("x = [optim]")


def test_advice_for_fastgpt_is_in_its_own_names():
    advice = "max_iters = 100\nlr_decay_iters = 100\ngradient_accumulation_steps = 8\nmin_lr = 6e-05\nor so."
    assert in_fastgpts_names(advice) == "max_iters = 100\ngrad_accum = 8\nmin_lr_ratio = 0.1\nor so."
    assert in_fastgpts_names("dtype = 'bfloat16'\ndtype = 'float16'") == "precision = 'bf16'\nprecision = 'fp16'"
