"""The loop, run for real: what it prints, what it writes and when, exact resume, Ctrl-C, and bad input."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastgpt.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fastgpt.data import write_shard
from fastgpt.errors import UserError
from fastgpt.training import checkpoint, loop
from fastgpt.training.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    """A tiny run on real text: this file, as bytes, in shards."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).to(torch.int32).numpy()
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "train.bin", text[:3000])
    write_shard(data / "val.bin", text[3000:4000])
    return Config(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=256, dropout=0.1),
        data=DataConfig(data=str(data), tokenizer="bytes", batch_size=2, grad_accum=2),
        optim=OptimConfig(lr=1e-2, warmup_iters=2),
        train=TrainConfig(
            kernels="eager",
            max_iters=8,
            eval_interval=4,
            eval_iters=2,
            checkpoint_interval=4,
            log_interval=2,
            out=tmp_path / "run",
        ),
    )


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def quiet():
    return Console(file=open(os.devnull, "w"))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_the_loss_falls_and_everything_is_written(config, device, kernels):
    config = with_train(config, kernels=kernels, max_iters=12)
    run, code = train(config, device, quiet())
    assert code == 0 and run.step == 12
    records = metrics(config.train.out)
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < losses[0] - 0.2
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 4, 6, 8, 10, 12]  # not one step too many
    assert [r["step"] for r in records if "val_loss" in r] == [0, 4, 8, 12]
    assert [p.name for p in checkpoint.existing(config.train.out)] == ["ckpt-00000008.pt", "ckpt-00000012.pt"]


def test_the_log_line_has_every_figure(config, device, capsys):
    train(with_train(config, max_iters=2), device)
    line = next(line for line in capsys.readouterr().out.splitlines() if "step      2/2  loss" in line)
    for word in ("loss", "lr", "norm", " ms", "tok/s", "mem", "GB", "mfu", "data"):
        assert word in line


def test_logged_loss_is_the_mean_over_all_micro_batches(config, device, monkeypatch):
    seen = []
    real = loop.Stepper.__call__

    def record(self, batches, grad_accum, lr):
        batches = list(batches)
        self.model.eval()
        with torch.no_grad():
            seen.append(torch.stack([self.model(x, y)[1] for x, y in batches]).mean().item())
        self.model.train()
        return real(self, batches, grad_accum, lr)

    monkeypatch.setattr(loop.Stepper, "__call__", record)
    config = with_train(config, precision="fp32")  # as ``record`` computes; auto is bf16 on a GPU
    train(replace(config, model=replace(config.model, dropout=0.0)), device, quiet())
    logged = {r["step"]: r["loss"] for r in metrics(config.train.out) if "loss" in r}
    assert logged[4] == pytest.approx((seen[2] + seen[3]) / 2, rel=1e-5)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_2n_steps_equal_n_resume_n(config, device, kernels, tmp_path, monkeypatch):
    """Same batches, same losses, same weights, bit for bit, with dropout on."""
    hashes = []
    real = loop.TokenLoader.next_batch

    def record(self, *args):
        x, y = real(self, *args)
        hashes.append(hash(x.cpu().numpy().tobytes()))
        return x, y

    monkeypatch.setattr(loop.TokenLoader, "next_batch", record)
    config = with_train(config, kernels=kernels, log_interval=1)
    whole, _ = train(with_train(config, out=tmp_path / "whole"), device, quiet())
    hashes_whole = hashes.copy()
    hashes.clear()
    # The schedule's horizon stays max_iters: the first half is interrupted, not configured shorter.
    halves = with_train(config, out=tmp_path / "halves")
    with monkeypatch.context() as patch:
        log_line = loop._log_line

        def ctrl_c_at_4(run, *args):
            if run.step == 4:
                signal.raise_signal(signal.SIGINT)
            return log_line(run, *args)

        patch.setattr(loop, "_log_line", ctrl_c_at_4)
        run, code = train(halves, device, quiet())
        assert run.step == 4 and code == 130
    torch.rand(7)  # whatever happened to the generators in between
    resumed, code = train(with_train(halves, resume="newest"), device, quiet())
    assert code == 0 and resumed.step == 8
    assert hashes == hashes_whole
    keep = ("step", "loss", "lr", "grad_norm")
    whole_log, halves_log = (
        [{k: r[k] for k in keep} for r in metrics(tmp_path / name) if "loss" in r] for name in ("whole", "halves")
    )
    assert whole_log == halves_log
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_ctrl_c_saves_and_exits_130(config, device, monkeypatch):
    config = with_train(config, max_iters=100_000, checkpoint_interval=0, eval_interval=0)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    log_line = loop._log_line

    def start_timer(*args):  # from the first line on: a GPU may take longer than a second to come up
        if not timer.ident:
            timer.start()
        return log_line(*args)

    monkeypatch.setattr(loop, "_log_line", start_timer)
    run, code = train(config, device, quiet())
    timer.join()
    assert code == 130 and 0 < run.step < 100_000
    assert checkpoint.load(checkpoint.resolve(config.train.out))["step"] == run.step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was


def test_a_new_run_in_the_place_of_an_old_one_loses_neither(config, device):
    train(with_train(config, max_iters=8), device, quiet())
    train(with_train(config, max_iters=4), device, quiet())
    assert [p.name for p in checkpoint.existing(config.train.out)] == ["ckpt-00000004.pt"]
    aside = config.train.out.with_name("run.1")
    assert [p.name for p in checkpoint.existing(aside)] == ["ckpt-00000004.pt", "ckpt-00000008.pt"]


