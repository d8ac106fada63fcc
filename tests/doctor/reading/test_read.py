"""Files told apart by what is in them; what cannot be read ends in one sentence."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.common import UserError
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.reading.read import LARGEST_CONFIG, read
from tests.doctor.reading.test_checkpoints import Code, folder, nanogpt, sections

REAL = Path(__file__).parents[3] / "docs" / "rtx4070-runs"
LOG, CONFIG = REAL / "nanogpt-40m-fineweb.log", REAL / "train_fineweb_40m.py"
STEP = "iter 20: loss 3.1234, time 3917.80ms, mfu 12.87%\n"


def kinds(evidence: Evidence) -> set[str]:
    return {kind for kind in ("config", "log", "checkpoint") if getattr(evidence, kind) is not None}


@pytest.fixture
def write(tmp_path):
    def file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return file


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "run" / "ckpt.pt"
    path.parent.mkdir()
    torch.save(nanogpt(), path)
    return path


# --- telling apart ---


def test_any_subset_in_any_order(checkpoint):
    files = {"config": CONFIG, "log": LOG, "checkpoint": checkpoint}
    assert read([]) == Evidence()
    for order in (["config", "log", "checkpoint"], ["checkpoint", "config"], ["log", "checkpoint", "config"]):
        evidence = read([files[kind] for kind in order])
        assert kinds(evidence) == set(order)
        assert evidence.config.get("n_embd") == 384


@pytest.mark.parametrize("name", ["a", "a.txt", "a.py", "a.log", "a.pt", "config.jsonl"])
def test_names_do_not_matter(name, write, checkpoint):
    assert kinds(read([write(name, CONFIG.read_bytes())])) == {"config"}
    assert kinds(read([write(name, LOG.read_bytes())])) == {"log"}
    assert read([write(name, "[model]\nn_layer = 6\n")]).config.kind == "fastgpt"
    assert "checkpoint" in kinds(read([write(name, checkpoint.read_bytes())]))
    assert kinds(read([write(name, '{"step": 1, "loss": 3.5}\n')])) == {"log"}


def test_a_comment_that_sounds_like_a_log_leaves_a_config_a_config(write):
    text = f"# CUDA out of memory at 16; Resuming training from out\n# {STEP}batch_size = 8\n"
    assert kinds(read([write("a.txt", text)])) == {"config"}


def test_a_log_that_died_before_its_first_step_is_a_log(write):
    text = "Overriding config with a.py:\nn_layer = 6\n\ntokens per iteration will be: 524,288\nCUDA out of memory.\n"
    evidence = read([write("a.txt", text)])
    assert evidence.log.all("oom") and evidence.config.get("n_layer") == 6


def test_a_config_that_is_cut_off_is_a_config(write):
    evidence = read([write("a.txt", "n_layer = 6\nn_head = 6\nn_embd = (384")])
    assert (evidence.config.get("n_layer"), len(evidence.config.unread)) == (6, 1)


def test_a_config_that_only_computes_is_a_config_with_nothing_in_it(write):
    evidence = read([write("a.py", "import os\nbatch_size = int(os.environ['B'])\n")])
    assert evidence.config.get("batch_size") is None
    assert [unread.place.line for unread in evidence.config.unread] == [1, 2]


def test_windows_files(write):
    config = CONFIG.read_text(encoding="utf-8").replace("\n", "\r\n").encode("utf-16")
    log = LOG.read_text(encoding="utf-8").replace("\n", "\r\n").encode("utf-8-sig")
    evidence = read([write("a.py", config), write("a.log", log)])
    assert evidence.config.get("n_embd") == 384 and evidence.config.settings["n_embd"].place.line == 19
    assert len(evidence.log.steps) == 101


def test_a_preset_by_name():
    assert read([Path("gpt2-40m")]).config.get("n_embd") == 384


def test_a_file_past_a_configs_size_is_read_as_a_log(write):
    evidence = read([write("a", STEP + "x = 1\n" * (LARGEST_CONFIG // 6) + STEP.replace("20", "30"))])
    assert evidence.log.steps.step.tolist() == [20, 30]


# --- one config of several ---


def test_the_given_config_counts_then_the_logs_then_the_checkpoints(write, checkpoint):
    log = write("a.log", "Overriding config with a.py:\nn_embd = 192\n\ntokens per iteration will be: 512\n" + STEP)
    config = write("a.py", "n_embd = 96\n")
    assert read([config, log, checkpoint]).config.get("n_embd") == 96
    assert read([log, checkpoint]).config.get("n_embd") == 192
    assert read([checkpoint]).config.get("n_embd") == 768
    assert read([checkpoint]).checkpoint.shape["n_embd"] == 32


def test_what_a_log_says_was_overridden_holds_for_the_config(write):
    log = write("a.log", "Overriding: batch_size = 4\ntokens per iteration will be: 512\n" + STEP)
    evidence = read([log, write("a.py", "batch_size = 8\nn_layer = 6\n")])
    assert evidence.config.get("batch_size") == 4
    assert evidence.config.settings["batch_size"].place.line == 1
    assert read([log, write("a.py", "batch_size = 8\n")], ["--batch_size=2"]).config.get("batch_size") == 2
    assert read([log, write("a.toml", "[data]\nbatch_size = 8\n")]).config.get("batch_size") == 8


def test_overrides_alone_are_a_config():
    assert read([], ["--n_embd=768"]).config.get("n_embd") == 768


# --- folders ---


def test_a_nanogpt_out_dir(checkpoint):
    evidence = read([checkpoint.parent])
    assert kinds(evidence) == {"config", "checkpoint"} and evidence.checkpoint.file == str(checkpoint)


def test_a_fastgpt_run_folder(tmp_path):
    run = tmp_path / "run"
    folder(run, 100)
    newest = folder(run, 250)
    (run / "step-00000300").mkdir()
    begun = json.dumps({"config": {"model": {"n_embd": 768}}})
    (run / "metrics.jsonl").write_text(f'{begun}\n{{"step": 1, "loss": 3.5}}\n{{"step": 2, "loss": 3.4}}\n')
    (run / "console.txt").write_text(STEP)
    (run / "environment.json").write_text("{}")
    evidence = read([run])
    assert evidence.checkpoint.file == str(newest)
    assert evidence.log.steps.step.tolist() == [1, 2], "metrics.jsonl before what the terminal showed"
    assert evidence.config.get("n_embd") == sections()["model"]["n_embd"]
    assert [unread.why for unread in evidence.unread] == [f"it was left alone: the log is {run / 'metrics.jsonl'}"]


def test_a_checkpoint_folder_is_a_checkpoint(tmp_path):
    assert kinds(read([folder(tmp_path)])) == {"config", "checkpoint"}


def test_of_a_folders_logs_the_newest_counts(write, tmp_path):
    old, new = write("run/a.log", STEP), write("run/b.log", STEP.replace("20", "30"))
    os.utime(old, (1, 1))
    assert read([tmp_path / "run"]).log.file == str(new)


def test_what_was_named_stays_and_the_folder_gives_the_rest(checkpoint, write):
    write("run/a.log", STEP)
    evidence = read([checkpoint.parent, LOG])
    assert evidence.log.file == str(LOG) and evidence.checkpoint is not None


def test_of_a_folders_configs_none_is_guessed(write, tmp_path):
    write("run/a.log", STEP)
    write("run/a.py", "n_layer = 6\n")
    assert read([tmp_path / "run"]).config.get("n_layer") == 6
    write("run/b.py", "n_layer = 8\n")
    evidence = read([tmp_path / "run"])
    assert evidence.config is None
    assert "2 configs lie in it: name the one that was used" in evidence.unread[-1].why


def test_a_damaged_file_in_a_folder_is_listed_and_the_rest_is_read(write, tmp_path):
    write("run/ckpt.pt", b"PK\x03\x04 no zip")
    write("run/a.log", STEP)
    evidence = read([tmp_path / "run"])
    assert kinds(evidence) == {"log"}
    assert "is not a checkpoint that torch.load reads" in evidence.unread[0].why


# --- bad input ---


def sentence(*paths: Path, overrides: tuple[str, ...] = ()) -> str:
    """What the user is told; one line."""
    with pytest.raises(UserError) as refused:
        read(list(paths), overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_not_there(tmp_path):
    assert sentence(tmp_path / "no.log") == f"{tmp_path / 'no.log'} cannot be read: No such file or directory"
    assert "cannot be read" in sentence(Path("a\0b"))
    assert "cannot be read" in sentence(Path("x" * 5000))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_what_may_not_be_read(write):
    path = write("a.log", STEP)
    path.chmod(0)
    assert "cannot be read: Permission denied" in sentence(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device files here")
def test_what_is_no_file():
    assert "is not a file" in sentence(Path("/dev/zero"))


@pytest.mark.parametrize("content", [b"", b"   \n\n\t", "\ufeff".encode()])
def test_an_empty_file(content, write):
    assert "empty" in sentence(write("a.log", content)) or "says nothing" in sentence(write("a.log", content))


@pytest.mark.parametrize("name", ["a.log", "a.py", "a.pt", "a.toml", "a"])
def test_binary_junk(name, write):
    junk = random.Random(0).randbytes(100_000)
    assert "nothing that the doctor reads" in sentence(write(name, junk))
    assert "nothing that the doctor reads" in sentence(write(name, b"\0" * 100_000))


def test_prose(write):
    assert "says nothing that the doctor knows" in sentence(
        write("a.txt", "Dear diary,\ntoday the loss went down.\n" * 50)
    )


def test_toml_of_another_program(write):
    assert "none of fastgpt's settings" in sentence(write("a.toml", "[project]\nname = 'x'\n"))
    assert "is not valid TOML" in sentence(write("b.toml", "[model]\nn_layer =\n"))


def test_two_files_of_one_kind(write):
    said = sentence(LOG, REAL / "nanogpt-124m-fineweb.log")
    assert said.startswith(f"{LOG} and ") and "both a log" in said
    assert "both a config" in sentence(CONFIG, Path("gpt2-40m"))


def test_a_folder_with_nothing_in_it(tmp_path, write):
    assert "has no config, log or checkpoint" in sentence(tmp_path)
    write("run/a.log", b"")
    assert "a.log is empty" in sentence(tmp_path / "run")


def test_a_pickle_that_would_run_code(tmp_path):
    torch.save(nanogpt() | {"optimizer": Code(tmp_path / "canary")}, tmp_path / "ckpt.pt")
    for path in (tmp_path / "ckpt.pt", tmp_path):  # in a folder as well
        assert re.search(r"would run _?io\.open", sentence(path))  # with the underscore from Python 3.12 on
    assert not (tmp_path / "canary").exists()


def test_an_override_of_no_form():
    assert "write it as --key=value" in sentence(CONFIG, overrides=("batch_size=8",))


# --- nothing but a sentence ---

QUIET = settings(max_examples=120, deadline=None, database=None)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    yield path
    shutil.rmtree(path)


HEADS = st.sampled_from(
    [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05", b"\xff\xfe", b"[model]\n", b"{", b"batch_size = ", STEP.encode()]
)
NAMES = st.sampled_from(["a.py", "a.log", "a.toml", "a.pt", "metrics.jsonl"])


@QUIET
@given(NAMES, HEADS, st.binary(max_size=500))
def test_any_bytes_under_any_name_are_evidence_or_one_sentence(scratch, name, head, content):
    path = scratch / name
    path.write_bytes(head + content)
    try:
        evidence = read([path])
        assert kinds(evidence)
    except UserError as error:
        assert "\n" not in str(error) and name in str(error)


@QUIET
@given(st.integers(0, 10**9))
def test_mutated_real_files_together(scratch, seed):
    rng = random.Random(seed)
    paths = []
    for source in (LOG, CONFIG):
        content = bytearray(source.read_bytes())
        for _ in range(rng.randint(0, 30)):
            at = rng.randint(0, len(content))
            content[at : at + rng.randint(0, 400)] = rng.randbytes(rng.randint(0, 30))
        paths.append(scratch / source.name)
        paths[-1].write_bytes(content)
    try:
        assert kinds(read(paths))
    except UserError as error:
        assert "\n" not in str(error)
