"""The order of an epoch is a permutation without a table, and never another; windows are where they are said to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.windows import ROUNDS, Windows, permute
from tests.shards import write_shard


def _keys(seed):
    return np.random.PCG64(seed).random_raw(ROUNDS)


@settings(deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_every_number_once(n, seed):
    assert sorted(permute(np.arange(n), n, _keys(seed)).tolist()) == list(range(n))


@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**32))
def test_any_size_stays_inside(n, seed):
    index = np.unique(np.array([0, n // 3, n - 1], np.int64))
    out = permute(index, n, _keys(seed))
    assert out.min() >= 0 and out.max() < n and len(set(out.tolist())) == len(index)


@pytest.mark.parametrize("n", [3, 10, 31])
def test_every_place_is_equally_likely(n):
    """Chi-squared of where each number goes, over 2000 keys: its mean is its degrees of freedom, (n - 1)**2."""
    trials = 2000
    all_of = np.stack([permute(np.arange(n), n, _keys(seed)) for seed in range(trials)])
    counts = np.stack([np.bincount(column, minlength=n) for column in all_of.T])
    freedom = (n - 1) ** 2
    chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum()
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)
    neighbours = (np.diff(all_of, axis=1) == 1).mean()  # n - 1 of the n * (n - 1) ordered pairs
    assert abs(neighbours - 1 / n) < 5 * np.sqrt(1 / n / (trials * (n - 1)))


# bug 8 and resume: a run depends on it.
def test_the_order_never_changes_between_versions(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(8 * 10 + 1))
    rows = Windows([tmp_path / "a.bin"], 8).in_order(np.arange(20), seed=7)
    assert (rows[:, 0] // 8).tolist() == [0, 5, 3, 4, 9, 8, 1, 6, 2, 7, 3, 5, 4, 7, 2, 6, 8, 0, 9, 1]


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
    windows = Windows([path], 4096)
    [last] = windows.read(np.array([windows.count - 1]))
    first = (windows.count - 1) * 4096 - (count - 5000)
    assert last.tolist() == [max(t, 0) for t in range(first, first + 4097)]
    assert last[-1] > 0
    [where] = np.flatnonzero(
        permute(np.arange(windows.count), windows.count, windows._epoch(0, 0)[0]) == windows.count - 1
    )
    assert windows.in_order(np.array([where]), seed=0)[0].max() > 0, "the shuffle reaches the end"
