"""The loop, run for real: what it prints, what it writes and when, exact resume, Ctrl-C, and bad input."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from fastgpt.checkpoints import checkpoint, lock, saver
from fastgpt.checkpoints.folder import best, existing, resolve
from fastgpt.common import UserError
from fastgpt.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, load_preset
from fastgpt.data.loader import TokenLoader
from fastgpt.model import GPT
from fastgpt.schedule import learning_rate, muon_momentum
from fastgpt.training.evaluation import evaluate
from fastgpt.training.loop import StopRequest, train
from fastgpt.training.run import build, smaller
from fastgpt.training.step import Stepper
from tests import processes
from tests.shards import write_shard

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


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))  # not one step too many
    assert [r["step"] for r in records if "tokens_per_second" in r] == [1, 2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 4, 8, 12]
    assert [p.name for p in existing(config.train.out)] == ["step-00000008", "step-00000012"]
    assert json.loads((config.train.out / "config.json").read_text())["train"]["max_iters"] == 12
    assert json.loads((config.train.out / "environment.json").read_text())["torch"] == torch.__version__
    assert list((config.train.out / "tensorboard").iterdir())


def test_torch_and_numpy_are_all_that_a_run_needs(config, device, monkeypatch, capsys):
    """The machine of a benchmark may have no more. What modules import as a whole, tests/test_imports.py sees."""
    rich = ("rich", *(f"rich.{name}" for name in ("console", "markup", "progress", "segment", "text")))
    for name in (*rich, "filelock", "psutil", "jinja2", "tiktoken"):
        monkeypatch.setitem(sys.modules, name, None)
    config = with_train(config, tensorboard=False)
    run, code = train(config, device)
    shown = capsys.readouterr()
    assert code == 0 and run.step == 8 and "iter 8: loss" in shown.out and "eta n/a" not in shown.out
    assert shown.out.startswith("fastgpt\nmodel    20.6k") and "\npreflight" in shown.out and "[bold]" not in shown.out
    assert "filelock is not installed: only " in shown.err
    assert not list(config.train.out.parent.glob(".run.lock*"))


def test_the_log_line_has_nanogpts_shape_and_every_figure(config, device, capsys):
    train(with_train(config, max_iters=2, verbose=True), device)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("iter 2: loss "))
    assert re.match(r"iter 2: loss \d\.\d{4}, time [\d.]+ms, ", line)
    for word in ("lr", "norm", "tok/s", "mem", "GB", "data", "eta"):
        assert word in line
    assert re.search(r"step 2: val loss \d\.\d{4}, best \d\.\d{4}", out)


def test_logged_loss_is_the_mean_over_all_micro_batches(config, device, monkeypatch):
    seen = []
    real = Stepper.__call__

    def record(self, batches, grad_accum, *rates):
        batches = list(batches)
        self.model.eval()
        with torch.no_grad():
            seen.append(torch.stack([self.model(x, y)[1] for x, y in batches]).mean().item())
        self.model.train()
        return real(self, batches, grad_accum, *rates)

    monkeypatch.setattr(Stepper, "__call__", record)
    config = with_train(config, precision="fp32")  # as ``record`` computes; auto is bf16 on a GPU
    train(replace(config, model=replace(config.model, dropout=0.0)), device, quiet())
    records = {r["step"]: r for r in metrics(config.train.out) if "loss" in r}
    assert [records[step]["loss"] for step in records] == pytest.approx(seen, rel=1e-5)
    assert records[4]["interval_loss"] == pytest.approx((seen[2] + seen[3]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("kernels", "optimizer", "n"), [("eager", "adamw", 4), ("triton", "adamw", 2), ("eager", "muon", 4)]
)
def test_2n_steps_equal_n_resume_n(config, device, kernels, optimizer, n, tmp_path, monkeypatch):
    """Same batches, same losses, same weights, bit for bit, with dropout on, and with Muon's momentum on its way up."""
    hashes = []
    real = TokenLoader.next_batch

    def record(self, *args):
        x, y = real(self, *args)
        hashes.append(hash(x.cpu().numpy().tobytes()))
        return x, y

    monkeypatch.setattr(TokenLoader, "next_batch", record)
    config = with_train(config, kernels=kernels, log_interval=1, max_iters=2 * n, eval_interval=n)
    muon = {"optimizer": optimizer, "muon_momentum_warmup": 6, "muon_normuon": True, "embedding_lr": 0.1}
    config = replace(config, optim=replace(config.optim, **muon if optimizer == "muon" else {}))
    whole, _ = train(with_train(config, out=tmp_path / "whole"), device, quiet())
    hashes_whole = hashes.copy()
    hashes.clear()
    # The schedule's horizon stays max_iters: the first half is interrupted, not configured shorter.
    halves = with_train(config, out=tmp_path / "halves")
    with monkeypatch.context() as patch:
        interrupt_at(n, patch)
        run, code = train(halves, device, quiet())
        assert run.step == n and code == 130
    assert len(hashes) == 2 * n + 1  # the micro-batch of the step that was given up
    hashes.pop()
    torch.rand(7)  # whatever happened to the generators in between
    resumed, code = train(with_train(halves, resume="newest"), device, quiet())
    assert code == 0 and resumed.step == 2 * n
    assert hashes == hashes_whole
    keep = ("step", "loss", "lr", "grad_norm")
    whole_log, halves_log = (
        [{k: r[k] for k in keep} for r in metrics(tmp_path / name) if "loss" in r] for name in ("whole", "halves")
    )
    assert whole_log == halves_log
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    if optimizer == "muon":
        group = resumed.stepper.optimizer.param_groups[0]
        assert group["momentum"] == 0.95 and group["lr"] == pytest.approx(
            2 * resumed.stepper.optimizer.param_groups[-1]["lr"]
        )
        assert muon_momentum(3, config.optim) == pytest.approx(0.9)


