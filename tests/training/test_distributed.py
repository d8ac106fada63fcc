"""Two ranks (gloo, on the CPU) are one run: the same losses as one rank, checkpoints that move between them, and an end in one
sentence when a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoints import checkpoint, folder

ROOT = Path(__file__).parents[2]
SHAPE = "--n-embd 32 --n-head 2 --n-layer 2 --block-size 16 --batch-size 2 --grad-accum 4 --lr 1e-3 --warmup-iters 2"
QUIET = "--eval-iters 2 --eval-interval 10 --log-interval 1 --no-tensorboard --no-doctor --device cpu --data stdlib"


def command(ranks, out, *flags):
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, "train.py", "--kernels", "eager", *SHAPE.split(), *QUIET.split(), "--out", str(out), *flags]


def environment():
    # One thread per rank, and a port of the system's choice: other tests run beside this one.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train(ranks, out, *flags):
    result = subprocess.run(
        command(ranks, out, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = {r["step"]: r["loss"] for r in records if "step" in r and "loss" in r}
    val = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    return train, val


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twenty steps on one rank."""
    out = tmp_path_factory.mktemp("ranks") / "alone"
    train(1, out, "--max-iters", "20", "--checkpoint-interval", "10")
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_equal_one_and_their_checkpoints_move_between_them(alone, tmp_path, parallel):  # bugs 10, 12
    flags = ("--max-iters", "20", "--checkpoint-interval", "10", "--sample-interval", "20", "--parallel", parallel)
    stdout = train(2, tmp_path / "two", *flags)
    assert stdout.count("iter 20: loss") == 1 and stdout.count("sample at step 20") == 1  # rank 1 is silent
    expected, expected_val = losses(alone)
    got, got_val = losses(tmp_path / "two")
    assert list(got) == list(range(1, 21))
    for step in expected:
        assert got[step] == pytest.approx(expected[step], rel=1e-6), step
    assert got_val == pytest.approx(expected_val, rel=1e-6)

    one, two = (checkpoint.load(folder.resolve(path)) for path in (alone, tmp_path / "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["loader"] == two["loader"]  # the same windows were taken
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-4, atol=1e-6)

    # On: the pair's run on one rank, and the single rank's run on the pair.
    train(1, tmp_path / "two", "--max-iters", "22", "--resume")
    train(2, tmp_path / "one", "--max-iters", "22", "--parallel", parallel, "--resume", str(alone / "step-00000020"))
    a, b = losses(tmp_path / "two")[0], losses(tmp_path / "one")[0]
    assert [a[21], a[22]] == pytest.approx([b[21], b[22]], rel=1e-5)


def test_fused_adamw_on_shards_equals_fused_adamw_on_whole_parameters():
    """Uneven shards, clipping by the global norm, and a gradient that is not finite on one rank: skipped on all."""
    results = []
    for ranks in (1, 2):
        start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        flags = [] if ranks == 1 else ["--nproc-per-node", "2"]
        run = subprocess.run(
            [*start, *flags, "tests/training/sharded_steps.py"],
            cwd=ROOT,
            env={**environment(), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},  # whatever --device is
            capture_output=True,
            text=True,
            timeout=300,
        )
        line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
        assert run.returncode == 0 and line, run.stdout + run.stderr
        results.append(json.loads(line.removeprefix("RESULT ")))
    one, two = results
    assert (one["sharded"], two["sharded"]) == (False, True)
    assert one["skipped"] == two["skipped"] == 1
    for step, (a, b) in enumerate(zip(one["steps"], two["steps"])):
        assert a == pytest.approx(b, rel=1e-6, nan_ok=True), step
    assert two["moments"] == pytest.approx(one["moments"], rel=1e-5)
    assert two["weights"] == pytest.approx(one["weights"], rel=2e-5)


def interrupted(out, ready, number, *flags):
    """A run on two ranks without end; rank 1 gets a signal once ``ready()``. Returns its exit code and output."""
    process = subprocess.Popen(
        command(2, out, "--max-iters", "100000", "--eval-interval", "0", *flags),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(next(pid for pid in children(process.pid) if rank_of(pid) == "1"), number)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output
    finally:
        process.kill()


def test_a_rank_that_dies_ends_the_run_within_a_minute_and_one_rank_resumes_it(tmp_path):
    out = tmp_path / "run"
    code, output = interrupted(out, lambda: folder.existing(out), signal.SIGKILL, "--checkpoint-interval", "5")
    assert code != 0
    assert "another rank of this run is gone" in output and "--resume" in output, output
    step = checkpoint.load(folder.newest_valid(out)[0])["step"]
    train(1, out, "--max-iters", str(step + 1), "--resume")
    assert checkpoint.load(folder.resolve(out))["step"] == step + 1


def test_a_signal_to_one_rank_stops_and_saves_on_all(tmp_path):
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    code, output = interrupted(
        out, lambda: metrics.exists() and len(losses(out)[0]) >= 3, signal.SIGTERM, "--checkpoint-interval", "0"
    )
    assert code == 0, output
    assert "stopped by a signal to another rank" in output
    saved = checkpoint.load(folder.resolve(out))
    assert saved["world_size"] == 2 and saved["step"] == max(losses(out)[0])


def children(pid):
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def rank_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)


def test_micro_batches_that_do_not_divide_are_refused_in_one_sentence(tmp_path):
    result = subprocess.run(
        command(2, tmp_path / "run", "--grad-accum", "3"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert "grad_accum is 3, which 2 GPUs do not divide" in result.stderr
    assert f"{ROOT}/fastgpt/" not in result.stderr  # torchrun's own traceback is there, ours is not
    assert not (tmp_path / "run").exists()
