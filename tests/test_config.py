"""Presets, TOML and flags: precedence, and one clear sentence for everything that is wrong."""

import sys

import pytest

from fastgpt import command, common
from fastgpt.common import UserError
from fastgpt.config import Config, ModelConfig, differences, load_preset, load_toml, parse, preset_names


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_load(name, device):
    config = load_preset(name, device)
    assert config.preset == name
    assert config.model.n_embd % config.model.n_head == 0


def test_preset_list_is_what_the_help_says():
    assert preset_names() == [
        *("demo", "gpt2-124m", "gpt2-350m", "gpt2-40m", "gpt2-xl"),
        *("modern-124m", "modern-40m", "modern-demo"),
    ]


def test_the_presets_take_524288_tokens_per_step():
    for name in ("gpt2-40m", "gpt2-124m", "gpt2-350m", "gpt2-xl", "modern-40m", "modern-124m"):
        assert load_preset(name).tokens_per_step == 524_288


def test_demo_is_larger_on_a_gpu():
    assert load_preset("demo", "cuda").model.n_embd > load_preset("demo", "cpu").model.n_embd
    assert parse(["--device", "cpu"], "cuda").model == load_preset("demo", "cpu").model


def test_precedence_defaults_preset_file_flags(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[optim]\nlr = 1\n[train]\nseed = 5\nout = 'runs/x'\n")
    config = parse(["--preset", "gpt2-40m", str(file), "--seed", "7"], "cpu")
    assert (config.model.n_embd, config.optim.lr, config.train.seed) == (384, 1.0, 7)
    assert isinstance(config.optim.lr, float) and config.train.out.name == "x"
    assert parse([str(file)], "cpu").model == ModelConfig()  # a file alone starts from the defaults, not from the demo


def test_flat_flags_and_bare_resume():
    args = "--kernels eager --precision bf16 --device cpu --batch-size 3 --block-size 32 --grad-accum 2 --max-iters 9"
    args += " --eval-interval 4 --checkpoint-interval 5 --lr 0.1 --data x --out y --compile --resume"
    config = parse(args.split(), "cpu")
    assert (config.train.kernels, config.train.precision, config.train.compile) == ("eager", "bf16", True)
    assert (config.data.batch_size, config.data.grad_accum, config.model.block_size) == (3, 2, 32)
    assert config.train.resume == "newest"
    assert parse(["--resume", "a.pt"], "cpu").train.resume == "a.pt"
    assert parse(["--resume", "--seed", "3"], "cpu").train.resume == "newest"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--preset", "gpt2-124n"], ["preset", "gpt2-124n", "gpt2-124m"]),
        (["--n-embd", "100", "--n-head", "3"], ["n_embd", "100", "n_head", "3"]),
        (["--batch-size", "0"], ["batch_size", "0", "at least 1"]),
        (["--dropout", "1"], ["dropout", "[0, 1)"]),
        (["--lr", "-1"], ["lr", "-1", "negative"]),
        (["--eval-interval", "-2"], ["eval_interval", "-2"]),
        (["missing.toml"], ["missing.toml", "No such file"]),
        (["no-such-file"], ["'no-such-file' is not TOML", "give a .toml file"]),
        (["config/train_gpt2.py"], ["'config/train_gpt2.py' is not TOML", "python -m fastgpt.nanogpt"]),
        (["model.n_layer=4"], ["'model.n_layer=4' is not TOML", "a .toml file, or a flag for each value: --n-layer 4"]),
        (["+optim.learning_rate=1"], ["a flag for each value: --lr 1"]),
        (["--learning_rate=1"], ["flag is '--learning_rate' (did you mean '--lr'?), which is not known"]),
        (["--training.steps", "5"], ["did you mean '--max-iters'?"]),
        (["--dtype=bfloat16"], ["did you mean '--precision'?"]),
        (["--config", "x.yaml"], ["flag is '--config'", "FILE stands alone, without a flag"]),
        (["x.yaml"], ["'x.yaml' is not TOML", "give a .toml file"]),
        (["gpt2-124m"], ["'gpt2-124m' is not TOML", "give --preset gpt2-124m"]),
        (["configs/gpt2-124m"], ["'configs/gpt2-124m' is not TOML"]),
        (["--compile", "maybe"], ["'maybe' is not TOML"]),
        (["--out", ""], ["--out is ''"]),
        (["--preset", ""], ["--preset is ''"]),
        (["--preset", "demo", "--preset", "gpt2-124m"], ["--preset is given twice"]),
        (["--n-layer", "10**9"], ["--n-layer", "'10**9'"]),
        (["--n-layer", "1e9"], ["n_layer is 1000000000", "[1, 10000]"]),
        (["--n-embd", "99991"], ["n_embd is 99991", "n_head can be 1"]),
        (["--n-embd", "1000000007"], ["n_embd is 1000000007", "[1, 100000]"]),
        (["--grad-accum", "1e18"], ["grad_accum", "[1, 1000000000]"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--muon-lr", "0.1"], ["muon_lr is 0.1 but optimizer is 'adamw'", "--optimizer muon"]),
        (["--optimizer", "muon", "--lr", "0"], ["lr is 0, and the other rates follow it"]),
        (["--optimizer", "muon", "--muon-momentum", "1"], ["muon_momentum is 1.0", "[0, 1)"]),
        (["--min-lr-ratio", "1e400"], ["--min-lr-ratio is '1e400'", "finite"]),
    ],
)
def test_bad_values_end_in_one_sentence(args, words):
    with pytest.raises(UserError) as error:
        parse(args, "cpu")
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_what_others_call_a_flag_leads_to_one_that_there_is():
    flags = {flag for option in command.options(Config) for flag in option.flags}
    assert set(command.ELSEWHERE.values()) <= flags and not set(command.ELSEWHERE) & flags


@pytest.mark.parametrize(
    "args", [["--learning-rate", "1"], ["--kernels", "cuda"], ["--lr", "fast"], ["--lr"], ["--lr", "--compile"]]
)
def test_unknown_flags_and_choices_exit_with_2(args, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as exit:
        common.run(lambda args: parse(args, "cpu") and 0)
    assert exit.value.code == 2
    assert args[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optim]\nlearning_rate = 1\n", ["[optim]", "learning_rate", "lr"]),
        ("[optimiser]\nlr = 1\n", ["optimiser", "optim"]),
        ("[optim]\nlr = 'high'\n", ["lr", "'high'", "float"]),
        ("[optim]\nlr = true\n", ["lr", "True", "float"]),
        ("[model]\nn_embd = 1.5\n", ["n_embd", "1.5", "int"]),
        ("[train]\nkernels = 'cuda'\n", ["kernels", "'cuda'", "triton, eager"]),
        ("lr = 1\n", ["[lr]", "sections"]),
        ("[optim\n", ["not valid TOML"]),
        ("[optim]\nlr = inf\n", ["lr is inf", "finite"]),
        ("[optim]\nlr = nan\n", ["lr is nan"]),
        ("[optim]\nweight_decay = inf\n", ["weight_decay is inf"]),
        ("[train]\nspike_zscore = inf\n", ["spike_zscore is inf"]),
        ("[train]\nmax_iters = " + "9" * 400, ["max_iters", "2^63"]),
        ("[optim]\nlr = 1" + "0" * 400, ["lr", "2^63"]),
        ("[train]\nout = ''\n", ["out is empty"]),
        ('[train]\nout = "a\\u0000b"\n', ["out is 'a", "NUL"]),
        ("cuda = 3\n", ["cuda = 3", "sections"]),
        ("[cuda]\nlr = 3\n", ["[lr]", "sections"]),
        ("[cuda.optim]\nlr = 'high'\n", ["lr is 'high'"]),
    ],
)
def test_bad_toml_ends_in_one_sentence(tmp_path, text, words):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_toml(file, Config())
    assert all(word in str(error.value) for word in [str(file), *words])


def test_a_config_file_is_never_executed(tmp_path):
    file = tmp_path / "evil.toml"
    file.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(UserError):
        load_toml(file, Config())
    assert not (tmp_path / "ran").exists()


def test_differences_name_every_key():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 -> 3", "c: absent -> 4"]


@pytest.mark.parametrize(
    "args", [["--batch-size", "auto"], ["--batch", "auto"], ["--batch-size=auto"], ["--batch=auto"], ["--auto-batch"]]
)
def test_an_automatic_batch_is_asked_for_in_any_spelling(args):
    config = parse(["--lr", "0.5", *args, "--seed", "3"], "cpu")
    assert config.data.auto_batch and (config.optim.lr, config.train.seed) == (0.5, 3)
    assert config.data.batch_size == load_preset("demo").data.batch_size  # with grad_accum: the tokens per step to keep


def test_batch_is_batch_size():
    assert parse(["--batch", "3"], "cpu").data.batch_size == 3 and not parse(["--batch", "3"], "cpu").data.auto_batch
