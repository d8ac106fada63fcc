"""bench.compare: what counts as a change, and what cannot be compared."""

from __future__ import annotations

import json
import re

import pytest

from bench import compare
from bench.reports import results
from fastgpt.common import UserError

ENVIRONMENT = {"device": "RTX 4070", "commit": "aaaa1111", "time": "2026-01-01", "torch": "2.13.0", "driver": "580.1"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_RESULTS", str(tmp_path))


def store(label, entries, **environment):
    return results.store("kernels", ENVIRONMENT | environment, entries, label)


def timing(ms, iqr_ms=0.0, **more):
    return {"ms": ms, "iqr_ms": iqr_ms, "runs": 9, **more}


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (timing(1.0), timing(0.9), "faster"),
        (timing(1.0), timing(1.1), "slower"),
        (timing(1.0), timing(1.009), "same"),  # below the floor
        (timing(1.0, 0.2), timing(1.15, 0.1), "same"),  # 0.15 apart, and half the spreads is 0.15
        (timing(1.0, 0.2), timing(1.16, 0.1), "slower"),
        (timing(1.0), {"error": "parity"}, "no figure"),
        ({"error": "parity"}, timing(1.0), "no figure"),
        (None, timing(1.0), "only in B"),
        (timing(1.0), None, "only in A"),
    ],
)
def test_a_change_is_one_beyond_the_spread_and_one_percent(old, new, verdict):
    a, b = ({"entries": {} if entry is None else {"x": entry}} for entry in (old, new))
    (row,) = compare.changes(a, b)
    assert row["verdict"] == verdict
    both = old and new and "ms" in old and "ms" in new
    assert row["ratio"] == (pytest.approx(new["ms"] / old["ms"]) if both else None)


def test_the_table_shows_both_ratio_verdict_memory_and_what_else_differs(capsys):
    store("before", {"norm": timing(0.4, 0.001, peak_memory=2**30), "gone": timing(1.0), "loss": timing(2.0)})
    after = {"norm": timing(0.3, 0.001, peak_memory=2**29), "loss": {"error": "no speed: failed"}}
    store("after", after, commit="bbbb2222", torch="2.14.0")
    assert compare.main(["before", "after"]) == 0
    printed = capsys.readouterr().out
    assert "A: RTX 4070, commit aaaa1111 (before)" in printed and "B: RTX 4070, commit bbbb2222 (after)" in printed
    assert "also different: torch: 2.13.0 -> 2.14.0" in printed and "driver" not in printed
    norm = next(line for line in printed.splitlines() if "norm" in line)
    assert re.split(r"\s{2,}", norm.strip()) == [
        "norm",
        "0.4",
        "0.001",
        "0.3",
        "0.001",
        "0.750",
        "1,074 -> 537",
        "faster",
    ]
    assert "only in A" in printed and "loss, B: no speed: failed" in printed and "1 faster, 0 slower, 0 same" in printed


def test_json_has_every_entry(capsys):
    store("before", {"norm": timing(0.4)})
    store("after", {"norm": timing(0.3)}, commit="bbbb2222")
    assert compare.main(["aaaa1111", "bbbb2222", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["a"]["commit"], found["b"]["commit"]) == (1, "aaaa1111", "bbbb2222")
    assert found["entries"] == [
        {"name": "norm", "old": timing(0.4), "new": timing(0.3), "ratio": pytest.approx(0.75), "verdict": "faster"}
    ]


def test_of_several_measurements_of_a_commit_the_last_counts():
    store(None, {"norm": timing(0.5), "loss": timing(2.0)}, time="2026-01-02")
    store(None, {"norm": timing(0.4)}, time="2026-01-03")
    store(None, {"norm": timing(0.9)}, time="2026-01-01")
    assert compare.measurement("aaaa")["entries"] == {"norm": timing(0.4), "loss": timing(2.0)}


def test_different_devices_are_refused_unless_asked_for(capsys):
    store("a", {"norm": timing(0.4)})
    store("b", {"norm": timing(0.1)}, device="H100")
    with pytest.raises(UserError, match=r"A was measured on RTX 4070 and B on H100, .*: measure both on one device"):
        compare.main(["a", "b"])
    assert compare.main(["a", "b", "--across-devices"]) == 0
    assert "warning: A is RTX 4070, B is H100: this compares devices, not code" in capsys.readouterr().err


def test_a_commit_measured_on_several_devices_needs_one_named(capsys):
    store(None, {"norm": timing(0.4)})
    store(None, {"norm": timing(0.1)}, device="H100")
    with pytest.raises(UserError, match="'aaaa1111' was measured on H100, RTX 4070: say which with --device"):
        compare.main(["aaaa1111", "aaaa1111"])
    assert compare.main(["aaaa1111", "aaaa1111", "--device", "h100"]) == 0
    assert "0.1" in capsys.readouterr().out
    with pytest.raises(UserError, match="device is 'mi300', and 'aaaa1111' was measured on none"):
        compare.main(["aaaa1111", "aaaa1111", "--device", "mi300"])


def test_a_corrupt_file_is_one_sentence(tmp_path):
    good = store("good", {})
    (tmp_path / "bad.json").write_text('{"schema": "fastgpt.be')
    with pytest.raises(UserError, match=r"bad\.json is damaged: it is not JSON; measure again"):
        compare.main([str(good), str(tmp_path / "bad.json")])
