"""Each window once per epoch, over all ranks and files, resumed or not."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import TokenLoader, write_shard
from fastgpt.errors import UserError


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


def test_order_never_changes_between_versions(files):
    """A resumed run depends on it: raw PCG64 output and a stable sort are the same everywhere."""
    x, _ = TokenLoader(files(8 * 10 + 1), 8, 10, seed=7).next_batch()
    assert (x[:, 0] // 8).tolist() == [5, 2, 3, 9, 8, 1, 7, 6, 4, 0]


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
    assert _same(_take(resumed, 30), want) and resumed.epoch == loader.epoch


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


# bug 5: token offsets past 2**31 and byte offsets past 4 GiB.
@pytest.mark.parametrize("header", [False, True])
def test_files_past_4_gib(tmp_path, header):
    path = tmp_path / "train.bin"
    count = 2**31 + 12345
    tail = np.arange(5000, dtype="<u2")
    start = 1024 if header else 0
    with path.open("wb") as file:  # sparse: takes no room on the disk
        if header:
            file.write(np.array([20240520, 1, count], "<u4").tobytes())
        file.seek(start + 2 * (count - len(tail)))
        file.write(tail.tobytes())
    loader = TokenLoader([path], 4096, 1)
    [last] = loader.read(np.array([loader.windows - 1]))
    first = (loader.windows - 1) * 4096 - (count - 5000)
    assert last.tolist() == [max(t, 0) for t in range(first, first + 4097)]
    assert last[-1] > 0


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


def test_the_loader_is_no_bottleneck(files):
    """20M tokens/s on one core is asked for; it is some 700M, so that a busy machine cannot fail this."""
    loader = TokenLoader(files(65000), 1024, 16)
    loader.next_batch()
    begin = time.process_time()
    _take(loader, 200)
    assert 200 * 16 * 1024 / (time.process_time() - begin) > 20e6
