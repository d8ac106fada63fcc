"""Logs as they come: four programs' formats, cut, coloured, wrapped, interleaved, restarted, huge, or no log at all."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.doctor.evidence import LogFacts
from fastgpt.doctor.reading import logs
from fastgpt.doctor.reading.encoding import decode
from fastgpt.doctor.reading.logs import MOST_NOTES, LogReader, in_order, read_log

REAL = Path(__file__).parents[3] / "docs" / "rtx4070-runs"
ITER = "iter {0}: loss 3.{0:04d}, time 3917.80ms, mfu 12.87%\n"


@pytest.fixture
def log(tmp_path):
    """Write a text (or bytes) as a log and read it."""

    def write(content: str | bytes) -> LogFacts:
        path = tmp_path / "a.log"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_log(path)

    return write


def steps(facts: LogFacts) -> list[int]:
    return facts.steps.step.tolist()


# --- the real logs ---


@pytest.mark.parametrize(
    ("name", "n_steps", "n_evals", "last", "median"),
    [("40m", 101, 41, 20000, 3911), ("124m", 56, 23, 11000, 9350)],
)
def test_a_real_log_is_read_whole(name, n_steps, n_evals, last, median):
    facts = read_log(REAL / f"nanogpt-{name}-fineweb.log")
    assert (facts.kind, len(facts.steps), len(facts.evals)) == ("nanogpt", n_steps, n_evals)
    assert facts.steps.step[-1] == facts.evals.step[-1] == last
    assert np.median(facts.steps.ms) == pytest.approx(median, abs=3)
    assert len(facts.all("checkpoint")) == n_evals - 1
    assert not facts.all("resume")


def test_every_number_of_a_real_log_is_where_it_says():
    path = REAL / "nanogpt-124m-fineweb.log"
    facts, lines = read_log(path), path.read_text(encoding="utf-8").split("\n")
    for step, loss, line in zip(facts.steps.step, facts.steps.loss, facts.steps.line):
        assert f"iter {step}: loss {loss:.4f}" in lines[line - 1]
    for step, train, val, line in zip(facts.evals.step, facts.evals.train, facts.evals.val, facts.evals.line):
        assert lines[line - 1] == f"step {step}: train loss {train:.4f}, val loss {val:.4f}"


def test_the_stray_33_before_iter_7800_hides_nothing():
    facts = read_log(REAL / "nanogpt-124m-fineweb.log")
    at = steps(facts).index(7800)
    assert (facts.steps.loss[at], facts.steps.line[at]) == (3.2876, 114)


def test_the_config_that_a_log_repeats_is_read_with_its_lines():
    config = read_log(REAL / "nanogpt-124m-fineweb.log").config
    assert (config.get("n_embd"), config.get("dropout")) == (768, 0.0)
    assert config.settings["n_embd"].place.line == 21
    assert config.comments[0].comment.startswith("Model (~125M parameters)")
    assert not config.unread


def test_the_notes_of_a_real_log():
    facts = read_log(REAL / "nanogpt-124m-fineweb.log")
    found = {note.kind: note.value for note in facts.notes if note.kind != "checkpoint"}
    assert found == {"tokens_per_step": 524288, "vocab": 50304, "parameters": 123590000, "no_decay": None}


def test_mfu_is_nan_until_nanogpt_has_measured_it():
    mfu = read_log(REAL / "nanogpt-40m-fineweb.log").steps.mfu
    assert math.isnan(mfu[0]) and mfu[1] == 12.87


# --- formats ---


def test_nanochat(log):
    facts = log(
        "GPU: NVIDIA H100 80GB HBM3 | Peak FLOPS (BF16): 9.89e+14\nVocab size: 65,536\nParameter counts:\n"
        "wte                     : 25,165,824\ntotal                   : 135,266,304\n"
        "Total batch size 524,288 => gradient accumulation steps: 1\n"
        "Step 00000 | Validation bpb: 3.301234\n"
        "step 00000/02520 (0.00%) | loss: 11.090355 | lrm: 1.00 | dt: 9412.08ms | tok/sec: 55,703 | bf16_mfu: 5.01"
        " | epoch: 1 | total time: 0.00m\n"
        "step 00001/02520 (0.04%) | loss: 11.010355 | grad norm: 0.71 | lrm: 1.00 | dt: 9412.08ms | tok/sec: 55,703"
        " | mfu: 5.02 | total time: 0.00m\n"
    )
    assert facts.kind == "nanochat"
    assert facts.steps.loss.tolist() == [11.090355, 11.010355]
    assert facts.steps.tokens_per_second[0] == 55703 and facts.steps.ms[0] == 9412.08 and facts.steps.mfu[1] == 5.02
    assert np.isnan(facts.steps.lr).all(), "lrm is a multiplier"
    found = {note.kind: note.value for note in facts.notes}
    assert found == {
        "device": "NVIDIA H100 80GB HBM3",
        "vocab": 65536,
        "parameters": 135266304,
        "tokens_per_step": 524288,
        "bits_per_byte": 3.301234,
    }


def test_llm_c(log):
    facts = log(
        "| device                | NVIDIA GeForce RTX 4070                            |\n"
        "| total batch size      | 524288                                             |\n"
        "| padded_vocab_size Vp  | 50304                                              |\n"
        "| num_parameters        | 124475904                                          |\n"
        "val loss 11.009360\n"
        "step    1/19560 | loss 11.009411 (+nanz)| norm 15.4103 (+nanz)| lr 8.57e-07 | 3056.36 ms | 42.6% bf16 MFU"
        " | 171535 tok/s\n"
        "step    2/19560 | loss 10.9 (+0.12z)| norm 2.1 (-0.3z)| lr 1.71e-06 | 3056.36 ms | -100.0% bf16 MFU | 171535 tok/s\n"
        "val loss 9.5\n"
    )
    assert facts.kind == "llm.c"
    assert steps(facts) == [1, 2] and facts.steps.lr[0] == 8.57e-07 and facts.steps.ms[0] == 3056.36
    assert facts.steps.mfu[0] == 42.6 and math.isnan(facts.steps.mfu[1])
    assert list(zip(facts.evals.step, facts.evals.val)) == [(0, 11.00936), (2, 9.5)]
    assert np.isnan(facts.evals.train).all()
    assert {note.kind: note.value for note in facts.notes} == {
        "device": "NVIDIA GeForce RTX 4070",
        "tokens_per_step": 524288,
        "vocab": 50304,
        "parameters": 124475904,
    }


def test_llm_cs_python_script_and_its_main_log(log):
    facts = log("step    1/19560 | train loss 10.98 | norm 15.3 | lr 8.57e-07 | (305.22 ms | 13421 tok/s)\n")
    assert (facts.kind, facts.steps.ms[0], facts.steps.tokens_per_second[0]) == ("llm.c", 305.22, 13421)
    facts = log("s:0 tel:11.0094\ns:0 trl:10.9851 lr:0.000001 norm:15.32\ns:1 trl:10.9 lr:0.000002 norm:9.11\n")
    assert (facts.kind, steps(facts), facts.evals.val.tolist()) == ("llm.c", [0, 1], [11.0094])


def test_fastgpts_lines_as_its_report_prints_them(log):
    from fastgpt.training.report import log_line

    line = dict(step=20, interval_loss=4.5, lr=6e-4, grad_norm=1.0, memory_gb=7.7, data_wait=0.001)
    facts = log(
        "fastgpt\nmodel   123.59M parameters (positions apart): 12 layers\nstep    524,288 tokens: micro-batches of 8 x 1024\n"
        "device  NVIDIA GeForce RTX 4070\nresumed at step 10\n"
        + log_line(line | {"step": 10, "ms": None, "tokens_per_second": None, "mfu": None})
        + "\n"
        + log_line(line | {"ms": 9350.0, "tokens_per_second": 56070.0, "mfu": 0.82})
        + "\nstep 20: val loss 4.4123 (best so far)\n"
    )
    assert (facts.kind, steps(facts)) == ("fastgpt", [10, 20])
    last = [facts.steps.ms[1], facts.steps.mfu[1], facts.steps.tokens_per_second[1], facts.steps.lr[1]]
    assert last == [9350.0, 82.0, 56070.0, 6e-4]
    assert math.isnan(facts.steps.ms[0])
    assert (facts.evals.step.tolist(), facts.evals.val.tolist()) == ([20], [4.4123])
    found = {note.kind: note.value for note in facts.notes}
    assert found == {
        "parameters": 123590000,
        "tokens_per_step": 524288,
        "device": "NVIDIA GeForce RTX 4070",
        "resume": 10,
    }


@pytest.mark.parametrize(
    "figures",
    [
        # As they were printed before 0.1.0, and since.
        "time n/a, mfu n/a, n/a tok/s, lr 6.00e-04, norm 1.907, data n/a, mem 0.46 GB",
        "time 2036.73ms, mfu n/a, 251 tok/s, lr 6.00e-04, norm 2.661, data 0.0%, mem 0.47 GB, eta 0:00:31",
        "time 2036.73ms, mfu 12.34%, 251 tok/s, lr 6.00e-04, norm 2.661, data 0.0%, mem 0.47 GB, 25 MHz 19 W 65 C",
        "lr 6.00e-04, norm 1.91",
        "time 2037ms, 251 tok/s, lr 6.00e-04, norm 2.66, eta 31 s",
        "time 2037ms, mfu 12.3%, 251 tok/s, lr 6.00e-04, norm 2.66, eta 60.1 h, data 7%",
    ],
)
def test_fastgpts_lines_of_every_time(log, figures):
    facts = log(f"iter 20: loss 4.5000, {figures}\n")
    assert (facts.kind, steps(facts), facts.steps.lr[0], facts.unread) == ("fastgpt", [20], 6e-4, [])
    assert np.isnan(facts.steps.mfu).all() == ("mfu 1" not in figures)
    assert f"norm {facts.steps.grad_norm[0]}" in figures
    if "time 2" in figures:
        assert round(facts.steps.ms[0]) == 2037 and facts.steps.tokens_per_second[0] == 251
    else:
        assert np.isnan(facts.steps.ms).all()


def test_metrics_jsonl(log):
    records = [
        {"run": "a", "config": {"model": {"n_layer": 2}, "data": {"grad_accum": 4}, "optim": {}, "train": {}}},
        {"step": 0, "val_loss": 10.9},
        {"step": 1, "loss": 10.8, "lr": 1e-4, "grad_norm": 2.0, "unheard_of": [1]},
        {
            "step": 2,
            "loss": 10.7,
            "ms": 12.5,
            "tokens_per_second": 5.0,
            "mfu": 0.5,
            "data_wait": None,
            "throttle": None,
        },
        {"event": "out_of_memory", "at_step": 2, "micro_batch": 4},
        {"step": 3, "loss": float("nan"), "val_loss": 10.1, "train_loss": 10.0},
    ]
    facts = log("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo')
    assert (facts.kind, steps(facts)) == ("fastgpt", [1, 2, 3])
    assert facts.steps.mfu[1] == 50.0 and facts.steps.ms[1] == 12.5 and math.isnan(facts.steps.ms[0])
    assert list(zip(facts.evals.step, facts.evals.val)) == [(0, 10.9), (3, 10.1)]
    assert facts.evals.train[1] == 10.0
    assert facts.config.get("n_layer") == 2 and facts.config.get("gradient_accumulation_steps") == 4
    assert [note.kind for note in facts.notes] == ["oom", "nan"]


@pytest.mark.parametrize("value", ["1e999", '"x"', "null", "[1]", "true", "9" * 400, "-5", "{}"])
@pytest.mark.parametrize("key", ["step", "loss", "val_loss", "mfu"])
def test_metrics_with_absurd_values_do_not_raise(key, value, log):
    record = {"step": "1", "loss": "2.0", "val_loss": "2.0", "mfu": "0.5"} | {key: value}
    facts = log("{" + ", ".join(f'"{k}": {v}' for k, v in record.items()) + "}\n")
    assert len(facts.steps) <= 1


@pytest.mark.parametrize(
    ("line", "kind", "value"),
    [
        ("number of parameters: 40.56M", "parameters", 40560000),
        ("tokens per iteration will be: 524,288", "tokens_per_step", 524288),
        ("found vocab_size = 65 (inside data/x/meta.pkl)", "vocab", 65),
        ("Overriding: batch_size = 8", "override", ("batch_size", 8)),
        ("Overriding: dataset = shakespeare", "override", ("dataset", "shakespeare")),
        ("W0811 10:20 utils.py:1250] [0/0] Not enough SMs to use max_autotune_gemm mode", "sm_gate", None),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.0 GiB", "oom", None),
        ("[CUDA ERROR] at file train_gpt2.cu:340: out of memory", "oom", None),
        ("step 7: loss 3.2, gradient norm inf: the step changed nothing", "nan", None),
        ("Resuming training from out-fineweb", "resume", None),
        ("Resuming optimization from step 500", "resume", 500),
        ("saving checkpoint to out-fineweb", "checkpoint", None),
        ("Traceback (most recent call last):", "traceback", None),
        ("AssertionError: Torch not compiled with CUDA enabled", "no_cuda", None),
        ("RuntimeError: Found no NVIDIA driver on your system.", "no_cuda", None),
        (
            "UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found 11040).",
            "no_cuda",
            None,
        ),
        ("error: this machine has an NVIDIA L4, but torch 2.13.0+cpu is built without CUDA: install", "no_cuda", None),
        ("RuntimeError: Failed to find C compiler. Please specify via CC environment variable.", "no_compiler", None),
        ("/tmp/tmpx/cuda_utils.c:3:10: fatal error: Python.h: No such file or directory", "no_compiler", None),
        ("error: kernels is 'triton' but Triton finds no Python.h to build its", "no_compiler", None),
        ("RuntimeError: Cannot find a working triton installation.", "no_triton", None),
        ("ModuleNotFoundError: No module named 'triton'", "no_triton", None),
        ("RuntimeError: Current CUDA Device does not support bfloat16.", "no_bf16", None),
    ],
)
def test_notes(line, kind, value, log):
    facts = log(f"hello\n{line}\n")
    assert [(note.kind, note.value, note.place.line, note.text) for note in facts.notes] == [(kind, value, 2, line)]
    assert len(facts.steps) == 0


def test_nan_losses_are_noted_and_kept(log):
    facts = log(ITER.format(1) + "iter 2: loss nan, time 1.00ms, mfu 1.00%\nstep 2: train loss nan, val loss nan\n")
    assert math.isnan(facts.steps.loss[1]) and math.isnan(facts.evals.val[0])
    assert [(note.kind, note.place.line) for note in facts.notes] == [("nan", 2)]


def test_overrides_in_a_log_reach_the_config_it_repeats(log):
    facts = log(
        "Overriding config with a.py:\nn_layer = 6\n# ~125M parameters\n\nOverriding: n_layer = 8\n"
        "tokens per iteration will be: 512\n"
    )
    assert facts.config.get("n_layer") == 8
    assert facts.config.settings["n_layer"].place.line == 5
    assert facts.config.comments[0].place.line == 3
    assert not facts.all("parameters"), "a claim in a comment is no count"


# --- as they come ---


def parse(text: str) -> LogFacts:
    reader = LogReader("plain")
    reader.take(text)
    return reader.facts()


@pytest.fixture(scope="module")
def real_text() -> str:
    return (REAL / "nanogpt-124m-fineweb.log").read_text(encoding="utf-8")


def same(facts: LogFacts, text: str, lines: bool = True) -> None:
    """``facts`` is what the plain log gives."""
    plain = parse(text)
    for mine, other in ((facts.steps, plain.steps), (facts.evals, plain.evals)):
        for name in ("step", "loss", "ms", "mfu", "train", "val") + (("line",) if lines else ()):
            if hasattr(mine, name):
                np.testing.assert_array_equal(getattr(mine, name), getattr(other, name), err_msg=name)
    assert [note.kind for note in facts.notes] == [note.kind for note in plain.notes]
    assert facts.config.get("n_embd") == 768


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_encoding_and_line_end(encoding, end, log, real_text):
    same(log(real_text.replace("\n", end).encode(encoding)), real_text)


def test_ansi_colours(log, real_text):
    coloured = "\n".join(f"\x1b[2K\x1b[32;1m{line[:6]}\x1b[0m{line[6:]}" for line in real_text.split("\n"))
    same(log(coloured), real_text)


def test_progress_bars(log, real_text):
    bars = "\n".join(f"\r 10%|#    | 1/10 loss=3\r 20%|##   | 2/10\r{line}" for line in real_text.split("\n"))
    same(log(bars), real_text)


def test_prefixes_of_ranks_and_clocks(log):
    facts = log("".join(f"[rank0]: 2025-08-11 10:20:{i:02d} " + ITER.format(i) for i in range(20)))
    assert steps(facts) == list(range(20))


def test_two_lines_glued_together(log):
    facts = log(
        (ITER.format(1) + ITER.format(2)).replace("\n", "") + "\nstep 2: train loss 3.1234, val loss 3.2345step 3"
    )
    assert steps(facts) == [1, 2]
    assert facts.evals.val.tolist() == [3.2345]


def test_interleaved_ranks_give_each_step_once(log):
    lines = [ITER.format(i) for i in range(100)]
    rng = random.Random(0)
    both = sorted([(i, line) for i, line in enumerate(lines)] * 4, key=lambda pair: pair[0] + rng.random() * 1.8)
    facts = log("".join(line for _, line in both))
    assert steps(facts) == list(range(100))
    assert not facts.all("resume")


@pytest.mark.parametrize("cut", range(1, 47))
def test_a_wrapped_step_is_put_together(cut, log):
    line = "iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%"
    head, tail = line[:cut], line[cut:]
    facts = log(f"{ITER.format(100)}{head.rstrip()}\n{tail.strip()}\n{ITER.format(300)}")
    if cut < len("iter 2"):  # nothing shows that the first half begins a step
        assert {100, 300} <= set(steps(facts))
    elif cut >= len("iter 200:"):
        assert steps(facts) == [100, 200, 300]
        assert [facts.steps.loss[1], facts.steps.ms[1], facts.steps.mfu[1]] == [6.2977, 3917.80, 12.87]
        assert facts.steps.line[1] == 2


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_terminal_that_wraps_long_lines(width, log):
    line = (
        "step 00100/02520 (0.04%) | loss: 4.010355 | lrm: 1.00 | dt: 9412.08ms | tok/sec: 55,703 | bf16_mfu: 5.02"
        " | epoch: 1 | total time: 12.00m | eta: 100.0m\n"
    )
    text = "".join(line.replace("00100", f"{i:05d}") for i in range(100, 120))
    wrapped = "".join(row[i : i + width] + "\n" for row in text.splitlines() for i in range(0, len(row), width))
    facts = log(wrapped)
    assert steps(facts) == list(range(100, 120))
    assert set(facts.steps.tokens_per_second) == {55703.0} and set(facts.steps.ms) == {9412.08}


def test_a_wrapped_evaluation(log):
    for head, tail in (
        ("step 500: train loss 5.4383, val", "loss 5.5055"),
        ("step 500: train loss 5.4383, val loss 5.5", "055"),
    ):
        facts = log(f"{head}\n{tail}\n")
        assert (facts.evals.step.tolist(), facts.evals.val.tolist()) == ([500], [5.5055])


@pytest.mark.parametrize("cut", range(0, 140))
def test_a_truncated_log_holds_nothing_that_the_whole_does_not(cut, log):
    text = ITER.format(1) + "step 2: train loss 5.4383, val loss 5.5055\n" + ITER.format(2)
    facts = log(text[:cut])
    assert set(zip(facts.steps.step, facts.steps.loss)) <= {(1, 3.0001), (2, 3.0002)}
    assert set(zip(facts.evals.step, facts.evals.val)) <= {(2, 5.5055)}
    assert set(facts.steps.ms[np.isfinite(facts.steps.ms)]) <= {3917.80}


def test_a_large_log_is_read_with_a_bar_on_a_terminal(log, capsys, monkeypatch):
    small = log(ITER.format(1))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(logs, "LARGE", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert steps(log(ITER.format(1))) == steps(small)
    out, err = capsys.readouterr()
    assert not out and "reading" in err


@pytest.mark.parametrize("thinned", [False, True])
def test_damaged_lines_of_our_own_metrics_are_counted(tmp_path, monkeypatch, thinned):
    monkeypatch.setattr(logs, "BLOCK", 4096)
    monkeypatch.setattr(logs, "MOST_STEPS", 100 if thinned else 1 << 17)
    lines = ['{"run": "a", "config": {}}', *(f'{{"step": {i}, "loss": 3.5}}' for i in range(1, 1200))]
    lines += ['{"event": "spike", "at_step": 5}', '{"step": 1200, "val_loss": 3.1}', '{"step": 1201, "lo']
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert not read_log(path).unread
    lines[317], lines[700] = lines[317][:13], "\0" * 40
    path.write_text("\n".join(lines))
    (unread,) = read_log(path).unread
    assert unread.why == "3 of 1,203 lines of metrics.jsonl could not be read, the first is line 318"
    assert unread.place.line == 318


def test_a_log_that_ends_in_the_middle_of_a_line_says_so(log):
    facts = log(ITER.format(1) + "iter 2: loss 3.12")
    assert [(unread.place.line, unread.text) for unread in facts.unread] == [(2, "iter 2: loss 3.12")]
    assert not log(ITER.format(1) + ITER.format(2)).unread
    assert not log(ITER.format(1).rstrip()).unread


def test_a_half_line_before_a_crash_does_not_hide_the_crash(log):
    facts = log(
        "iter 5: loss 3.1234, time 39\nTraceback (most recent call last):\n  x\ntorch.OutOfMemoryError: CUDA out of memory.\n"
    )
    assert steps(facts) == []
    assert [note.kind for note in facts.notes] == ["traceback", "oom"]
    assert facts.notes[1].text.startswith("torch.OutOfMemoryError")


def test_of_a_restarted_run_the_later_part_counts(log):
    first = [ITER.format(i) for i in range(0, 1000, 10)]
    later = [f"iter {i}: loss 2.5000, time 10.00ms, mfu 9.00%\n" for i in range(500, 800, 10)]
    facts = log("".join(first) + "Resuming training from out\n" + "".join(later))
    assert steps(facts) == list(range(0, 800, 10))
    assert set(facts.steps.loss[50:]) == {2.5}
    assert [note.text for note in facts.all("resume")] == [
        "Resuming training from out",
        "the log goes back from step 990 to 500: the later run counts",
    ]


def test_a_second_experiment_in_one_log_replaces_the_first(log):
    facts = log(
        "".join(ITER.format(i) for i in range(0, 1000, 10)) + "".join(ITER.format(i) for i in range(0, 300, 10))
    )
    assert steps(facts) == list(range(0, 300, 10))
    assert len(facts.all("resume")) == 1


def test_one_garbled_step_number_does_not_undo_the_run(log):
    facts = log(
        "".join(ITER.format(i) for i in range(100, 150))
        + ITER.format(7)
        + "".join(ITER.format(i) for i in range(150, 200))
    )
    assert steps(facts) == list(range(100, 200))
    assert not facts.all("resume")


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\0" * 5000, bytes(range(256)) * 50, b"hello\nworld", "Ω≈ç√".encode("utf-16")]
)
def test_what_is_no_log_says_nothing(content, log):
    facts = log(content)
    assert (facts.kind, len(facts.steps), len(facts.evals), facts.notes) == ("unknown", 0, 0, [])


# --- size ---


def test_a_line_of_many_megabytes(log):
    facts = log(b"x" * 3_000_000 + b" " + ITER.format(1).encode() + ITER.format(2).encode())
    assert steps(facts) == [1, 2]


@given(st.lists(st.integers(0, 60), max_size=80))
@settings(max_examples=200, deadline=None, database=None)
def test_in_order_gives_rising_steps_that_were_in_the_log(numbers):
    rows, _ = in_order(np.array(numbers, float).reshape(-1, 1))
    kept = rows[:, 0].tolist()
    assert kept == sorted(set(kept))
    assert set(kept) <= set(numbers)
    assert bool(kept) == bool(numbers)


def test_every_step_of_a_long_log_is_kept(log):
    evaluation = "step {}: train loss 3.1234, val loss 3.2345\n"
    facts = log("".join(ITER.format(i) + evaluation.format(i) * (i % 1000 == 999) for i in range(100_000)))
    assert len(facts.evals) == 100
    np.testing.assert_array_equal(facts.steps.step, np.arange(100_000))
    np.testing.assert_array_equal(facts.steps.line, 1 + np.arange(100_000) + np.arange(100_000) // 1000)


def test_blocks_make_no_difference(log, real_text, monkeypatch):
    monkeypatch.setattr(logs, "BLOCK", 3000)
    same(log(real_text), real_text)


def test_of_very_many_steps_some_are_kept_and_nothing_else_is_lost(log, monkeypatch):
    monkeypatch.setattr(logs, "BLOCK", 20_000)
    monkeypatch.setattr(logs, "MOST_STEPS", 1000)
    evaluation = "step {}: train loss 3.1234, val loss 3.2345\n"
    lines = [ITER.format(i) + evaluation.format(i) * (i % 1000 == 999) for i in range(20_000)]
    lines[15_555] = "iter 15555: loss nan, time 1.00ms, mfu 1.00%\n"
    lines[17_777] += "torch.OutOfMemoryError: CUDA out of memory.\n"
    facts = log("".join(lines))
    assert len(facts.evals) == 20 and 500 <= len(facts.steps) <= 1500
    assert facts.steps.step[-1] == 19_999 and np.diff(facts.steps.step).max() <= 64
    kept = facts.steps.step
    np.testing.assert_array_equal(facts.steps.line, 1 + kept + kept // 1000 + (kept > 17_777))
    assert [(note.kind, note.place.line) for note in facts.notes] == [("nan", 15_571), ("oom", 17_796)]


def test_notes_of_one_kind_are_bounded(log):
    facts = log("".join(f"iter {i}: loss nan, time 1.00ms, mfu 1.00%\n" for i in range(MOST_NOTES + 500)))
    assert len(facts.all("nan")) == MOST_NOTES
    assert facts.notes[-1].place.line == MOST_NOTES + 500


def test_a_large_log_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "BLOCK", 1 << 18)
    monkeypatch.setattr(logs, "MOST_STEPS", 1 << 12)
    path = tmp_path / "large.log"
    with open(path, "w") as file:
        file.writelines(ITER.format(i) for i in range(400_000))
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    read_log(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


# --- nothing raises ---

QUIET = settings(max_examples=120, deadline=None, database=None)


def take(content: bytes) -> LogFacts:
    return parse(decode(content))


@QUIET
@given(st.binary(max_size=2000))
def test_any_bytes_are_a_log_of_something_or_nothing(content):
    facts = take(content)
    assert len(facts.steps) == len(facts.steps.loss)


words = st.sampled_from(
    [
        *(
            b"iter ",
            b"step ",
            b"12",
            b": ",
            b"loss ",
            b"3.1",
            b", time ",
            b"ms, mfu ",
            b"%",
            b"\n",
            b"\r",
            b"nan",
            b"\x1b[",
        ),
        *(
            b"train loss ",
            b", val loss ",
            b"3.1234",
            b"/100 ",
            b"| ",
            b"{",
            b'"step": 1',
            b'"loss": 2',
            b"}",
            b"s:1 trl:",
        ),
        *(b"Traceback (most recent call last)", b"Overriding config with x:", b"Overriding: a = ", b"Error: "),
        *(b"number of parameters: 1.1.1M", b"999999999999", b"Step 1 | Validation bpb: 1.12345"),
        *(
            b"step:1/9 ",
            b"train_time:1ms step_avg:",
            b"Epoch 1 | iter 2 step 3 | ",
            b"loss train: 3.1",
            b"3 train 1.2345",
        ),
        *(b'{"log":"', b'\\n","stream":"stdout","time":""}', b"3,1234", b" | lr 1e-4 | ", b"KeyError: 1", b"dt: 1.5ms"),
    ]
)


@QUIET
@given(st.lists(words, max_size=60).map(b"".join))
def test_fragments_of_logs_in_any_order(content):
    facts = take(content)
    assert (np.diff(facts.steps.step) > 0).all() and (np.diff(facts.evals.step) > 0).all()


@QUIET
@given(st.integers(0, 10**9))
def test_a_mutated_real_log_never_raises_and_stays_in_order(seed):
    rng = random.Random(seed)
    content = bytearray((REAL / "nanogpt-124m-fineweb.log").read_bytes())
    for _ in range(rng.randint(1, 60)):
        at = rng.randrange(len(content))
        content[at : at + rng.randint(0, 40)] = rng.choice(
            [b"", b"\n", b"\r", bytes([rng.randrange(256)]), b"iter 5", content[:at][-80:]]
        )
    facts = take(bytes(content))
    assert (np.diff(facts.steps.step) > 0).all() and (np.diff(facts.evals.step) > 0).all()
    assert (facts.steps.line >= 1).all() and (facts.steps.line <= content.count(b"\n") + 1).all()