def test_a_run_is_not_resumed_with_another_optimizer(config, device):
    train(with_train(config, max_iters=2), device, quiet())
    other = replace(config, optim=replace(config.optim, optimizer="muon"))
    with pytest.raises(
        UserError, match=r"optimizer is 'muon' but checkpoint .* holds the state of 'adamw': resume with"
    ):
        train(with_train(other, resume="newest"), device, quiet())


@pytest.mark.parametrize(
    ("schedules", "at"), [({}, 3), ({"batch_warmup_iters": 4, "window_warmup_iters": 4}, 1)], ids=["plain", "warmups"]
)
def test_a_modern_model_with_muon_goes_on_bit_for_bit(config, device, tmp_path, schedules, at):
    """With warmups steps have 1, 1 and then 2 micro-batches, and windows of 4, 7, 10, 13 and then 16: stopped at 2 steps."""
    config = replace(
        with_train(config, eval_interval=0, checkpoint_interval=0, max_iters=6),
        model=replace(load_preset("modern-demo").model, n_layer=2, n_embd=32, block_size=16, dropout=0.1),
        optim=replace(load_preset("modern-demo").optim, muon_momentum_warmup=4, **schedules),
    )
    whole, _ = train(with_train(config, out=tmp_path / "whole"), device, quiet())
    halves = with_train(config, out=tmp_path / "halves")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(at, patch)
        stopped, _ = train(halves, device, quiet())
    resumed, _ = train(with_train(halves, resume="newest"), device, quiet())
    assert (stopped.step, resumed.step) == (2 if schedules else 3, 6)
    assert resumed.tokens(6) == (10 if schedules else 12) * 2 * 16  # micro-batches of 2 x 16
    assert resumed.train_loader.state_dict() == whole.train_loader.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    checkpoints = [checkpoint.load(resolve(path)) for path in (tmp_path / "whole", tmp_path / "halves")]
    states = [saved["optimizer"]["state"] for saved in checkpoints]
    assert "momentum_buffer" in states[0]["transformer.h.0.attn.c_attn.weight"]
    assert "exp_avg" in states[0]["transformer.value_embeds.1.weight"]
    for name, state in states[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][name][key])) for key, v in state.items())


def interrupt_at(step, monkeypatch, signals=(signal.SIGINT,), micro_batch=0):
    """Send signals to this process when the step after ``step`` asks for its ``micro_batch``-th micro-batch."""
    real, asked = TokenLoader.next_batch, []

    def next_batch(self, *args):
        asked.append(args)
        if len(asked) == 2 * step + micro_batch + 1:  # 2 micro-batches per step
            for number in signals:
                signal.raise_signal(number)
        return real(self, *args)

    monkeypatch.setattr(TokenLoader, "next_batch", next_batch)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_a_signal_ends_the_run_after_the_micro_batch_and_the_step_leaves_no_trace(
    config, device, monkeypatch, number, code, tmp_path
):
    before = signal.getsignal(signal.SIGINT)
    whole, _ = train(with_train(config, out=tmp_path / "whole"), device, quiet())
    with monkeypatch.context() as patch:
        interrupt_at(5, patch, [number])
        run, got = train(config, device, quiet())
    assert (run.step, got) == (5, code)
    assert checkpoint.load(resolve(config.train.out))["step"] == 5
    assert signal.getsignal(signal.SIGINT) is before
    resumed, got = train(with_train(config, resume="newest"), device, quiet())
    assert got == 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("step", "words"),
    [(0, "at step 0, before there was anything to save"), (5, "at step 5: continue with --resume")],
)
def test_resume_is_offered_where_there_is_something_to_resume(config, device, monkeypatch, capsys, step, words):
    interrupt_at(step, monkeypatch, [signal.SIGHUP])
    train(config, device)
    assert f"stopped by SIGHUP {words}\n" in capsys.readouterr().out


