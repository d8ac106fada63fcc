"""Two ranks (gloo, on the CPU) are one run: the same losses as one rank, checkpoints that move between them, and an end in one
sentence when they disagree, or one dies or stops."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastgpt.checkpoints import checkpoint, folder, lock
from fastgpt.common import UserError
from fastgpt.config import load_preset, parse
from fastgpt.model import GPT
from fastgpt.performance import fitting
from fastgpt.training import distributed
from fastgpt.training.distributed import World
from fastgpt.training.run import ResumePoint, agree, build, build_loaders, choose_geometry
from tests import processes
from tests.shards import write_shard

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BASE = {
    **{"--kernels": "eager", "--device": "cpu", "--data": "stdlib"},
    **{
        "--n-embd": "32",
        "--n-head": "2",
        "--n-layer": "2",
        "--block-size": "16",
        "--batch-size": "2",
        "--grad-accum": "4",
    },
    **{"--lr": "1e-3", "--warmup-iters": "2", "--eval-iters": "2", "--eval-interval": "10", "--log-interval": "1"},
}


def words(out, *flags):
    base = itertools.chain(*(pair for pair in BASE.items() if pair[0] not in flags))
    return ["train.py", *base, "--no-tensorboard", "--no-doctor", "--out", str(out), *flags]


def all_print(commands):
    """What they print, when they have all ended well."""
    output = "".join(command.communicate(300) for command in commands)
    assert {command.returncode for command in commands} == {0}, output
    return output


def train(ranks, out, *flags):
    with processes.ranks(*[words(out, *flags)] * ranks) as commands:
        return all_print(commands)


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


def test_the_optimizers_on_two_ranks_are_what_they_are_on_one():
    """Uneven shards, clipping by the global norm, and a gradient that is not finite on one rank: skipped on all."""
    results = []
    for ranks in (1, 2):
        with processes.ranks(*[["-m", "tests.training.sharded_steps"]] * ranks) as commands:
            output = all_print(commands)
        results.append(json.loads(re.search("^RESULT (.*)", output, re.MULTILINE)[1]))
    for name in results[0]:
        one, two = (result[name] for result in results)
        assert (one["sharded"], two["sharded"]) == (False, "fsdp" in name)
        assert one["skipped"] == two["skipped"] == 1
        for step, (a, b) in enumerate(zip(one["steps"], two["steps"])):
            assert a == pytest.approx(b, rel=1e-6, nan_ok=True), (name, step)
        assert two["moments"] == pytest.approx(one["moments"], rel=1e-5)
        assert two["weights"] == pytest.approx(one["weights"], rel=2e-5)


def wait(ready):
    deadline = time.monotonic() + 120
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.2)


def test_a_rank_that_dies_ends_the_run_within_a_minute_and_one_rank_resumes_it(tmp_path):
    """Under torchrun, which ends with an error of its own."""
    out = tmp_path / "run"
    flags = ("--max-iters", "100000", "--eval-interval", "0", "--checkpoint-interval", "5")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*torchrun, *words(out, *flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait(lambda: folder.existing(out))
        os.kill(next(pid for pid in children(process.pid) if rank_of(pid) == "1"), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    code = process.returncode
    assert code != 0
    assert "of this run is gone" in output and "--resume" in output, output
    step = checkpoint.load(folder.newest_valid(out)[0])["step"]
    train(1, out, "--max-iters", str(step + 1), "--resume")
    assert checkpoint.load(folder.resolve(out))["step"] == step + 1


def test_a_signal_to_one_rank_stops_and_saves_on_all(tmp_path):
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    flags = words(out, "--max-iters", "100000", "--eval-interval", "0", "--checkpoint-interval", "0")
    with processes.ranks(flags, flags) as commands:
        wait(lambda: metrics.exists() and len(losses(out)[0]) >= 3)
        os.kill(commands[1].pid, signal.SIGTERM)
        output = all_print(commands)
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
    flags = words(tmp_path / "run", "--grad-accum", "3")
    with processes.ranks(flags, flags) as commands:
        for command in commands:
            assert command.communicate().startswith("error: grad_accum is 3, which 2 GPUs do not divide")
            assert command.returncode == 2
    assert not (tmp_path / "run").exists()


# ---- ranks that disagree


def on_each_rank(work):
    """What ``work(world)`` returns or raises on each of two ranks: threads with a store between them."""
    store, found = dist.HashStore(), [None, None]

    def one(rank):
        try:
            found[rank] = work(World(rank, 2, store.clone()))
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@cache
def demo():
    return parse([], "cpu")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--n-layer 3", "n_layer is 2 on rank 0 and 3 on rank 1"),
        ("--lr 2e-3", "lr is 0.005 on rank 0 and 0.002 on rank 1"),
        ("--seed 7", "seed is 1337 on rank 0 and 7 on rank 1"),
        ("--batch-size 3", "batch_size is 8 on rank 0 and 3 on rank 1"),
        ("--grad-accum 2", "grad_accum is 1 on rank 0 and 2 on rank 1"),
        ("--data corpus", "data is 'stdlib' on rank 0 and 'corpus' on rank 1"),
        ("--precision fp16", "precision is 'auto' on rank 0 and 'fp16' on rank 1"),
        ("--max-iters 3", "max_iters is 50 on rank 0 and 3 on rank 1"),
        ("--eval-interval 3", "eval_interval is 25 on rank 0 and 3 on rank 1"),
        ("--checkpoint-interval 3", "checkpoint_interval is 25 on rank 0 and 3 on rank 1"),
        ("--log-interval 3", "log_interval is 5 on rank 0 and 3 on rank 1"),
        ("--resume auto", "resume is None on rank 0 and 'auto' on rank 1"),
        ("--kernels eager", "kernels is 'triton' on rank 0 and 'eager' on rank 1"),
        ("--device cuda", "device is 'auto' on rank 0 and 'cuda' on rank 1"),
    ],
)
def test_every_rank_names_the_first_setting_that_differs(flags, sentence):
    configs = demo(), parse(flags.split(), "cpu")
    said = f"the ranks of this run disagree: {sentence}: start every rank with the same command and the same files"
    assert on_each_rank(lambda world: agree(world, configs[world.rank], CPU)) == [said, said]


def test_ranks_that_agree_go_on_and_a_checkpoint_that_one_does_not_see_is_named(tmp_path):
    config = demo()
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000010" / "manifest.json").write_text("{}")
    seen = ResumePoint(tmp_path / "step-00000010", {}, []).fingerprint
    assert on_each_rank(lambda world: agree(world, config, CPU, checkpoint=seen)) == [None, None]
    one, two = on_each_rank(lambda world: agree(world, config, CPU, checkpoint=None if world.rank else seen))
    assert one == two and "checkpoint is 'step-00000010, sha256 44136fa355b3' on rank 0 and None on rank 1" in one


def test_token_files_that_differ_are_named(tmp_path):
    def loaders(folders, world):  # one path on two machines: here each rank has its own
        config = parse(["--data", str(folders[world.rank]), "--block-size", "16"], "cpu")
        return build_loaders(config, world, 2)

    one, shorter, described = folders = [tmp_path / name for name in ("one", "shorter", "described")]
    for place in folders:
        place.mkdir()
        for side in ("train", "val"):
            tokens = 900 if (place, side) == (shorter, "val") else 1000
            write_shard(place / f"{side}.bin", np.ones(tokens, np.uint16))
    (described / "manifest.json").write_text('{"seed": 1}')
    for other, first in (
        (shorter, "validation data is '1 files of 3,024 bytes"),
        (described, "training data is '1 files"),
    ):
        said = on_each_rank(partial(loaders, [one, other]))
        assert said[0] == said[1] and f"disagree: {first}" in said[0]
    for loader in itertools.chain(*on_each_rank(partial(loaders, [one, one]))):
        loader.close()


def test_weights_to_begin_with_that_differ_are_named():
    """One path on two machines: under FSDP each rank's shards were its own file's."""
    config = parse(["--grad-accum", "2"], "cpu")
    ours = GPT(config.model).state_dict()
    theirs = {**ours, "transformer.ln_f.weight": ours["transformer.ln_f.weight"] + 1e-6}

    def work(world):
        return build(config, CPU, world, (ours, theirs)[world.rank])

    one, two = on_each_rank(work)
    assert one == two and one.startswith("the ranks of this run disagree: weights of init_from is 'sha256 ")


def test_the_ranks_plan_with_the_smallest_free_memory(monkeypatch):
    """Rank 0 has room, rank 1 has not: both refuse, or choose alike."""
    config, cuda = load_preset("gpt2-124m", "cuda"), torch.device("cuda")
    free = threading.local()
    monkeypatch.setattr(fitting, "free_bytes", lambda kind: free.bytes)

    def work(world, data):
        free.bytes = (24, 6)[world.rank] * 10**9
        return choose_geometry(replace(config, data=replace(config.data, **data)), cuda, world).data.batch_size

    one, two = on_each_rank(lambda world: work(world, {"auto_batch": True}))
    assert one == two == fitting.fit_batch(config, 6 * 10**9, 2)[0] < fitting.fit_batch(config, 24 * 10**9, 2)[0]
    one, two = on_each_rank(lambda world: work(world, {"batch_size": 32, "grad_accum": 16}))
    assert one == two and "of the 6.0 GB free" in one


def test_a_rank_that_was_stopped_ends_the_others(tmp_path):
    out = tmp_path / "run"
    flags = (out, "--max-iters", "100000", "--checkpoint-interval", "5", "--eval-interval", "0", "--rank-timeout", "9")
    with processes.ranks(words(*flags), words(*flags)) as (own, other):
        wait(lambda: folder.existing(out))
        os.kill(other.pid, signal.SIGSTOP)
        output = own.communicate(60)
    assert own.returncode == 2
    assert "error: rank 1 of this run is gone (no sign of life for 9 s, --rank-timeout), so rank 0 stops" in output


def test_ranks_that_disagree_end_in_one_sentence_each_and_move_nothing(alone):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    with processes.ranks(words(alone, "--lr", "1e-3"), words(alone, "--lr", "2e-3")) as commands:
        outputs = [command.communicate() for command in commands]
    assert [command.returncode for command in commands] == [2, 2]
    for output in outputs:
        assert output.splitlines() == [
            "error: the ranks of this run disagree: lr is 0.001 on rank 0 and 0.002 on rank 1: start every rank with the same "
            "command and the same files"
        ]
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


def test_all_ranks_are_told_that_the_folder_is_in_use(alone):
    with lock.held(alone), processes.ranks(words(alone), words(alone)) as commands:
        [one], [two] = (command.communicate().splitlines() for command in commands)
    assert [command.returncode for command in commands] == [2, 2]
    assert one.startswith(f"error: out is {alone}, where process {os.getpid()} on ")
    assert two == f"error: rank 0 stopped, and with it rank 1: {one.removeprefix('error: ')}"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "5"}, "RANK is '5' in the environment: it must be a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1' in the environment"),
        ({"RANK": None}, "RANK is not set but WORLD_SIZE is: start with torchrun, or unset WORLD_SIZE"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set but WORLD_SIZE is"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2' in the environment"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment: it must be a whole number from 1 to 65535"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
        ({"WORLD_SIZE": None, "RANK": "1"}, "RANK is '1' in the environment: it must be a whole number from 0 to 0"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set but WORLD_SIZE is"),
        (
            {"MASTER_PORT": "70000"},
            "MASTER_PORT is '70000' in the environment: it must be a whole number from 1 to 65535",
        ),
    ],
)
def test_a_place_among_the_ranks_that_cannot_be_is_refused(monkeypatch, variables, sentence):
    torchrun = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**torchrun, **variables}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(sentence)), distributed.connect(CPU):
        pass


def test_a_rank_that_nobody_answers_says_so(monkeypatch):
    for name, value in {
        "WORLD_SIZE": 2,
        "RANK": 1,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(UserError, match=r"^rank 1 cannot join the other 1 at 127\.0\.0\.1:1 \("),
        distributed.connect(CPU, 0.1),
    ):
        pass
