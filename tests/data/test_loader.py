"""Each window once per epoch, over all ranks and files, resumed or not."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt.data.loader as module
from fastgpt.common import UserError
from fastgpt.data.loader import TokenLoader
from tests.shards import write_shard


@pytest.fixture
def files(tmp_path):
    """Files of the given lengths; no token occurs twice in all of them, so that a token is its own address."""

    def make(*lengths):
        paths, start = [], 0
        for i, n in enumerate(lengths):
            paths.append(tmp_path / f"train_{i:06d}.bin")
            write_shard(paths[-1], np.arange(start, start + n))
            start += n
        return paths

    return make


def _take(loader, batches):
    return [torch.stack(loader.next_batch()) for _ in range(batches)]


def _same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_shapes_and_shift(files, device):
    x, y = TokenLoader(files(1000), 16, 4).next_batch(device)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 16)
    assert x.device.type == device.type and x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y, x + 1)


# bugs 6, 7: the targets of an epoch are the file's tokens, each once; fewer than block_size per file are left out.
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    block_size=st.integers(1, 20),
    world_size=st.integers(1, 3),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_every_window_once_per_epoch(tmp_path_factory, lengths, block_size, world_size, batch_size, seed):
    tmp, paths, start = tmp_path_factory.mktemp("epoch"), [], 0
    for i, n in enumerate(lengths):
        paths.append(tmp / f"{i}.bin")
        write_shard(paths[-1], np.arange(start, start + n))
        start += n
    windows = sum((n - 1) // block_size for n in lengths)

    def make(rank):
        return TokenLoader(paths, block_size, batch_size, seed=seed, rank=rank, world_size=world_size)

    if windows == 0:
        with pytest.raises(UserError, match="block_size"):
            make(0)
        return
    ranks = [make(rank) for rank in range(world_size)]
    assert ranks[0].windows == windows
    epochs = 2
    rows = []  # the targets of every window, in the order they are taken by all ranks
    while len(rows) < epochs * windows:
        for loader in ranks:
            rows += loader.next_batch()[1].tolist()
    for epoch in range(epochs):
        seen = Counter(t for row in rows[epoch * windows : (epoch + 1) * windows] for t in row)
        assert set(seen.values()) == {1}, "a target was seen twice in one epoch"
        start = 0
        for n in lengths:
            missing = set(range(start + 1, start + n)) - seen.keys()
            assert len(missing) == (n - 1) % block_size < block_size
            kept = sorted(seen.keys() & set(range(start, start + n)))
            assert kept == list(range(kept[0], kept[0] + len(kept))) if kept else True, "a hole inside a file"
            start += n


def test_whole_file_when_windows_fit(files):
    loader = TokenLoader(files(16 * 10 + 1), 16, 5)
    targets = torch.cat([y.flatten() for _, y in (loader.next_batch() for _ in range(2))])
    assert targets.sort().values.tolist() == list(range(1, 161))


# bug 6: what one epoch leaves out is not left out for ever.
def test_the_tail_is_seen_in_other_epochs(files):
    loader = TokenLoader(files(50), 16, 3)  # 49 targets, 48 per epoch
    per_epoch = [set(loader.next_batch()[1].flatten().tolist()) for _ in range(20)]
    assert {len(s) for s in per_epoch} == {48}
    assert set.union(*per_epoch) == set(range(1, 50))


# bug 8: the order differs by epoch and by seed, and repeats for the same seed.
def test_order_is_a_function_of_seed_and_epoch(files):
    paths = files(32 * 64 + 1)
    one = _take(TokenLoader(paths, 32, 64, seed=1), 3)
    assert _same(one, _take(TokenLoader(paths, 32, 64, seed=1), 3))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[1], one[2])
    assert not torch.equal(one[0], _take(TokenLoader(paths, 32, 64, seed=2), 1)[0])
    assert torch.equal(one[0].sort(dim=1).values, one[1].sort(dim=1).values), "the windows are the same"
    assert (one[0][0, 1:, 0] > one[0][0, :-1, 0]).float().mean() < 0.75, "the windows are shuffled"


def test_ranks_together_are_the_one_rank_run(files):
    paths = files(700, 300)
    whole = TokenLoader(paths, 8, 6, seed=3)
    ranks = [TokenLoader(paths, 8, 2, seed=3, rank=r, world_size=3) for r in range(3)]
    for _ in range(50):  # over two epochs
        parts = [r.next_batch() for r in ranks]
        x, y = whole.next_batch()
        assert torch.equal(x, torch.cat([p[0] for p in parts])) and torch.equal(y, torch.cat([p[1] for p in parts]))


# bugs 3, 4: N batches, save, resume, N batches = 2N batches, at any point of an epoch.
@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_resume_goes_on_at_the_very_next_window(files, n):
    paths = files(1000, 90)
    loader = TokenLoader(paths, 16, 4, seed=5)
    _take(loader, n)
    state = loader.state_dict()
    assert all(type(v) is int for v in state.values())
    want = _take(loader, 30)
    resumed = TokenLoader(paths, 16, 4, seed=999)
    resumed.next_batch()
    resumed.load_state_dict(state)
    assert _same(_take(resumed, 30), want) and resumed.position == loader.position


def test_resume_on_another_number_of_ranks(files):
    paths = files(1000)
    loader = TokenLoader(paths, 16, 4)
    _take(loader, 3)
    ranks = [TokenLoader(paths, 16, 2, rank=r, world_size=2) for r in range(2)]
    for r in ranks:
        r.load_state_dict(loader.state_dict())
    assert torch.equal(torch.cat([r.next_batch()[0] for r in ranks]), loader.next_batch()[0])


def test_state_of_other_data_is_refused(files):
    state = TokenLoader(files(1000), 16, 4).state_dict()
    with pytest.raises(UserError, match=r"windows 62 then, 31 now"):
        TokenLoader(files(500), 16, 4).load_state_dict(state)


def test_evaluation_is_the_same_every_time(files):
    loader = TokenLoader(files(1000, 500), 16, 4, seed=1)
    before = loader.state_dict()
    first = [torch.stack(b) for b in loader.eval_batches(5)]
    assert loader.state_dict() == before
    loader.next_batch()
    assert _same(first, [torch.stack(b) for b in loader.eval_batches(5)])
    assert [b.shape for b in first] == [(2, 4, 16)] * 5
    assert first[0].min() == 0 and first[-1].max() > 1000, "spread over all files"
    everything = torch.cat([y for _, y in loader.eval_batches(10**9)]).flatten()
    assert len(everything) == len(everything.unique()) == loader.windows // 4 * 4 * 16


def test_evaluation_over_ranks_and_with_little_data(files):
    paths = files(100)  # 6 windows of 16
    assert [x.shape for x, _ in TokenLoader(paths, 16, 8).eval_batches(3)] == [(6, 16)]
    whole = {int(x) for b in TokenLoader(paths, 16, 6).eval_batches(1) for x in b[0][:, 0]}
    parts = [
        {int(x) for b in TokenLoader(paths, 16, 8, rank=r, world_size=2).eval_batches(3) for x in b[0][:, 0]}
        for r in range(2)
    ]
    assert parts[0] | parts[1] == whole and not parts[0] & parts[1]


# bug 26: ids < vocab.
def test_ids_past_the_vocabulary_are_refused(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100))
    write_shard(tmp_path / "b.bin", np.array([*range(90), 256, 300]))
    TokenLoader([tmp_path / "a.bin", tmp_path / "b.bin"], 8, 2, vocab_size=301)
    with pytest.raises(UserError, match=r"b\.bin' holds the id 256 at token 90, and vocab_size is 256"):
        TokenLoader([tmp_path / "a.bin", tmp_path / "b.bin"], 8, 2, vocab_size=256)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block_size": 100}, r"100 tokens, fewer than block_size \+ 1 = 101"),
        ({"block_size": 0}, "block_size is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, r"rank is 2: it must be in 0\.\.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_one_sentence(files, arguments, message):
    with pytest.raises(UserError, match=message):
        TokenLoader(files(100), **{"block_size": 8, "batch_size": 2, **arguments})


def test_shards_too_short_for_a_window_are_passed_over(files):
    loader = TokenLoader(files(5, 17, 3), 16, 1)
    assert loader.windows == 1 and loader.next_batch()[1].flatten().tolist() == list(range(6, 22))


# bugs 3, 4: the thread is ahead of the training, and the state is not.
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_the_state_does_not_depend_on_how_far_the_thread_is(files, monkeypatch, prefetch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 3 * 4 * 16)  # blocks of three batches
    paths = files(1000, 700)
    monkeypatch.setattr(module, "PREFETCH", 0)
    plain = TokenLoader(paths, 16, 4, seed=5)
    want = [(_take(plain, 1), plain.state_dict()) for _ in range(50)]  # over epochs and blocks
    monkeypatch.setattr(module, "PREFETCH", prefetch)
    ahead = TokenLoader(paths, 16, 4, seed=5)
    for batch, state in want[:40]:
        assert _same(batch, _take(ahead, 1)) and ahead.state_dict() == state
    resumed = TokenLoader(paths, 16, 4)
    resumed.next_batch()
    resumed.load_state_dict(ahead.state_dict())
    assert _same(_take(resumed, 10), [batch for [batch], _ in want[40:]])


def test_a_state_of_the_spines_order_is_taken_at_its_position(files):
    loader = TokenLoader(files(1000), 16, 4)
    loader.load_state_dict({"position": 8, "seed": 3, "windows": 62, "block_size": 16})
    assert loader.state_dict() == {"position": 8, "seed": 3, "windows": 62, "block_size": 16, "order": 2}


def test_memory_is_pinned_for_a_gpu_only(monkeypatch):
    empty, pinned = torch.empty, []

    def recording(*args, pin_memory, **kwargs):
        if threading.current_thread() is threading.main_thread():  # a loader that another test left open goes on
            pinned.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(module.torch, "empty", recording)
    rows = np.arange(24, dtype=np.uint16).reshape(4, 6)
    for name in ("cpu", "cuda"):
        x, y = module._to_block(rows, 2, torch.device(name))
        assert x.shape == y.shape == (2, 2, 5) and torch.equal(x[..., 1:], y[..., :-1])
    assert pinned == [False, True]


class _Broken(RuntimeError):
    pass


def test_an_error_in_the_thread_reaches_the_caller_and_loses_no_window(files, monkeypatch):
    paths = files(2000)
    monkeypatch.setattr(module, "BLOCK_TOKENS", 1)
    want = _take(TokenLoader(paths, 16, 4), 5)
    loader = TokenLoader(paths, 16, 4)
    got = _take(loader, 2)
    in_order = loader._windows.in_order

    def fails_once(positions, seed):
        if positions[0] == 4 * 4:  # the fifth batch
            monkeypatch.setattr(loader._windows, "in_order", in_order)
            raise _Broken("Input/output error in train_000000.bin")
        return in_order(positions, seed)

    loader.load_state_dict(loader.state_dict())  # forgets what the thread has made
    monkeypatch.setattr(loader._windows, "in_order", fails_once)
    got += _take(loader, 2)
    with pytest.raises(_Broken, match=r"Input/output error in train_000000\.bin"):
        loader.next_batch()
    assert _same([*got, *_take(loader, 1)], want)


def _threads(but=()):
    return [t for t in threading.enumerate() if t.name.startswith("tokens") and t not in but]


def test_close_ends_the_thread_and_so_does_forgetting_the_loader(files):
    paths = files(1000)
    earlier = _threads()  # of tests before this one: they may end at any moment
    loader = TokenLoader(paths, 16, 4)
    assert not _threads(earlier), "no thread before it is needed"
    first = _take(loader, 1)
    assert len(_threads(earlier)) == 1
    loader.close()
    loader.close()
    assert not _threads(earlier)
    loader.load_state_dict({**loader.state_dict(), "position": 0})
    assert _same(_take(loader, 1), first), "usable again"
    del loader
    gc.collect()
    deadline = time.monotonic() + 10
    while _threads(earlier) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _threads(earlier)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
def test_a_program_with_a_running_loader_ends_and_a_fork_of_it_reads_on(files):
    """In a process of its own: no hang at the exit, without close(); and in a forked child, which has no thread."""
    program = (
        "import os, sys\n"
        "from fastgpt.data.loader import TokenLoader\n"
        "loader = TokenLoader(sys.argv[1:], 16, 4)\n"
        "loader.next_batch()\n"
        "if (pid := os.fork()) == 0:\n"
        "    print('child', int(loader.next_batch()[0][0, 0]), flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print('parent', int(loader.next_batch()[0][0, 0]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, files(1000))]
    done = subprocess.run(command, env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.split("\n")[:2]
    assert child.removeprefix("child") == parent.removeprefix("parent")


# bug 9: what attention needs to stay inside a document.
def test_document_ids_count_end_of_text(tmp_path):
    tokens = np.array([9, 1, 2, 9, 3, 4, 5, 9, 9, 6, 7, 8, 1], np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    loader = TokenLoader([tmp_path / "a.bin"], 6, 2, eot=9)
    x, y, ids = loader.next_batch()
    assert ids.dtype == torch.int32 and ids.shape == x.shape == y.shape == (2, 6)
    by_first = {tuple(row): i.tolist() for row, i in zip(x.tolist(), ids)}
    assert by_first == {(9, 1, 2, 9, 3, 4): [1, 1, 1, 2, 2, 2], (5, 9, 9, 6, 7, 8): [0, 1, 2, 2, 2, 2]}
    [(x, _, ids)] = loader.eval_batches(1)
    assert ids.tolist() == [by_first[tuple(row)] for row in x.tolist()]


def test_ranks_have_equal_batches_and_resume_on_fewer_of_them(files):
    """Four ranks, then two, then one: no window twice in the epoch, none left out."""
    paths = files(16 * 64 + 1)
    seen, state = [], None
    for world_size, steps in ((4, 3), (2, 5), (1, 6)):
        ranks = [TokenLoader(paths, 16, 3, rank=r, world_size=world_size) for r in range(world_size)]
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(steps):
            for loader in ranks:
                x, _ = loader.next_batch()
                assert len(x) == 3
                seen += (x[:, 0] // 16).tolist()
        assert len({tuple(loader.state_dict().items()) for loader in ranks}) == 1
        state = ranks[0].state_dict()
    assert sorted(seen[:64]) == list(range(64)) and state["position"] == len(seen) == 84
