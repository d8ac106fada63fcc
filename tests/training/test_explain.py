"""--explain-kernels: what a step would launch on a card that is not here, and who chose it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastgpt import train
from fastgpt.common import UserError
from fastgpt.config import load_preset, parse
from fastgpt.kernels import matmul, tuning  # noqa: F401 (whose spaces the tables are of)
from fastgpt.training import explain
from fastgpt.training.dry_run import Chosen, Record

ROOT = Path(__file__).parents[2]
CARD = explain.Card("NVIDIA GeForce RTX 4070", 89, 46)
CUBLAS = (("cublas", 1),)
TILES = (("block_m", 128), ("block_n", 64), ("block_k", 32), ("group", 8), ("num_warps", 4), ("num_stages", 3))


def linear(kernel, config, source, shape=(8192, 3072, 768)):
    return Chosen(kernel, "bf16", "N3072 K768", config, source, shape)


def records(*choices, launches=(), products=()):
    """What steps of one and two micro-batches ask for, in each of which these happen once."""
    found = []
    for n in (1, 2):
        counts = [Counter({key: n for key in keys}) for keys in (choices, launches, products)]
        found.append(Record(*counts, sweeps=Counter(gelu=12 * n), moved=Counter()))
    return found


def shown(one, two, preset="gpt2-124m", width=160):
    console = Console(width=width, record=True, file=io.StringIO())
    explain.show(load_preset(preset, "cuda"), CARD, "bf16", one, two, console)
    return console.export_text()


def line_with(text, part):
    return " ".join(next(line for line in text.splitlines() if part in line).split())


def test_a_matmul_of_each_engine_with_its_shape_config_and_origin():
    text = shown(
        *records(
            linear("linear.gelu", TILES, "measured (your table, NVIDIA GeForce RTX 4070)"),
            linear("linear.dgelu", CUBLAS, "default: never measured"),
        )
    )
    assert "linear + GELU, bf16 8192 x 3072 x 768 Triton 128x64x32 w4 s3 measured" in line_with(text, "linear + GELU")
    assert line_with(text, "input gradient x GELU'").endswith("cuBLAS - default: never measured 1")
    text = shown(*records(linear("linear.dgelu", CUBLAS, "default: never measured")), preset="modern-124m")
    assert "input gradient x ReLU2', bf16" in text and "GELU" not in text


def test_at_80_columns_no_word_is_broken():
    tiles = {"BLOCK_M": 128, "BLOCK_N": 32, "programs_per_sm": 2, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
    text = shown(*records(linear("linear.none", tuple(tiles.items()), "default: never measured")), width=80)
    words = text.split()
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        "8192",
        "Triton",
        "BLOCK_M=128",
        "programs_per_sm=2",
        "maxnreg=128",
        "default:",
        "measured",
        "launches",
    ):
        assert word in words, text


def test_a_ranked_entry_of_this_card_needs_no_name_one_of_another_has_it():
    here, other = ("ranked (NVIDIA GeForce RTX 4070)", "ranked (NVIDIA GeForce RTX 4090, 128 SMs)")
    text = shown(*records(linear("linear_fast.gelu", TILES, here), linear("linear_fast.dgelu", TILES, other)))
    assert "ranked 1" in line_with(text, "linear + GELU, bf16, sums in fp16") and "RTX 4090, 128 SMs" in text


def test_a_ranked_config_says_how_far_behind_it_is_whatever_overlaps(monkeypatch):
    under = {"usual": 1.0, "all overlaps": 1.012, "nothing overlaps": 1.0, "no L2": 1.025}
    sources = {"linear_fast.gelu": tuning.source_hash("linear_fast.gelu"), "linear_fast.dgelu": "0123"}

    def entries_for(key, here):
        assert here == tuning.Target(89, 46, 101376)
        evidence = {"source": sources[key.kernel], "under": under}
        return [(tuning.TableEntry(key, dict(TILES), "ranked", {}, evidence), None)]

    monkeypatch.setattr(tuning, "entries_for", entries_for)
    text = shown(*records(*(linear(kernel, TILES, "ranked (NVIDIA GeForce RTX 4070)") for kernel in sources)))
    table = text[text.index("Time over the quickest") :]
    assert line_with(table, "nothing") == "what, shape usual all overlaps nothing overlaps no L2"
    assert line_with(table, "linear_fast.gelu") == "linear_fast.gelu, bf16 N3072 K768 1.000 1.012 1.000 1.025"
    assert "Ranked for older code: linear_fast.dgelu." in table


def test_what_happens_once_a_step_is_told_from_what_every_micro_batch_does():
    one, two = records(linear("linear.gelu", CUBLAS, "default"))
    update = Chosen("adamw.update", "fp32", "any", (("BLOCK", 1024),), "default", None)
    for record in (one, two):
        record.choices[update] = 1
    assert line_with(shown(one, two), "adamw.update").endswith("1, once")


def test_products_of_the_head_fixed_kernels_and_passes_are_not_left_out():
    head, block = (1664, 50304, 768, "bfloat16"), (8192, 768, 768, "bfloat16")
    text = shown(*records(launches=[("fused_embedding", "embedding_forward_kernel")], products=[head, block]))
    assert line_with(text, "head, bf16").startswith("head, bf16 1664 x 50304 x 768 cuBLAS")
    assert "embedding_forward 1" in text and "gelu 12" in text
    assert "8192 x 768 x 768" not in text, "the linears' are listed by who chose them"


# ---------------------------------------------------------------- the whole of it


def run(*arguments, **env):
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"COLUMNS": "160"} | env
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)


def test_a_step_for_an_rtx_4070_without_one(tmp_path):
    done = run("--preset", "gpt2-40m", "--explain-kernels", "rtx4070", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "NVIDIA GeForce RTX 4070 (sm_89, 46 SMs), bf16, micro-batches of 16 x 1024 tokens" in done.stdout
    assert line_with(done.stdout, "linear + GELU").endswith("16384 x 1536 x 384 cuBLAS - default: never measured 12")
    assert "head, bf16" in done.stdout and line_with(done.stdout, "adamw.update").endswith("once")
    for kernel in ("attention.forward", "attention.backward_q", "layer_norm.backward", "cross_entropy.rows"):
        assert line_with(done.stdout, kernel), kernel
    assert not (ROOT / "runs" / "gpt2-40m").exists(), "nothing is trained"


def test_sums_in_fp16_are_tritons_in_the_tables_tiles():
    done = run("--preset", "gpt2-40m", "--precision", "fp16-fast", "--explain-kernels=rtx4070")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cuBLAS  " not in done.stdout.split("launches: in a micro-batch")[0]
    assert "16384 x 1536 x 384 Triton 128x128x64 w8 s3 chunk=1 ranked 12" in line_with(done.stdout, "linear + GELU")


# ---------------------------------------------------------------- what it is asked for


@pytest.mark.parametrize(
    "arguments, value",
    [
        ("--explain-kernels", "here"),
        ("--explain-kernels rtx4070", "rtx4070"),
        ("--explain-kernels=h200", "h200"),
        ("--explain-kernels --seed 3", "here"),
        ("", None),
    ],
)
def test_the_flag_alone_means_the_gpu_that_is_here(arguments, value):
    assert parse(arguments.split(), "cpu").train.explain_kernels == value


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_a_sentence_says_what_to_do():
    with pytest.raises(UserError, match="there is no CUDA GPU here: name one, such as rtx4070"):
        train.main(["--explain-kernels"])


def test_a_card_that_gains_nothing_from_a_precision_is_explained_in_bf16(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(explain, "_compile_instead_of_interpreting", lambda: None)
    monkeypatch.setattr(explain.dry_run, "record", lambda config, *rest: asked.append(rest) or Record())
    assert train.main(["--precision", "fp16-fast", "--explain-kernels", "h200"]) == 0
    assert asked == [("bf16", 90, 132, 1), ("bf16", 90, 132, 2)]
    assert "NVIDIA H200 is no faster in fp16-fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            "--preset modern-124m --precision fp8 --explain-kernels rtx4070",
            "precision is 'fp8', which only GPT-2 has yet",
        ),
        ("--explain-kernels rtx9999", "explain_kernels is 'rtx9999', which is not in the table: nearest are"),
        ("--explain-kernels v100", "kernels are compiled for sm_80 and later"),
        ("--kernels eager --explain-kernels rtx4070", "kernels is 'eager'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as caught:
        train.main(arguments.split())
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_in_the_interpreter_a_sentence_says_what_to_unset(monkeypatch):
    from fastgpt.kernels import runtime

    monkeypatch.setattr(runtime, "INTERPRET", True)
    config = load_preset("demo", "cuda")
    config = replace(config, train=replace(config.train, explain_kernels="rtx4070"))
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        explain.explain(config, Console(quiet=True))