def test_under_nohup_the_run_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_up_for(config, device, monkeypatch, tmp_path):
    config = with_train(config, eval_iters=5, log_interval=3, checkpoint_interval=2)
    train(with_train(config, out=tmp_path / "whole"), device, quiet())
    real, batches = TokenLoader.eval_batches, []

    def eval_batches(self, *args):
        for batch in real(self, *args):
            batches.append(batch)
            if len(batches) == 7:  # the second batch of the evaluation at step 4
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TokenLoader, "eval_batches", eval_batches)
        run, code = train(config, device, quiet())
    assert (run.step, code, len(batches)) == (4, 0, 7)
    train(with_train(config, resume="newest"), device, quiet())
    kept = ("step", "loss", "val_loss", "interval_loss")
    whole, halves = (
        [{key: record[key] for key in kept if key in record} for record in metrics(out)[1:]]
        for out in (tmp_path / "whole", config.train.out)
    )
    assert whole == halves  # the interval's loss too: it ends at step 6
    assert best(tmp_path / "whole")[1] == best(config.train.out)[1]


def test_a_second_ctrl_c_leaves_at_once(config, device, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(5, monkeypatch, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        train(config, device, quiet())
    assert {p.name for p in existing(config.train.out)} <= {"step-00000004"}  # maybe still being written
    assert signal.getsignal(signal.SIGINT) is before


def test_a_new_run_in_the_place_of_an_old_one_loses_neither(config, device):
    train(with_train(config, max_iters=8), device, quiet())
    train(with_train(config, max_iters=4), device, quiet())
    assert [p.name for p in existing(config.train.out)] == ["step-00000004"]
    aside = config.train.out.with_name("run.1")
    assert [p.name for p in existing(aside)] == ["step-00000004", "step-00000008"]


def test_a_second_process_is_refused_before_it_touches_the_first_ones_folder(config, device):
    train(with_train(config, max_iters=4), device, quiet())
    before = contents(config.train.out)
    for flags in ({}, {"resume": "newest"}, {"resume": "auto"}):
        with (
            lock.held(config.train.out),
            pytest.raises(UserError, match=rf"^out is \S+, where process {os.getpid()} on .* has been writing since"),
        ):
            train(with_train(config, **flags), device, quiet())
    assert contents(config.train.out) == before
    assert [path.name for path in config.train.out.parent.iterdir() if "run" in path.name] == ["run"]


@pytest.mark.parametrize("flags", [{"wandb": "project"}, {"hellaswag": "none.jsonl"}])
def test_a_launch_that_fails_moves_nothing(config, device, monkeypatch, flags):
    train(with_train(config, max_iters=4), device, quiet())
    before = contents(config.train.out)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=next(iter(flags))):
        train(with_train(config, **flags), device, quiet())
    assert contents(config.train.out) == before
    assert train(with_train(config, max_iters=5, resume="newest"), device, quiet())[0].step == 5


def test_metrics_of_a_run_that_never_saved_are_set_aside_too(config, device, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(2, patch, [signal.SIGINT, signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            train(config, device, quiet())
    train(with_train(config, max_iters=1), device, quiet())
    assert [r["step"] for r in metrics(config.train.out) if "loss" in r] == [1]
    assert [r["step"] for r in metrics(config.train.out.with_name("run.1")) if "loss" in r] == [1, 2]


def test_documents_are_masked_where_asked(config, device, monkeypatch):
    seen = []
    real = Stepper.__call__

    def record(self, batches, grad_accum, *rates):
        batches = list(batches)
        seen.extend(batches)
        return real(self, batches, grad_accum, *rates)

    monkeypatch.setattr(Stepper, "__call__", record)
    plain, _ = train(with_train(config, out=config.train.out / "plain"), device, quiet())
    assert all(len(batch) == 2 for batch in seen)
    seen.clear()
    # Byte 0 begins a document; this text has none, so let "e" do.
    monkeypatch.setattr("fastgpt.data.tokenizer.BytesTokenizer.eot", ord("e"))
    masked, _ = train(replace(config, data=replace(config.data, mask_documents=True)), device, quiet())
    assert all(torch.equal(ids, (x == ord("e")).cumsum(-1)) for x, _, ids in seen)
    assert any(ids.max() > 0 for _, _, ids in seen)
    a, b = plain.model.state_dict(), masked.model.state_dict()
    assert not all(torch.equal(a[name], b[name]) for name in a)


def test_hellaswag_is_scored_at_the_end_and_a_bad_file_is_found_out_before_the_start(config, device, tmp_path, capsys):
    row = {"ctx": "def f", "endings": ["(x):", "qqq", "zz", "##"], "label": 0}
    (tmp_path / "hs.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)))
    train(with_train(config, max_iters=2, hellaswag=str(tmp_path / "hs.jsonl")), device)
    assert re.search(r"HellaSwag acc [01]\.\d{4}, acc_norm [01]\.\d{4} over 3 examples", capsys.readouterr().out)
    assert [r["step"] for r in metrics(config.train.out) if "hellaswag_acc_norm" in r] == [2]
    out = tmp_path / "other"
    with pytest.raises(UserError, match="cannot be read"):
        train(with_train(config, hellaswag=str(tmp_path / "none.jsonl"), out=out), device, quiet())
    assert not out.exists()


def test_the_schedule_counts_steps_not_micro_batches(config, device):  # bug 14
    from fastgpt.schedule import learning_rate

    train(config, device, quiet())
    logged = [r["lr"] for r in metrics(config.train.out) if "step" in r and "loss" in r]
    assert logged == [learning_rate(step, config.optim, 8) for step in range(8)]


def test_a_converted_nanogpt_checkpoint_is_resumed(config, device, tmp_path):
    from fastgpt import convert

    train(with_train(config, max_iters=4), device, quiet())
    convert.main([str(config.train.out), str(tmp_path / "ckpt.pt")])
    nanogpts = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del nanogpts["fastgpt"]  # what it would have written itself
    torch.save(nanogpts, tmp_path / "ckpt.pt")
    convert.main([str(tmp_path / "ckpt.pt"), str(tmp_path / "back"), "--to", "fastgpt"])
    resumed, _ = train(with_train(config, max_iters=5, out=tmp_path / "back", resume="newest"), device, quiet())
    moments = [state["step"].item() for state in resumed.stepper.optimizer.state.values()]
    assert resumed.step == 5 and set(moments) == {5.0}  # step 4's, and one more
    assert resumed.train_loader.position == 4  # nanoGPT does not know which windows were seen: from the first one on


def test_init_from_begins_with_the_weights_and_the_shape_of_a_checkpoint(config, device, tmp_path):
    first, _ = train(with_train(config, max_iters=4), device, quiet())
    other = replace(
        with_train(config, max_iters=2, out=tmp_path / "tuned", init_from=str(config.train.out)),
        model=replace(config.model, n_embd=64, n_layer=3, dropout=0.0),
        optim=replace(config.optim, lr=0.0),
    )
    tuned, _ = train(other, device, quiet())
    assert (tuned.config.model.n_embd, tuned.config.model.n_layer, tuned.config.model.dropout) == (32, 1, 0.0)
    assert tuned.step == 2
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, tuned.model.state_dict()[name]), name
    # Resumed, it goes on with its own.
    again, _ = train(with_train(other, max_iters=3, resume="newest"), device, quiet())
    assert again.step == 3
    with pytest.raises(UserError, match="does not exist"):
        train(with_train(config, init_from=str(tmp_path / "nothing"), out=tmp_path / "x"), device, quiet())
    assert not (tmp_path / "x").exists()


def test_resume_says_what_changed_and_applies_it(config, device, capsys):
    train(with_train(config, max_iters=4), device, quiet())
    changed = replace(with_train(config, resume="newest"), optim=replace(config.optim, weight_decay=0.5))
    run, _ = train(changed, device)
    assert "weight_decay: 0.1 -> 0.5" in capsys.readouterr().out
    assert run.stepper.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_resume_with_another_shape_is_refused_and_nothing_is_written(config, device):
    train(with_train(config, max_iters=4), device, quiet())
    before = contents(config.train.out)
    other = replace(with_train(config, resume="newest"), model=replace(config.model, n_embd=64, n_layer=2))
    with pytest.raises(UserError) as error:
        train(other, device, quiet())
    assert "n_embd: 32 -> 64" in str(error.value) and "n_layer: 1 -> 2" in str(error.value)
    assert before == contents(config.train.out)


def test_resume_with_nothing_left_to_do_is_refused(config, device):
    train(with_train(config, max_iters=4), device, quiet())
    with pytest.raises(UserError, match=r"max_iters is 4.*4 steps"):
        train(with_train(config, max_iters=4, resume="newest"), device, quiet())


def test_evaluation_has_no_dropout_repeats_and_leaves_training_alone(config, device):
    run = build(config, device)
    before = run.train_loader.state_dict(), torch.get_rng_state()
    first = evaluate(run)
    assert first == evaluate(run)
    assert run.model.training
    assert run.train_loader.state_dict() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_step_that_is_not_finite_changes_nothing_is_counted_and_repeated_ones_stop_the_run(
    config, device, monkeypatch, capsys
):
    """One poisoned step is skipped; when all are, the run ends with its last checkpoint named."""
    for kernels in ("eager", "triton"):
        weights = {}

        def poison(first, last, weights=weights, real=Stepper.__call__):
            steps = []

            def step(self, batches, grad_accum, lr, *momentum):
                steps.append(lr)
                bad = first <= len(steps) <= last
                forward = self.forward
                if bad:
                    weights["before"] = [p.detach().clone() for p in self.model.parameters()]
                    self.forward = lambda x, y: (None, forward(x, y)[1] * float("nan"))
                try:
                    return real(self, batches, grad_accum, lr, *momentum)
                finally:
                    self.forward = forward
                    if bad:
                        weights["after"] = [p.detach().clone() for p in self.model.parameters()]

            return step

        settings = with_train(config, kernels=kernels, out=config.train.out / kernels)
        if kernels == "triton":  # slow on a CPU, and only the optimizer is of interest
            settings = replace(
                with_train(settings, eval_interval=0),
                model=replace(config.model, dropout=0.0),
                data=replace(config.data, grad_accum=1),
            )
        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "__call__", poison(6, 6))
            run, _ = train(settings, device, quiet())
        assert run.step == 8 and run.stepper.skipped_steps() == 1
        assert all(torch.equal(a, b) for a, b in zip(weights["before"], weights["after"]))
        assert [r["step"] for r in metrics(settings.train.out) if r.get("skipped") is True] == [6]
        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "__call__", poison(6, 99))
            with pytest.raises(UserError, match=r"3 steps in a row, up to 8.*step-00000004"):
                train(with_train(settings, max_iters=20, max_skipped=3), device, quiet())


def spiky(monkeypatch, at):
    """Losses are steady noise, and at the calls numbered ``at`` a spike."""
    monkeypatch.setattr("fastgpt.training.run.SPIKE_WINDOW", 3)
    monkeypatch.setattr(Stepper, "__call__", None)
    calls = []

    def step(self, batches, grad_accum, lr, *momentum):
        for _ in batches:
            pass
        calls.append(lr)
        with torch.no_grad():
            self.model.transformer.wte.weight[0, 0] = float(len(calls))  # which step wrote these weights
        spikes = sum(call <= len(calls) for call in at)
        loss = 0.9 * 10**spikes if len(calls) in at else 3.0 + 0.01 * (len(calls) % 3)
        return torch.tensor(loss), torch.tensor(1.0)

    monkeypatch.setattr(Stepper, "__call__", step)


def test_a_spike_is_logged_and_the_run_goes_on(config, device, monkeypatch, capsys):
    spiky(monkeypatch, {6})
    run, _ = train(config, device)
    assert "spike: the loss of step 6, 9.0000" in capsys.readouterr().out
    assert run.step == 8
    assert [r["at_step"] for r in metrics(config.train.out) if r.get("event") == "spike"] == [6]


def test_after_a_kill_no_event_is_there_twice(config, device, monkeypatch):
    spiky(monkeypatch, {5, 7})  # the second one is step 5 again
    with monkeypatch.context() as patch:
        interrupt_at(6, patch, [signal.SIGINT, signal.SIGINT])  # at once: nothing is saved after step 4
        with pytest.raises(KeyboardInterrupt):
            train(with_train(config, log_interval=1), device, quiet())
    assert [r["at_step"] for r in metrics(config.train.out) if r.get("event") == "spike"] == [5]
    for thread in threading.enumerate():
        if thread.name == "checkpoint-4":
            thread.join()
    train(with_train(config, log_interval=1, resume="newest"), device, quiet())
    assert [r.get("step", r.get("at_step")) for r in metrics(config.train.out) if "val_loss" not in r][1:] == [
        1, 2, 3, 4, 5, 5, 6, 7, 8,
    ]  # fmt: skip


def test_a_spike_rolls_back_if_asked_and_the_data_go_on(config, device, monkeypatch, capsys):
    spiky(monkeypatch, {6})
    run, _ = train(with_train(config, on_spike="rollback", log_interval=1), device)
    assert "rolled back from step 6" in capsys.readouterr().out
    steps = [r["step"] for r in metrics(config.train.out) if "step" in r and "loss" in r]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert run.train_loader.position == 10 * 4  # ten steps of 2 x 2 windows: none was seen twice


def test_a_run_that_spikes_for_ever_stops(config, device, monkeypatch):
    spiky(monkeypatch, set(range(6, 200, 2)))
    with pytest.raises(UserError, match=r"rolled back 3 times.*step-00000004"):
        train(
            with_train(config, on_spike="rollback", log_interval=1, max_iters=50, checkpoint_interval=4),
            device,
            quiet(),
        )


def test_out_of_memory_halves_the_micro_batch_at_the_same_tokens_per_step(
    config, device, monkeypatch, capsys, tmp_path
):
    """Said, exact (no window is lost or seen twice), and remembered by the resumed run."""
    shapes = []
    real = Stepper.__call__

    def step(self, batches, grad_accum, lr, *momentum):
        def limited():
            for x, y in batches:
                if len(x) > 1 and len(shapes) >= 6:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ...")
                shapes.append(tuple(x.shape))
                yield x, y

        return real(self, limited(), grad_accum, lr, *momentum)

    monkeypatch.setattr(Stepper, "__call__", step)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = replace(config, model=replace(config.model, dropout=0.0))
    config = with_train(config, max_iters=9)
    run, _ = train(config, device)
    assert "micro-batches of 1 instead of 2, 4 of them instead of 2; tokens per step stay 64" in capsys.readouterr().out
    assert shapes == [(2, 16)] * 6 + [(1, 16)] * 4 * 6
    assert run.step == 9 and run.train_loader.position == 9 * 4
    monkeypatch.setattr(Stepper, "__call__", real)
    undisturbed, _ = train(with_train(config, out=tmp_path / "other"), device, quiet())
    expected = undisturbed.model.state_dict()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    resumed, _ = train(with_train(config, resume="newest", max_iters=10), device, quiet())
    assert (resumed.micro_batch, resumed.grad_accum) == (1, 4)


def test_a_single_sequence_that_does_not_fit_is_refused_with_what_would(config, device, monkeypatch):
    def step(self, batches, grad_accum, lr, *momentum):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(Stepper, "__call__", step)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(UserError, match="micro-batches of 1 x 16 tokens do not fit"):
        train(config, device, quiet())


NO_ROOM = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize(("fits", "error"), [(1, NO_ROOM[0]), (0, NO_ROOM[1])])
def test_out_of_memory_in_an_evaluation_costs_lines_in_the_log(
    config, device, monkeypatch, capsys, tmp_path, fits, error
):
    config = replace(with_train(config, max_iters=4), data=replace(config.data, batch_size=4))
    train(with_train(config, out=tmp_path / "other"), device, quiet())
    real = GPT.forward

    def forward(self, idx, *args):
        if not self.training and len(idx) > fits:
            raise error
        return real(self, idx, *args)

    monkeypatch.setattr(GPT, "forward", forward)
    run, code = train(config, device)
    out = capsys.readouterr().out
    assert (run.step, run.micro_batch, code) == (4, 4, 0) and existing(config.train.out)
    assert "out of memory in the evaluation at step 0: batches of 2 instead of 4 there" in out
    records, other = metrics(config.train.out), metrics(tmp_path / "other")
    shrunk = [r for r in records if r.get("event") == "out_of_memory"]
    if fits:
        assert [r["eval_batch"] for r in shrunk] == [2, 1]
        values, expected = ([r["val_loss"] for r in of if "val_loss" in r] for of in (records, other))
        assert values == pytest.approx(expected, rel=1e-6)  # of the same windows
    else:
        assert "out of memory: the evaluation at step 4 is left out (" in out
        assert [r.get("left_out") for r in shrunk[2:]] == ["the evaluation"] * 2
    losses, expected = ([r["loss"] for r in of if "loss" in r] for of in (records, other))
    assert losses == expected


def test_when_nothing_fits_any_more_the_run_is_saved_first(config, device, monkeypatch):
    real, steps = Stepper.__call__, []

    def step(self, *args):
        steps.append(args)
        if len(steps) > 3:
            raise NO_ROOM[1]
        return real(self, *args)

    monkeypatch.setattr(Stepper, "__call__", step)
    with pytest.raises(UserError, match=r"do not fit the GPU .*the last checkpoint is .*step-00000003$"):
        train(with_train(config, checkpoint_interval=0), device, quiet())
    assert checkpoint.load(resolve(config.train.out))["step"] == 3
    assert [r["step"] for r in metrics(config.train.out) if "loss" in r] == [1, 2, 3]


@pytest.mark.parametrize(
    ("before", "after"), [((16, 32), (8, 64)), ((3, 4), (1, 12)), ((5, 6), (2, 15)), ((1, 8), None), ((9, 1), (3, 3))]
)
def test_smaller_geometry_keeps_the_sequences_per_step(before, after):
    assert smaller(*before) == after


def test_a_full_disk_costs_neither_the_run_nor_the_old_checkpoint(config, device, monkeypatch, capsys):
    real, calls = saver.write, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(saver, "write", full)
    run, code = train(config, device)
    out = capsys.readouterr().out
    assert "was not saved: the disk of" in out and "step-00000004" in out
    assert code == 0 and run.step == 8
    # The save at step 8 failed at the end of the run: it is tried once more before the run gives up.
    assert [p.name for p in existing(config.train.out)] == ["step-00000004", "step-00000008"]


def test_an_out_that_is_deleted_on_the_way_is_said_and_the_run_is_saved(config, device, monkeypatch, capsys):
    real = Stepper.__call__

    def step(self, batches, grad_accum, lr, *rates):
        if lr == learning_rate(5, config.optim, 8):
            for thread in threading.enumerate():
                if thread.name == "checkpoint-4":  # it would write into the folder meanwhile
                    thread.join()
            shutil.rmtree(config.train.out)
        return real(self, batches, grad_accum, lr, *rates)

    monkeypatch.setattr(Stepper, "__call__", step)
    run, code = train(config, device)
    out = capsys.readouterr().out
    assert out.count(f"{config.train.out} was deleted or moved away while the run went on: it is begun anew") == 1
    assert (run.step, code) == (8, 0) and resolve(config.train.out).name == "step-00000008"
    assert (config.train.out / "config.json").exists() and metrics(config.train.out)[-1]["step"] == 8


def test_the_last_checkpoint_is_there_when_the_run_ends_or_it_is_saved_again(config, device, monkeypatch, capsys):
    real = saver.AsyncSaver.check

    def check(self):
        shutil.rmtree(config.train.out)
        real(self)

    monkeypatch.setattr(saver.AsyncSaver, "check", check)
    train(with_train(config, max_iters=2), device)
    assert resolve(config.train.out).name == "step-00000002"
    assert "is gone: it was deleted or moved away after it had been saved" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("place", ["metrics", "terminal"])
def test_metrics_and_terminal_on_a_full_disk_cost_lines_and_say_so_elsewhere(
    config, device, monkeypatch, capsys, place
):
    out = config.train.out
    if place == "metrics":
        out.mkdir()
        os.symlink("/dev/full", out / "metrics.jsonl")
        monkeypatch.setattr("fastgpt.checkpoints.folder.set_aside", lambda _: None)  # it would be an earlier run's
    with open("/dev/full" if place == "terminal" else os.devnull, "w") as stream, monkeypatch.context() as patch:
        if place == "terminal":
            patch.setattr(sys, "stdout", stream)
        run, code = train(config, device)
    assert (run.step, code) == (8, 0) and resolve(out).name == "step-00000008"
    if place == "metrics":
        said = capsys.readouterr().out
        assert said.count("metrics.jsonl cannot be written (the disk of") == 1
        assert re.search(r"metrics\.jsonl could not be written to the end; lines lost: \d\d\n", said)
    else:
        texts = [r["text"] for r in metrics(out) if r.get("event") == "output"]
        assert texts[0].startswith("the terminal cannot be written (No space left")
        assert len(texts) == 2 and re.fullmatch(
            r"the terminal could not be written to the end; lines lost: \d\d", texts[1]
        )


class OnDevice(torch.Tensor):
    """A number on a GPU that works off its queue when the host waits for it, and not before."""

    queue: ClassVar[list] = []
    waits: ClassVar[list] = []

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="cuda")

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.stack.default:
            return cls(torch.stack([part.held for part in args[0]]))
        assert func is torch.ops.aten._to_copy.default and kwargs["non_blocking"], f"the host waits in {func}"
        host = torch.full(args[0].shape, float("nan"))
        cls.queue.append(lambda: host.copy_(args[0].held))
        return host


class DeviceEvent:
    def record(self):
        self.place = len(OnDevice.queue)

    def synchronize(self):
        OnDevice.waits.append((self.place, len(OnDevice.queue)))
        for work in OnDevice.queue[: self.place]:
            work()


def test_the_host_waits_for_a_step_when_the_next_one_is_launched(config, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    monkeypatch.setattr(OnDevice, "queue", [])
    monkeypatch.setattr(OnDevice, "waits", [])
    real = Stepper.__call__

    def step(self, batches, grad_accum, lr, *momentum):
        loss, norm = real(self, batches, grad_accum, lr, *momentum)
        return OnDevice(loss), OnDevice(norm)

    config = with_train(config, eval_interval=0, log_interval=100, checkpoint_interval=0)
    expected, _ = train(with_train(config, out=config.train.out / "cpu"), device, quiet())
    monkeypatch.setattr(Stepper, "__call__", step)
    train(config, device, quiet())
    # (the step waited for, the steps launched): the first is logged, the last two are read at the end.
    assert OnDevice.waits == [(1, 1), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 8)]
    losses = [[r["loss"] for r in metrics(out) if "loss" in r] for out in (config.train.out, config.train.out / "cpu")]
    assert losses[0] == losses[1]


def test_the_best_checkpoint_stays_and_a_damaged_newest_is_passed_over(config, device, capsys):
    train(with_train(config, max_iters=12, keep_checkpoints=1), device, quiet())
    winner = best(config.train.out)
    assert winner is not None
    losses = {r["step"]: r["val_loss"] for r in metrics(config.train.out) if "val_loss" in r and r["step"]}
    assert winner[1] == min(losses.values())
    train(with_train(config, max_iters=14, keep_checkpoints=2, resume="newest"), device, quiet())
    newest = existing(config.train.out)[-1]
    with open(newest / "state.json", "r+b") as file:
        file.write(b"x")
    run, _ = train(with_train(config, max_iters=16, resume="newest"), device)
    out = capsys.readouterr().out
    assert f"{newest.name} is damaged" in out.replace("\n", "") and "resumed from" in out
    assert run.step == 16


def test_profile_writes_a_trace_of_three_steps_and_says_how_to_open_it(config, device, capsys):
    out = config.train.out
    train(with_train(config, profile=True, max_iters=6), device)
    assert f"{out}/trace.json.gz has 3 steps: open it in https://ui.perfetto.dev" in capsys.readouterr().out
    names = [
        event.get("name", "")
        for event in json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]
    ]
    assert sorted({name for name in names if name.startswith("ProfilerStep")}) == [
        f"ProfilerStep#{n}" for n in (2, 3, 4)
    ]
    assert any("mm" in name for name in names)
    (out / "trace.json.gz").unlink()
    (out / "trace.json.gz").mkdir()
    _, code = train(with_train(config, profile=True, max_iters=12, resume="newest"), device)
    assert code == 0 and "trace.json.gz cannot be written (" in capsys.readouterr().out
    train(with_train(config, profile=True, max_iters=13, resume="newest"), device)
    assert "there is no trace: it begins with the third step" in capsys.readouterr().out


