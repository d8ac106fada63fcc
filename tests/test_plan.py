"""Geometry that fits and is exact, what it costs, how it is printed, and what is refused."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import types
from dataclasses import replace

import pytest

from fastgpt import common
from fastgpt import plan as plan_command
from fastgpt.common import UserError
from fastgpt.config import Config, ModelConfig, load_preset, load_toml
from fastgpt.hardware import cards
from fastgpt.performance import projection, recipes
from fastgpt.performance.fitting import (
    CUDA_CONTEXT,
    DESKTOP,
    MARGIN,
    check_fits,
    fit_batch,
    free_bytes,
    plan,
    usable_vram,
)
from fastgpt.performance.memory import KERNELS, memory
from fastgpt.plan import main

RTX4070, H100 = cards.lookup("rtx4070"), cards.lookup("h100")
M124 = load_preset("gpt2-124m").model
HALF_MILLION = 524288
FREE = int(usable_vram(RTX4070) / (1 - MARGIN)) + 1
"""Free bytes of which as much can be planned with as on an RTX 4070."""
PROJECT = projection.project
LARGE = ModelConfig(48, 25, 1600, 1024, 50304)  # GPT-2 XL


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    """Stands in for projection.project: 50,000 tokens/s, a fifth either way. Returns the arguments of its calls."""
    calls = []

    def project(shape, gpu, **options):
        calls.append({"shape": shape, "gpu": gpu} | options)
        return types.SimpleNamespace(
            tokens_per_second=50_000.0,
            tokens_per_second_low=40_000.0,
            tokens_per_second_high=60_000.0,
            calibrated=False,
            calibration_error=0.03,
        )

    monkeypatch.setattr(projection, "project", project)
    return calls


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("gpu", ["rtx4070", "rtx3060ti", "rtx4090", "h100"])
@pytest.mark.parametrize("sequences", [1, 2, 12, 60, 97, 480, 509, 512])
def test_geometry_is_exact_fits_and_is_the_largest_that_does(gpu, kernels, sequences):
    card = cards.lookup(gpu)
    found = plan(M124, card, tokens_per_step=sequences * 1024, kernels=kernels)
    assert found.micro_batch * found.grad_accum * 1024 == found.tokens_per_step == sequences * 1024
    assert found.memory.total <= found.usable == usable_vram(card)
    for larger in range(found.micro_batch + 1, sequences + 1):
        if sequences % larger == 0:
            assert memory(M124, micro_batch=larger, kernels=kernels).total > found.usable


def test_the_users_run_gets_the_geometry_that_ran():
    found = plan(M124, RTX4070, tokens_per_step=HALF_MILLION, kernels="nanogpt-compile")
    assert (found.micro_batch, found.grad_accum) == (8, 64)


def test_world_size_shares_the_step():
    found = plan(M124, RTX4070, tokens_per_step=HALF_MILLION, world_size=4)
    assert found.micro_batch * found.grad_accum * 1024 * 4 == HALF_MILLION == found.tokens_per_step


@pytest.mark.parametrize(
    ("tokens_per_step", "world_size", "message"),
    [
        (
            500_000,
            1,
            "tokens_per_step is 500,000: block_size 1024 needs a multiple of 1,024; the nearest: 499,712 or 500,736",
        ),
        (1000, 1, "tokens_per_step is 1,000: block_size 1024 needs a multiple of 1,024; the nearest: 1,024"),
        (0, 1, "tokens_per_step is 0: block_size 1024 needs a multiple of 1,024; the nearest: 1,024"),
        (
            9 * 1024,
            2,
            "tokens_per_step is 9,216: block_size 1024 x 2 GPUs needs a multiple of 2,048; the nearest: 8,192 or 10,240",
        ),
        (HALF_MILLION, 0, "world_size is 0: it must be at least 1"),
    ],
)
def test_tokens_that_cannot_be_met_exactly_name_the_nearest(tokens_per_step, world_size, message):
    with pytest.raises(UserError) as error:
        plan(M124, RTX4070, tokens_per_step=tokens_per_step, world_size=world_size)
    assert str(error.value) == message


def test_a_prime_number_of_sequences_is_met_and_better_tokens_are_named():
    found = plan(M124, RTX4070, tokens_per_step=509 * 1024)
    assert (found.micro_batch, found.grad_accum) == (1, 509)
    tokens = int(found.hint.split("; ")[1].split()[0].replace(",", ""))
    assert plan(M124, RTX4070, tokens_per_step=tokens).micro_batch >= 2
    assert abs(tokens / (509 * 1024) - 1) < 0.01
    assert plan(M124, RTX4070, tokens_per_step=HALF_MILLION).hint is None


def test_nothing_fits_names_everything_that_would():
    model = replace(LARGE, n_layer=20, n_embd=1024, n_head=16, block_size=8192)
    with pytest.raises(UserError) as error:
        plan(model, RTX4070, tokens_per_step=8192, kernels="eager")
    text = str(error.value)
    assert text.startswith("micro_batch is 1 and does not fit: one sequence of 8192 tokens through 30")
    assert "NVIDIA GeForce RTX 4070 has 11.4 GB usable" in text
    block_size = int(text.split("--block-size ")[1].split()[0])
    assert plan(replace(model, block_size=block_size), RTX4070, tokens_per_step=block_size, kernels="eager")
    vram_gb = int(text.split("a card with ")[1].split()[0])
    assert plan(model, None, tokens_per_step=8192, kernels="eager", vram_gb=vram_gb)
    assert "\n" not in text


def test_kernels_that_would_fit_are_named():
    with pytest.raises(UserError, match=r"--kernels triton needs \d+\.\d GB"):
        plan(M124, RTX4070, tokens_per_step=1024, kernels="eager", vram_gb=3.9)


def test_a_state_that_no_sequence_length_helps_says_which_card():
    with pytest.raises(UserError, match=r"a card with \d+ GB fits it$") as error:
        plan(LARGE, RTX4070, tokens_per_step=1024)
    assert "--block-size" not in str(error.value)


# ---------------------------------------------------------------- memory that is there


def test_usable_vram_is_the_card_less_context_desktop_and_margin():
    total = 12 * 2**30
    assert usable_vram(RTX4070) == total - CUDA_CONTEXT - DESKTOP - round(MARGIN * total)
    assert usable_vram(RTX4070, vram_gb=12) == usable_vram(RTX4070)
    assert usable_vram(H100) == 80 * 2**30 - CUDA_CONTEXT - round(MARGIN * 80 * 2**30)  # no desktop
    assert usable_vram(None, vram_gb=12) == usable_vram(RTX4070)


@pytest.mark.parametrize(
    ("gpu", "vram_gb", "message"),
    [
        (None, None, "vram is not known for this card"),
        (RTX4070, 0, "vram is 0: give the GB on the box"),
        (RTX4070, -3, "vram is -3"),
        (RTX4070, float("nan"), "vram is nan"),
        (RTX4070, float("inf"), "vram is inf"),
    ],
)
def test_vram_that_makes_no_sense_is_refused(gpu, vram_gb, message):
    with pytest.raises(UserError, match=message):
        usable_vram(gpu, vram_gb)


def test_less_vram_gives_a_smaller_micro_batch():
    batches = [plan(M124, RTX4070, tokens_per_step=HALF_MILLION, vram_gb=gb).micro_batch for gb in (6, 8, 12, 24)]
    assert batches == sorted(set(batches))


# ---------------------------------------------------------------- what it costs


def test_the_default_budget_is_chinchillas():
    found = plan(M124, RTX4070, tokens_per_step=HALF_MILLION)
    assert found.tokens == 20 * 123_587_328
    assert (found.steps - 1) * HALF_MILLION < found.tokens <= found.steps * HALF_MILLION


def test_hours_and_energy_follow_from_the_projection(speed):
    found = plan(M124, RTX4070, tokens_per_step=HALF_MILLION, tokens=HALF_MILLION * 1000)
    assert found.hours == pytest.approx(HALF_MILLION * 1000 / 50_000 / 3600)
    assert found.hours_low < found.hours < found.hours_high
    assert found.kwh == pytest.approx(found.hours * 0.200)  # the board's 200 W
    asked = speed[-1]
    assert (asked["micro_batch"], asked["tokens_per_step"]) == (found.micro_batch, HALF_MILLION)
    assert (asked["kernels"], asked["precision"], asked["gpu"]) == ("triton", "bf16", RTX4070)


def test_four_gpus_take_a_quarter_of_the_time_and_the_same_energy(speed):
    one, four = (plan(M124, RTX4070, tokens_per_step=HALF_MILLION, world_size=n) for n in (1, 4))
    assert four.hours == pytest.approx(one.hours / 4)
    assert four.kwh == pytest.approx(one.kwh)
    assert speed[-1]["tokens_per_step"] == HALF_MILLION // 4


def test_the_real_projection_answers_for_every_kind_of_kernels(monkeypatch):
    monkeypatch.setattr(projection, "project", PROJECT)
    for kernels in KERNELS:
        found = plan(M124, RTX4070, tokens_per_step=HALF_MILLION, kernels=kernels)
        assert 0 < found.tokens_per_second_low < found.tokens_per_second < found.tokens_per_second_high
    assert plan(M124, RTX4070, tokens_per_step=HALF_MILLION, precision="fp32").micro_batch > 1  # speed: known or not


@pytest.fixture
def no_speed(monkeypatch):
    """A projection that has no figures for the card."""

    def project(*_, **__):
        raise UserError("no figures for this card")

    monkeypatch.setattr(projection, "project", project)


def test_a_gpu_that_the_projection_does_not_know_has_no_speed(no_speed):
    found = plan(M124, RTX4070, tokens_per_step=HALF_MILLION)
    assert found.tokens_per_second is found.hours is found.kwh is None
    assert found.micro_batch > 1, "the geometry does not depend on the projection"
    assert plan(M124, None, tokens_per_step=HALF_MILLION, vram_gb=12).hours is None


def test_a_budget_of_no_tokens_is_refused():
    with pytest.raises(UserError, match="tokens is 0: it must be at least 1"):
        plan(M124, RTX4070, tokens_per_step=HALF_MILLION, tokens=0)


# ---------------------------------------------------------------- train.py's part


def configured(batch_size: int, grad_accum: int, **train) -> Config:
    config = load_preset("gpt2-124m", "cuda")
    data = replace(config.data, batch_size=batch_size, grad_accum=grad_accum)
    return replace(config, data=data, train=replace(config.train, **train))


@pytest.mark.parametrize(
    "train", [{}, {"kernels": "eager"}, {"kernels": "eager", "compile": True}, {"precision": "fp32"}]
)
def test_fit_batch_keeps_the_tokens_per_step(train):
    config = configured(8, 64, **train)
    micro_batch, grad_accum = fit_batch(config, FREE)
    assert micro_batch * grad_accum * 1024 == config.tokens_per_step
    check_fits(configured(micro_batch, grad_accum, **train), FREE)


def test_fit_batch_knows_what_the_configuration_runs_on():
    def batch(**train):
        return fit_batch(configured(8, 64, **train), FREE)[0]

    assert batch() == plan(M124, RTX4070, tokens_per_step=HALF_MILLION).micro_batch
    assert batch(kernels="eager") == plan(M124, RTX4070, tokens_per_step=HALF_MILLION, kernels="eager").micro_batch
    assert batch(kernels="eager", compile=True) > batch(kernels="eager")
    assert batch(precision="fp32") < batch()


def test_fit_batch_takes_free_bytes_and_ranks():
    config = configured(8, 64)
    micro_batch, grad_accum = fit_batch(config, int(12e9), 2)
    assert grad_accum % 2 == 0 and micro_batch * grad_accum * 1024 == config.tokens_per_step
    needed = memory(M124, micro_batch=micro_batch, kernels="triton", world_size=2).total
    assert needed <= 0.95 * 12e9
    with pytest.raises(UserError, match=r"this machine has 0\.9 GB usable"):
        fit_batch(config, int(1e9))


def test_on_a_cpu_auto_precision_is_fp32():
    config = configured(8, 64, kernels="eager")
    assert fit_batch(config, int(12e9), device="cpu")[0] < fit_batch(config, int(14e9))[0]


@pytest.mark.parametrize("free", [FREE, int(11e9)])
def test_an_impossible_geometry_is_refused_with_one_that_fits(free):
    config = configured(64, 8)
    with pytest.raises(UserError, match=r"^batch_size is 64: it needs about 2\d\.\d GB \(triton, bf16\)") as error:
        check_fits(config, free)
    words = str(error.value).split()
    micro_batch, grad_accum = (int(words[words.index(flag) + 1]) for flag in ("--batch-size", "--grad-accum"))
    assert micro_batch * grad_accum == 512
    check_fits(configured(micro_batch, grad_accum), free)


def test_a_geometry_within_the_models_error_is_let_through():
    needed = memory(M124, micro_batch=8, kernels="triton").allocated
    check_fits(configured(8, 64), int(needed * 0.96))
    with pytest.raises(UserError, match="batch_size is 8"):
        check_fits(configured(8, 64), int(needed * 0.94))


def test_free_bytes_on_a_cpu_are_the_computers():
    import psutil

    assert 0 < free_bytes("cpu") <= psutil.virtual_memory().total + psutil.swap_memory().total


# ---------------------------------------------------------------- command line


def run(capsys, *args: str) -> str:
    assert main(list(args)) == 0
    return capsys.readouterr().out


def test_json_holds_the_plan_and_every_one_compared(capsys):
    found = json.loads(run(capsys, "--gpu", "rtx4070", "--tokens-per-step", "524288", "--json"))
    assert found["micro_batch"] * found["grad_accum"] * 1024 == found["tokens_per_step"] == HALF_MILLION
    assert found["kernels"] == "triton" and list(found["plans"]) == list(KERNELS)
    assert found["vram_gb"] == pytest.approx((sum(found["memory_bytes"].values()) + CUDA_CONTEXT) / 1e9)
    assert found["tokens_per_second"] == 50_000
    assert found["calibrated"] is False and found["calibration_error"] == 0.03
    assert found["hours"] == pytest.approx(found["steps"] * HALF_MILLION / 50_000 / 3600)
    assert found["kwh"] == pytest.approx(found["hours"] * 0.2)


def test_json_for_one_kind_of_kernels(capsys):
    found = json.loads(run(capsys, "--gpu", "rtx4070", "--kernels", "eager", "--json"))
    assert found["kernels"] == "eager" and list(found["plans"]) == ["eager"]


def test_the_table_compares_all_and_says_what_its_figures_are(capsys):
    out = run(capsys, "--gpu", "rtx4070", "--model", "gpt2-124m", "--tokens-per-step", "524288", "--tokens", "2.5B")
    for word in (*KERNELS, "micro-batch x accumulation", "8 x 64", "activations", "logits and loss", "fragmentation"):
        assert word in out
    assert all(rate in out for rate in ("50,000", "40,000", "60,000"))
    assert "projections, not measurements" in out
    assert "upper bound, the board's limit of 200 W" in out
    assert "Budget: 2.5B tokens, 20.2 per parameter" in out
    assert "desktop 0.42" in out
    assert re.search(r"calibrated on real runs *│ *no *│", out)


@pytest.mark.parametrize(("model", "compared"), [("gpt2-124m", 1), ("gpt2-40m", 0), ("modern-124m", 0)])
def test_the_owner_of_a_gpt2_hears_of_the_other_recipe(capsys, model, compared):
    out = run(capsys, "--gpu", "rtx4070", "--model", model, "--kernels", "triton")
    assert out.count("with --preset modern-124m (projected") == compared


def test_a_modern_preset_is_planned_for_its_own_steps_and_another_shape_is_not(capsys):
    common = "--gpu", "rtx4070", "--model", "modern-124m", "--kernels", "triton", "--json"
    preset = load_preset("modern-124m", "cuda")
    found = json.loads(run(capsys, *common))
    assert (found["steps"], found["tokens_per_step"]) == (preset.train.max_iters, preset.tokens_per_step)
    assert 1e9 * 0.9 < found["tokens"] < recipes.MODERN.tokens[1] * 1.05
    assert json.loads(run(capsys, *common, "--tokens-per-step", "1048576"))["steps"] == preset.train.max_iters / 2
    assert json.loads(run(capsys, *common, "--n-layer", "10"))["steps"] > 2 * preset.train.max_iters


def test_the_table_says_na_where_speed_is_unknown(capsys, no_speed):
    out = run(capsys, "--gpu", "rtx4070")
    assert "n/a" in out and "there is no projection" in out and "at worst" not in out


def test_kernels_that_do_not_fit_are_said_beside_those_that_do(capsys):
    out = run(capsys, "--gpu", "rtx4070", "--vram", "3.9", "--tokens-per-step", "8192")
    assert "eager: micro_batch is 1 and does not fit" in out
    assert "triton" in out


def nanogpt_config(text: str) -> dict:
    """Its assignments, read as literals."""
    tree = ast.parse(text)
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body}


@pytest.mark.parametrize("world_size", [1, 2])
def test_nanogpt_lines_are_a_nanogpt_config(world_size):
    model = replace(M124, bias=True, dropout=0.1)
    found = plan(model, RTX4070, tokens_per_step=HALF_MILLION, kernels="nanogpt-compile", world_size=world_size)
    config = nanogpt_config(plan_command.nanogpt_lines(found))
    # nanoGPT divides the accumulation by the number of GPUs.
    assert config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"] == HALF_MILLION
    assert config["gradient_accumulation_steps"] == found.grad_accum * world_size
    assert {key: config[key] for key in ("n_layer", "n_head", "n_embd", "bias", "dropout")} == {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True, "dropout": 0.1,
    }  # fmt: skip
    assert config["max_iters"] == config["lr_decay_iters"] == found.steps
    assert (config["dtype"], config["compile"]) == ("bfloat16", True)


@pytest.mark.parametrize("kernels", ["eager", "compile", "triton"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_preset_loads_and_is_the_plan(kernels, world_size, tmp_path):
    base = load_preset("gpt2-124m", "cuda")
    model = replace(M124, bias=True)
    found = plan(model, RTX4070, tokens_per_step=HALF_MILLION, kernels=kernels, world_size=world_size)
    path = tmp_path / "planned.toml"
    path.write_text(plan_command.preset(found, base))
    config = load_toml(path, Config(), "cuda")
    assert config.model == found.model
    assert (config.data.batch_size, config.data.grad_accum) == (found.micro_batch, found.grad_accum * world_size)
    assert config.tokens_per_step == HALF_MILLION
    assert (config.train.kernels, config.train.compile) == (
        "triton" if kernels == "triton" else "eager",
        kernels == "compile",
    )
    assert (config.train.precision, config.train.max_iters, config.optim.lr) == ("bf16", found.steps, base.optim.lr)


def test_both_blocks_are_printed_ready_to_paste(capsys, tmp_path):
    out = run(capsys, "--gpu", "rtx4070")
    nanogpt = out.split("nanoGPT config\n")[1].split("fastgpt preset")[0]
    assert nanogpt_config(nanogpt)["batch_size"] == 8
    path = tmp_path / "pasted.toml"
    path.write_text(out.split("--data FOLDER)\n")[1])
    assert load_toml(path, Config(), "cuda").tokens_per_step == HALF_MILLION


def test_model_from_a_file_and_from_flags(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[model]\nn_layer = 3\nblock_size = 512\n[data]\nbatch_size = 4\ngrad_accum = 5\n")
    out = run(capsys, "--gpu", "rtx4070", "--model", str(path), "--n-embd", "384", "--n-head", "6", "--bias", "True")
    assert "layers 3, heads 6, width 384, context 512, vocabulary 50304; 10,240 tokens per step" in out
    assert "bias = true" in out


def test_an_experimental_precision_is_tritons_alone_and_said(capsys):
    on_4070, on_h100 = (run(capsys, "--gpu", gpu, "--precision", "fp16-fast") for gpu in ("rtx4070", "h100"))
    assert on_4070.count("precision is 'fp16-fast', which only --kernels triton has") == len(KERNELS) - 1
    assert "fp16-fast is experimental" in on_4070 and 'precision = "fp16-fast"' in on_4070
    assert "is no faster in it: a run would use bf16" in on_h100 and "is no faster in it" not in on_4070
    in_fp8 = {gpu: run(capsys, "--gpu", gpu, "--precision", "fp8") for gpu in ("h100", "a100")}
    assert "fp8 is experimental" in in_fp8["h100"] and "is no faster in it" not in in_fp8["h100"]
    assert "is no faster in it: a run would use bf16" in in_fp8["a100"]


def test_a_card_that_is_not_in_the_table_needs_its_vram(capsys):
    out = run(capsys, "--gpu", "RTX 7090", "--vram", "64")
    assert "a card with 64 GB" in out and "n/a" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "rtx4071"], "gpu is 'rtx4071', which is not in the table: nearest are .*4070.*, or give --vram"),
        (["--gpu", "rtx4070", "--model", "gpt2-124"], "preset is 'gpt2-124' .did you mean 'gpt2-124m'"),
        (
            ["--gpu", "rtx4070", "--model", "mine.yaml"],
            "model 'mine.yaml' is not TOML, as a config has to be: give a preset",
        ),
        (["--gpu", "rtx4070", "--model", "absent.toml"], "config file absent.toml cannot be read"),
        (["--gpu", "rtx4070", "--n-head", "7"], "n_embd is 768, which n_head 7 does not divide"),
        (
            ["--gpu", "rtx4070", "--tokens-per-step", "half a million"],
            "--tokens-per-step is 'half a million': it must be a whole number",
        ),
        (["--gpu", "rtx4070", "--tokens-per-step", "0"], "tokens_per_step is 0: block_size 1024 needs"),
        (["--gpu", "rtx4070", "--tokens-per-step", "1e18"], r"tokens_per_step is 10+: it must lie in \[0, 1e12\]"),
        (["--gpu", "rtx4070", "--tokens", "-3B"], "tokens is -3000000000: it must be at least 1"),
        (["--gpu", "rtx4070", "--tokens-per-step", "500000"], "the nearest: 499,712 or 500,736"),
        (["--gpu", "rtx4070", "--vram", "1"], "does not fit"),
        (["--gpu", "rtx4070", "--world-size", "0"], "world_size is 0"),
    ],
)
def test_bad_input_is_one_sentence(args, message):
    with pytest.raises(UserError, match=message) as error:
        main(args)
    assert "\n" not in str(error.value)


def test_no_gpu_and_none_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="gpu is not given and there is no CUDA GPU here"):
        main([])
    assert main(["--vram", "12"]) == 0


@pytest.mark.parametrize("card", ["t4", "v100"])
def test_a_card_without_bf16_is_planned_in_fp16_without_the_kernels(capsys, card):
    printed = run(capsys, "--gpu", card)
    assert "tokens per step, fp16" in printed and "dtype = 'float16'" in printed
    assert 'precision = "fp16"' in printed and 'kernels = "eager"' in printed and "compile = true" in printed
    assert f"triton: kernels is 'triton', which {cards.lookup(card).name}" in printed
    for flags in (["--kernels", "triton"], ["--precision", "bf16"]):
        with pytest.raises(UserError, match="cannot run: use --kernels eager --precision fp16"):
            main(["--gpu", card, *flags])
    with pytest.raises(UserError, match="does not fit"):
        main(["--gpu", card, "--n-layer", "400"])


def test_the_card_present_is_the_default(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: types.SimpleNamespace(total_memory=12282 * 2**20))
    monkeypatch.setattr(cards, "present", lambda: RTX4070)
    found = json.loads(run(capsys, "--json"))
    assert found["gpu"] == "NVIDIA GeForce RTX 4070"
    assert found["usable_bytes"] < usable_vram(RTX4070)  # the driver holds 6 MiB


def test_the_command_ends_with_2_and_one_line_for_bad_input():
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt.plan", "--gpu", "rtx4071"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: gpu is 'rtx4071'") and done.stderr.count("\n") == 1 and not done.stdout


def test_help_shows_examples(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastgpt.plan", "--help"])
    with pytest.raises(SystemExit) as ended:
        common.run(main)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--gpu rtx4070 --model gpt2-124m" in out and "Chinchilla" in out
