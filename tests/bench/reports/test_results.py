"""The store of measurements: nothing is ever overwritten, and what is damaged is said to be."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.reports import results
from fastgpt.common import UserError

ENVIRONMENT = {"device": "NVIDIA GeForce RTX 4070", "commit": "bec0e0ff0810", "time": "2026-01-01T00:00:00+00:00"}
ENTRIES = {"layer_norm | triton": {"ms": 0.3, "iqr_ms": 0.01, "runs": 40}, "loss | triton": {"error": "no speed"}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def test_what_is_stored_is_loaded_again(folder):
    path = results.store("kernels", ENVIRONMENT, ENTRIES, "before")
    assert path == folder / "nvidia-geforce-rtx-4070" / "bec0e0ff0810-kernels.json"
    found = results.load(path)
    assert (found["kind"], found["label"], found["schema_version"]) == ("kernels", "before", 1)
    assert found["environment"] == ENVIRONMENT and found["entries"] == ENTRIES


def test_a_second_measurement_gets_a_file_of_its_own(folder):
    first = results.store("kernels", ENVIRONMENT, ENTRIES)
    text = first.read_text()
    names = [results.store("kernels", ENVIRONMENT, {}).name for _ in range(2)]
    assert names == ["bec0e0ff0810-kernels-2.json", "bec0e0ff0810-kernels-3.json"] and first.read_text() == text


def test_many_at_once_lose_nothing(folder):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: results.store("suite", ENVIRONMENT, {f"{i}": {"error": ""}}), range(24)))
    assert len(set(paths)) == 24
    assert {name for path in paths for name in results.load(path)["entries"]} == {str(i) for i in range(24)}
    assert not list(folder.glob("*/*.tmp"))


def test_the_key_is_device_and_commit(folder):
    changed = results.store("suite", ENVIRONMENT | {"commit": "bec0e0ff0810+", "device": "AMD EPYC 7B13"}, ENTRIES)
    outside = results.store("suite", ENVIRONMENT | {"commit": None}, ENTRIES)
    assert changed == folder / "amd-epyc-7b13" / "bec0e0ff0810+-suite.json"
    assert outside.name == "no-commit-suite.json"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTGPT_RESULTS", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"results cannot be stored in .*: set FASTGPT_RESULTS"):
        results.store("suite", ENVIRONMENT, ENTRIES)


WHOLE = {"schema": "fastgpt.bench", "schema_version": 1, "kind": "suite", "label": None, "environment": ENVIRONMENT}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "is damaged: it is not JSON"),
        (json.dumps(WHOLE | {"entries": ENTRIES})[:-9], "is damaged: it is not JSON"),
        ("[1, 2]", "is not a results file of bench"),
        ('{"schema": "fastgpt.mfu"}', "is not a results file of bench: schema is not 'fastgpt.bench'"),
        (json.dumps(WHOLE | {"schema_version": 9, "entries": {}}), "has schema_version 9: this version reads 1"),
        (json.dumps(WHOLE), "is damaged: environment or entries"),
        (json.dumps(WHOLE | {"entries": {"a": {"ms": "fast", "iqr_ms": 0}}}), "is damaged: environment or entries"),
        (json.dumps(WHOLE | {"entries": {"a": {"ms": 0, "iqr_ms": 0}}}), "is damaged: environment or entries"),
        (json.dumps(WHOLE | {"entries": {"a": {"ms": 1.0}}}), "is damaged: environment or entries"),
        (json.dumps(WHOLE | {"entries": {}, "environment": {"device": "x"}}), "is damaged: environment or entries"),
    ],
)
def test_a_file_that_is_not_whole_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        results.load(path)
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        results.load(tmp_path / "none.json")


def test_a_binary_file_is_damaged(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is damaged"):
        results.load(tmp_path / "x.json")


def test_a_name_is_a_file_a_label_or_the_beginning_of_a_commit():
    old = results.store("kernels", ENVIRONMENT | {"time": "2026-01-02"}, ENTRIES, "before")
    new = results.store("suite", ENVIRONMENT | {"time": "2026-01-03"}, ENTRIES)
    first = results.store("suite", ENVIRONMENT | {"time": "2026-01-01"}, ENTRIES, "before")

    def paths(name):
        return [path for path, _ in results.find(name)]

    assert paths(str(new)) == [new] and paths("before") == [first, old] and paths("bec0e") == [first, old, new]
    with pytest.raises(
        UserError, match=r"'feed123' is neither a file, nor a label or commit .*, which has before, bec0e0ff0810"
    ):
        results.find("feed123")
    with pytest.raises(UserError, match="'bec' is neither a file"):
        results.find("bec")  # three letters are no commit


def test_other_json_in_the_folder_is_left_alone_and_a_damaged_measurement_is_named(folder):
    kept = results.store("gpu", ENVIRONMENT, ENTRIES, "before")
    (folder / "mine").mkdir()
    (folder / "mine" / "results.json").write_text("{}")
    assert [path for path, _ in results.find("before")] == [kept]
    kept.with_name("aaaa-suite.json").write_text("{")
    with pytest.raises(UserError, match=r"aaaa-suite\.json is damaged"):
        results.find("before")


def test_an_empty_store_says_so():
    with pytest.raises(UserError, match="which is empty"):
        results.find("before")


def test_entries_of_bench_kernels():
    variant = {"ms": 0.3, "iqr_ms": 0.01, "runs": 40, "gbs": 400.0, "tflops": 0.0, "share": 0.8, "of": "copy"}
    variant |= {"peak_memory": 5, "warm": {"ms": 0.2, "iqr_ms": 0.01, "runs": 40}}
    crashed, failed = {"error": "no such backend"}, "failed: AssertionError: out0"
    found = results.kernel_entries(
        {
            "entries": [
                {
                    "name": "norm",
                    "shape": "8 x 8",
                    "parity": "passed",
                    "variants": {"triton": variant, "cudnn": crashed},
                },
                {"name": "loss", "shape": "", "parity": failed, "variants": {"eager": variant}},
            ]
        }
    )
    assert list(found) == [
        "norm 8 x 8 | triton",
        "norm 8 x 8 | triton | warm L2",
        "norm 8 x 8 | cudnn",
        "loss | triton",
    ]
    assert found["norm 8 x 8 | triton"]["peak_memory"] == 5 and "warm" not in found["norm 8 x 8 | triton"]
    assert found["norm 8 x 8 | triton | warm L2"]["ms"] == 0.2
    assert found["loss | triton"] == {"error": "no speed: failed: AssertionError: out0"}