def test_resume_says_what_changed_and_applies_it(config, device, capsys):
    train(with_train(config, max_iters=4), device, quiet())
    changed = replace(with_train(config, resume="newest"), optim=replace(config.optim, weight_decay=0.5))
    run, _ = train(changed, device)
    assert "weight_decay: 0.1 -> 0.5" in capsys.readouterr().out
    assert run.stepper.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_resume_with_another_shape_is_refused_and_nothing_is_written(config, device):
    train(with_train(config, max_iters=4), device, quiet())
    before = {path: path.read_bytes() for path in config.train.out.iterdir()}
    other = replace(with_train(config, resume="newest"), model=replace(config.model, n_embd=64, n_layer=2))
    with pytest.raises(UserError) as error:
        train(other, device, quiet())
    assert "n_embd: 32 -> 64" in str(error.value) and "n_layer: 1 -> 2" in str(error.value)
    assert before == {path: path.read_bytes() for path in config.train.out.iterdir()}


def test_resume_with_nothing_left_to_do_is_refused(config, device):
    train(with_train(config, max_iters=4), device, quiet())
    with pytest.raises(UserError, match=r"max_iters is 4.*4 steps"):
        train(with_train(config, max_iters=4, resume="newest"), device, quiet())


def test_evaluation_has_no_dropout_repeats_and_leaves_training_alone(config, device):
    run = loop.build(config, device)
    before = run.train_loader.state_dict(), torch.get_rng_state()
    first = loop.evaluate(run)
    assert first == loop.evaluate(run)
    assert run.model.training
    assert run.train_loader.state_dict() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_checkpoint_named(config, device):
    train(with_train(config, max_iters=4), device, quiet())
    saved = checkpoint.load(checkpoint.resolve(config.train.out))
    saved["model"]["transformer.wte.weight"][0] = float("nan")
    checkpoint.save(config.train.out, 5, {k: v for k, v in saved.items() if k not in ("format", "step")}, keep=5)
    with pytest.raises(UserError, match=r"loss is nan at step 6.*ckpt-00000005"):
        train(with_train(config, resume="newest"), device, quiet())


BAD = {
    "unknown preset": (["--preset", "gpt3"], ["preset", "gpt3", "gpt2-124m"]),
    "unknown flag": (["--learning-rate", "1"], ["--learning-rate"]),
    "heads": (["--n-embd", "100", "--n-head", "3"], ["n_embd", "100", "n_head", "3"]),
    "missing data": (["--data", "nowhere"], ["nowhere"]),
    "empty data": (["--data", "{tmp}/empty"], ["empty"]),
    "truncated data": (["--data", "{tmp}/truncated"], ["train.bin"]),
    "short data": (["--data", "{tmp}/short"], ["20 tokens", "block_size", "65"]),
    "ids past the vocabulary": (["--data", "{tmp}/ids"], ["id 256", "vocab_size is 256"]),
    "missing checkpoint": (["--resume", "{tmp}/none.pt"], ["none.pt", "does not exist"]),
    "nothing to resume": (["--resume", "--out", "{tmp}/fresh"], ["no"]),
    "output on a file": (["--out", "{tmp}/short/train.bin"], ["out is", "train.bin", "cannot be written"]),
    "tokenizer larger than the model": (["--tokenizer", "gpt2"], ["vocab_size", "256", "50257"]),
}


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, count, top in (("short", 20, 9), ("ids", 4000, 301), ("truncated", 4000, 9), ("empty", 4000, 9)):
        (folder / name).mkdir()
        for split in ("train", "val"):
            write_shard(folder / name / f"{split}.bin", (torch.arange(count) % top).numpy())
    path = folder / "truncated" / "train.bin"
    path.write_bytes(path.read_bytes()[:-100])
    (folder / "empty" / "train.bin").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_sentence_exit_2_and_nothing_written(name, bad_data, tmp_path, monkeypatch, capsys):
    import train as entry
    from fastgpt import cli

    args, words = BAD[name]
    args = [arg.format(tmp=bad_data) for arg in args]
    monkeypatch.chdir(tmp_path)
    # Where there is a GPU, the presets' [cuda] sections would change shape and tokenizer.
    monkeypatch.setattr(sys, "argv", ["train.py", "--kernels", "eager", "--device", "cpu", *args])
    with pytest.raises(SystemExit) as exit:
        cli.run(entry.main)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    if name != "unknown flag":  # tyro draws its own box
        assert message.startswith("error: ") and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_in_a_fresh_process(config, tmp_path):
    """``python train.py`` as a user calls it, interpreter and all, then ``python -m fastgpt.sample``."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = f"{sys.executable} train.py --n-embd 32 --n-layer 1 --block-size 16 --batch-size 2 --max-iters 3"
    command += f" --eval-iters 1 --device cpu --data {config.data.data} --out {tmp_path / 'out'}"
    result = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "interpreter" in result.stdout and "step      3/3" in result.stdout
    command = [sys.executable, "-m", "fastgpt.sample", str(tmp_path / "out"), "--prompt", "def", "--tokens", "5"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def")
