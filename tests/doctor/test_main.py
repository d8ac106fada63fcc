"""The command line: any subset of the files, exit codes, JSON and HTML, bad input in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.common import UserError
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