def test_samples_and_resume_auto(config, device, capsys):
    auto = with_train(config, resume="auto", max_iters=4, sample_interval=2)
    train(auto, device)
    assert capsys.readouterr().out.count("sample at step") == 2
    run, _ = train(with_train(auto, max_iters=6), device)
    assert run.step == 6 and "resumed from" in capsys.readouterr().out
    before = contents(config.train.out / "step-00000006")
    run, code = train(with_train(auto, max_iters=6), device)  # nothing left to do: a script that restarts it stops
    assert (run.step, code) == (6, 0) and before == contents(config.train.out / "step-00000006")


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
    from fastgpt import common
    from fastgpt import train as train_module

    args, words = BAD[name]
    args = [arg.format(tmp=bad_data) for arg in args]
    monkeypatch.chdir(tmp_path)
    # Where there is a GPU, the presets' [cuda] sections would change shape and tokenizer.
    monkeypatch.setattr(sys, "argv", ["train.py", "--kernels", "eager", "--device", "cpu", *args])
    with pytest.raises(SystemExit) as exit:
        common.run(train_module.main)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_in_a_fresh_process(config, tmp_path):
    """``python train.py`` as a user calls it, interpreter and all, then ``python -m fastgpt.sample``."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = f"{sys.executable} train.py --n-embd 32 --n-layer 1 --block-size 16 --batch-size 2 --max-iters 3"
    command += f" --eval-iters 1 --device cpu --data {config.data.data} --out {tmp_path / 'out'}"
    result = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "interpreter" in result.stdout and "iter 3: loss" in result.stdout
    code, printed = processes.run("-m", "fastgpt.sample", tmp_path / "out", "--prompt", "def", "--tokens", "5")
    assert code == 0 and printed.startswith("def"), printed
