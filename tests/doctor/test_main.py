"""The command line: any subset of the files, exit codes, JSON and HTML, bad input in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.common import UserError
from fastgpt.config import Config
from fastgpt.doctor import __main__ as doctor
from tests.doctor.runs import REAL, SOUND

REPOSITORY = Path(__file__).parents[2]
CONFIG, LOG = REAL / "train_fineweb_40m.py", REAL / "nanogpt-40m-fineweb.log"


def run(capsys, *args):
    code = doctor.main([str(arg) for arg in args])
    return code, capsys.readouterr().out


def as_json(capsys, *args):
    code, out = run(capsys, *args, "--json")
    return code, json.loads(out)


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(SOUND)
    return path


def test_the_real_run(capsys):
    code, data = as_json(capsys, CONFIG, LOG, "--gpu", "rtx4070")
    assert code == 1 and data["gpu"] == "NVIDIA GeForce RTX 4070"
    assert data["findings"][0]["id"] == "param_count_mismatch"
    assert data["figures"]["mfu_nominal"] == pytest.approx(0.69, abs=0.001)


def test_the_order_of_the_files_does_not_matter(capsys):
    assert as_json(capsys, LOG, CONFIG, "--gpu", "rtx4070") == as_json(capsys, CONFIG, LOG, "--gpu=rtx4070")


def test_a_clean_config_exits_with_0(capsys, sound):
    code, out = run(capsys, sound, "--gpu", "rtx4070")
    assert code == 0 and "nothing found" in out and "Not checked" in out


def test_overrides_come_after_the_file(capsys, sound):
    code, data = as_json(capsys, sound, "--gpu", "rtx4070", "--vocab_size=50257", "--warmup_iters=9000")
    assert code == 1 and [f["check"] for f in data["findings"]] == ["warmup_too_long", "vocabulary_not_padded"]


def test_a_log_alone_with_its_config_in_it(capsys):
    code, data = as_json(capsys, REAL / "nanogpt-124m-fineweb.log", "--gpu", "rtx4070")
    assert code == 1 and data["figures"]["parameters"] == 123_587_328
    assert data["figures"]["mfu_nominal"] == pytest.approx(0.822, abs=0.001)
    assert "with --preset modern-124m (projected" in data["recipe"]


STARTED = """model    20.6k parameters (excluding position embeddings): layers 1, heads 1
data     my.txt (bytes): 25.5k tokens, and 1.27k to validate
step     256 tokens: micro-batches of 8 x 32
device   AMD EPYC
memory   0.02 GB predicted; 21.2 GB of main memory are free
iter 2: loss 5.5211, time 30.44ms, 350 tok/s, lr 1.67e-03, norm 1.2, eta 3 s
iter 4: loss 5.5211, time 30.44ms, 350 tok/s, lr 1.67e-03, norm 1.2, eta 3 s
"""


@pytest.mark.parametrize("given", ["folder", "config and metrics", "first screen"])
def test_a_run_on_a_cpu_is_asked_for_no_card_and_knows_its_corpus(capsys, tmp_path, given):
    path, first = tmp_path / "metrics.jsonl", {"run": "a", "config": Config().to_dict()}
    steps = [{"step": i, "loss": 5.0, "ms": 30.0, "tokens_per_second": 350.0, "lr": 1e-3} for i in (2, 4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in (first, *steps)))
    (tmp_path / "config.json").write_text(json.dumps(first["config"]))
    (tmp_path / "environment.json").write_text('{"device": "AMD EPYC", "corpus_tokens": 25528}')
    (tmp_path / "run.log").write_text(STARTED)
    files = {"folder": [tmp_path], "config and metrics": [tmp_path / "config.json", path]}
    _, found = as_json(capsys, *files.get(given, [tmp_path / "run.log"]))
    assert found["figures"]["corpus_tokens"] == (25500 if given == "first screen" else 25528)
    assert not any(word in sentence for sentence in found["not_checked"] for word in ("--gpu", "--corpus", "MFU:"))
    (tmp_path / "environment.json").write_text('{"device": "NVIDIA GeForce RTX 4070", "arch": "sm_89"}')
    _, found = as_json(capsys, path)
    assert found["gpu"] == "NVIDIA GeForce RTX 4070" and any("--corpus" in each for each in found["not_checked"])


def test_html_is_written_beside_the_report(capsys, tmp_path):
    page = tmp_path / "report.html"
    code, out = run(capsys, CONFIG, LOG, "--gpu", "4070", "--html", page)
    assert code == 1 and page.read_text().startswith("<!doctype html>") and "report.html" in out.replace("\n", "")


def test_a_strangers_files_write_neither_escapes_to_the_terminal_nor_markup_to_the_page(capsys, tmp_path):
    hostile = "\x1b]0;owned\x07\x1b[2J\u202e<script>alert(1)</script>[bold red]"
    config, log = tmp_path / "config.py", tmp_path / "run<b>.log"
    config.write_text(
        f"learning_rate = 10.0 # {hostile}\n# {hostile}\nnonsense = {hostile!r}\nbatch_size = f'{{x}}' # {hostile}\n"
    )
    log.write_text("".join(f"iter {i}: loss {9 - i:.4f}, time 10.00ms, mfu 1.00% {hostile}\n" for i in range(5)))
    code, out = run(capsys, config, log, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 1 and "owned" in out and not set("\x1b\x07\u202e") & set(out + page)
    assert "alert(1)" in page and "<script" not in page and "run<b>" not in page


def test_corpus_tokens_settle_the_epochs(capsys):
    _, data = as_json(capsys, CONFIG, LOG, "--gpu", "rtx4070", "--corpus-tokens", "1e12")
    assert data["figures"]["epochs"] == pytest.approx(0.0105, abs=1e-4) and data["not_checked"] == []


@pytest.mark.parametrize(
    "args, sentence",
    [
        ([], "no file is given"),
        ([CONFIG, "--gpu", "rtx9999"], "gpu is 'rtx9999'.*nearest"),
        ([CONFIG, "--jsn"], "flag is '--jsn'"),
        ([CONFIG, "--corpus-tokens", "0"], "corpus-tokens is 0"),
        (["no/such/file.py"], "no/such/file.py"),
    ],
)
def test_bad_input_is_one_sentence(args, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        doctor.main([str(arg) for arg in args])
    assert "\n" not in str(raised.value)


def test_exit_codes_and_no_traceback_as_a_program(tmp_path):
    """One process: unreadable input exits with 2 and says so in one line."""
    junk = tmp_path / "junk.bin"
    junk.write_bytes(bytes(range(256)) * 40)
    command = [sys.executable, "-m", "fastgpt.doctor", str(junk), "--gpu", "rtx4070"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "before resuming" in out and "Exit code: 0 nothing found, 1 findings, 2 unreadable" in out
