"""Signs of life: a rank that stops, dies or fails ends the others in a sentence; one that is slow to start or done does not."""

from __future__ import annotations

import json
import threading

import pytest
import torch.distributed as dist

from fastgpt.checkpoints.lock import this_process
from fastgpt.training import watch
from fastgpt.training.watch import Watch


def watches(end=lambda sentence: None, patience=5.0, pulse=1.0, ranks=2):
    store = dist.HashStore()
    return store, [Watch(store, rank, ranks, patience, end, pulse) for rank in range(ranks)]


def looks(own, times, beat=None):
    """What ``times`` looks of a rank find, while the rank ``beat`` lives; without its thread: no clock, no waiting."""
    found = []
    for _ in range(times):
        if beat is not None:
            beat._store.add(f"alive/{beat.rank}", 1)
        found.append(own.reason())
    return found


@pytest.fixture
def pair(monkeypatch):
    """Two ranks of which nobody can know whether their process runs: as on two machines. Their threads have ended."""
    monkeypatch.setattr(watch, "is_running", lambda process: None)
    store, both = watches()
    for each in both:
        each.stop()
    return store, *both


def test_a_rank_that_was_stopped_is_given_up_after_the_patience(pair):
    _, own, other = pair
    assert looks(own, 20, beat=other) == [None] * 20
    *before, last = looks(own, 5)
    assert before == [None] * 4
    assert last.startswith(
        "rank 1 of this run is gone (no sign of life for 5 s, --rank-timeout), so rank 0 stops: start"
    )


def test_a_rank_that_was_silent_for_a_while_is_forgiven(pair):
    _, own, other = pair
    for _ in range(3):
        assert looks(own, 1, beat=other) + looks(own, 4) == [None] * 5


def test_a_rank_that_never_comes_is_not_waited_for_longer(pair):
    """Seen: one that ended with exit code 0 before it joined, for 300 s."""
    _, own, _ = pair
    *before, last = looks(own, 5)
    assert before == [None] * 4 and "no sign of life for 5 s" in last


def test_a_rank_that_has_done_its_work_is_not_missed(pair):
    _, own, other = pair
    looks(own, 1, beat=other)
    other._store.set("left/1", "")
    assert looks(own, 100) == [None] * 100


def test_a_rank_whose_process_has_ended_is_noticed_at_once():
    store, (own, other) = watches(patience=60.0)
    own.stop(), other.stop()
    assert looks(own, 20) == [None] * 20  # silent, but its process, this one, runs
    store.set("who/1", json.dumps({**this_process(), "started": 1.0}))
    assert looks(own, 1)[0].startswith("rank 1 of this run is gone (its process has ended), so rank 0 stops")


def test_every_rank_ends_with_the_reason_of_the_one_that_fails():
    said, both = [], threading.Semaphore(0)
    _, (own, *others) = watches(lambda sentence: (said.append(sentence), both.release()), pulse=0.01, ranks=3)
    own.stop()
    own.fail("the data is missing")
    for _ in others:
        assert both.acquire(timeout=60)
    assert sorted(said) == [f"rank 0 stopped, and with it rank {rank}: the data is missing" for rank in (1, 2)]


@pytest.mark.parametrize("failing", [0, 1])
def test_rank_0_which_may_hold_the_store_leaves_last(monkeypatch, failing):
    """Seen: the other rank still asked the store, and printed a page of C++ trace behind its sentence."""
    ended = []
    _, both = watches(pulse=0.01)
    for each in both:
        each.stop()
    monkeypatch.setattr(watch, "is_running", lambda process: ended.append(1) or len(ended) < 8)
    both[1 - failing]._store.set(f"told/{1 - failing}", "")
    both[failing].fail("the data is missing")
    assert bool(ended) == (failing == 0)
    assert "the data is missing" in both[1 - failing].reason()
    assert len(ended) >= 8


def test_ranks_wait_for_each_other_at_the_end():
    said = []
    _, (own, other) = watches(said.append, patience=60, pulse=0.01)
    own.stop()
    left = threading.Thread(target=own.leave)
    left.start()
    assert left.is_alive()
    other.stop()
    other.leave()
    left.join(60)
    assert not left.is_alive() and not said


def test_a_store_that_is_gone_ends_the_run(pair, monkeypatch):
    _, own, _ = pair

    class Gone:
        def __getattr__(self, name):
            raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(own, "_store", Gone())
    assert own.reason().startswith("the process that connects the ranks of this run is gone, so rank 0 stops")
    own.fail("a reason"), own.leave()  # nobody is left to tell, and nothing is raised


def test_a_store_that_does_not_answer_ends_the_run(monkeypatch):
    said, asked = [], threading.Event()
    monkeypatch.setattr(Watch, "reason", lambda self: asked.wait(60) and None)
    _, (own, _) = watches(lambda sentence: (said.append(sentence), asked.set()), patience=0.01, pulse=0.01)
    assert asked.wait(60)
    own.stop()
    assert said[0].startswith("the process that connects the ranks of this run is gone, so rank")
