"""What every part of the package shares."""

import io
import json
import os
import re
import sys

import pytest
import torch

from fastgpt import common
from fastgpt.common import (
    UserError,
    at_least,
    first_line,
    gigabytes,
    millions,
    number,
    percent,
    rounded,
    teraflops,
    within,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (5_200_000, "5.2M"),
        (999_600_000, "1B"),
        (10_485_760_000, "10.5B"),
        (1.21e12, "1.21T"),
        (2.5e14, "250T"),
    ],
)
def test_counts_have_three_digits_and_a_letter(number, text):
    assert rounded(number) == text


def test_figures_carry_their_unit():
    assert rounded(1.234e9, "kMGT", " ") + "B" == "1.23 GB" and rounded(12, "kMGT", " ") + "B" == "12 B"
    assert (millions(123_587_328), gigabytes(5.17e9), gigabytes(5.17e9, 2)) == ("123.59M", "5.2 GB", "5.17 GB")
    assert (millions(1e5), millions(7_216)) == ("0.10M", "7.22k")
    assert (teraflops(58.31e12), percent(0.12894), percent(None)) == ("58.3 TFLOP/s", "12.9%", "n/a")


@pytest.mark.parametrize(
    ("text", "value"),
    [("524288", 524288), ("524,288", 524288), ("2.5B", 2_500_000_000), ("300m", 300_000_000), ("1e9", 10**9), ("5_000", 5000),
     ("10k", 10_000), ("1T", 10**12), (" 7 ", 7), ("5e4", 50_000), ("-1", -1), ("9223372036854775807", 2**63 - 1)],
)  # fmt: skip
def test_whole_numbers_as_people_write_them(text, value):
    found = number(text, whole=True)
    assert found == value and isinstance(found, int)


@pytest.mark.parametrize(
    "text",
    ["", "B", "2.5X", "1e99", "nan", "inf", "0.2", "1 2", "9223372036854775808", "0,001", "1,00", "1__0", "9" * 999],
)
def test_what_is_no_whole_number(text):
    assert number(text, whole=True) is None


def test_fractions():
    assert [number(text, whole=False) for text in ("6e-4", ".1", "1.", "-2", "2.5k", "0.1")] == [
        6e-4,
        0.1,
        1,
        -2,
        2500,
        0.1,
    ]
    for text in ("nan", "inf", "-inf", "1e400", "0,001", "1,000", "infinity", "0x1p3", ""):
        assert number(text, whole=False) is None


def test_ranges_are_checked_in_one_sentence():
    at_least(1, tokens=None, steps=1, rate=2.5)
    within("[0, 1)", dropout=0, share=None)
    within("(0, 1]", top_p=1)
    for check in (
        lambda value: at_least(0, lr=value),
        lambda value: within("[0, 1)", lr=value),
        lambda value: within("(0, 1]", lr=value),
    ):
        for value in (-1, float("nan"), float("inf"), 2**63, 10**5000):
            with pytest.raises(UserError, match=r"^lr is [^\n]{1,80}: it must"):
                check(value)
    with pytest.raises(UserError):
        within("[0, 1)", lr=1)
    with pytest.raises(UserError):
        within("(0, 1]", lr=0.0)


# ---------------------------------------------------------------- small files


def test_text_comes_in_utf_8_and_in_powershells_utf_16(tmp_path):
    file = tmp_path / "a.toml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_bytes("a = 'é'\r\n".encode(encoding))
        assert common.read_text(file) == "a = 'é'\n" and common.load_toml(file) == {"a": "é"}


DEEP = 200_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xe9 = 1", "is damaged or not UTF-8 text .byte 0.: save it as UTF-8"),
        (b"[" * DEEP, "not JSON|not valid TOML"),
        (b"a = " + b"[" * DEEP + b"]" * DEEP, "not JSON|nested too deeply"),
        (b'{"a":' * DEEP + b"}" * DEEP, "not JSON|not valid TOML"),
        (b"a = " + b"9" * 5000, "not JSON|not valid TOML"),
        (b"=", "not JSON|not valid TOML"),
    ],
)
@pytest.mark.parametrize("read", [common.load_json, common.load_toml])
def test_what_is_no_table_is_one_sentence(tmp_path, content, reason, read):
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^config {file} .*({reason})") as error:
        read(file, "config")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert common.read_json(file) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFOs and no /dev")
def test_what_would_never_end_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b" " * 200)
    monkeypatch.setattr(common, "LARGEST_TEXT", 100)
    for path, reason in (
        (tmp_path / "fifo", "cannot be read: it is not a regular file"),
        ("/dev/zero", "cannot be read: it is not a regular file"),
        (tmp_path, "cannot be read: it is not a regular file"),
        (tmp_path / "large", "is larger than"),
        (tmp_path / "none", "cannot be read: No such file"),
        (tmp_path / ("n" * 5000), "cannot be read: File name too long"),
    ):
        with pytest.raises(UserError, match=reason):
            common.read_text(path)
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            common.file_sha256(path)


def test_a_json_object_or_nothing(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"a": 1}))
    assert common.read_json(file) == {"a": 1} == common.load_json(file)
    file.write_text("[1]")
    assert common.read_json(file) is None and common.load_json(file) == [1]


# ---------------------------------------------------------------- other people's text on a terminal

ESCAPES = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\x08\x7fe\tf\ng\u00e9"


def test_control_characters_are_left_out_and_the_rest_stays():
    assert common.printable(ESCAPES) == "a[31mb]0;titlec2Jde\tf\ng\u00e9"


def test_what_turns_the_direction_of_writing_is_left_out():
    """ "gnp.exe" between U+202E and U+202C reads "exe.png"; letters that are written from the right stay."""
    assert (
        common.printable("\u202egnp.exe\u202c \u2066\u2067\u2068\u2069\u202a\u202b\u202d \u05e9\u05dc")
        == "gnp.exe  \u05e9\u05dc"
    )


def test_a_byte_that_is_no_letter_can_be_printed(capsys):
    common.say("b\udcff.txt\x1b[31m")
    assert capsys.readouterr().out == "b?.txt[31m\n"


def test_a_console_has_its_own_colours_and_nobody_elses():
    from rich.table import Table
    from rich.text import Text

    shown = io.StringIO()
    console = common.console(file=shown, force_terminal=True, color_system="standard", highlight=False, width=60)
    table = Table("head\x1b[2J")
    table.add_row(ESCAPES)
    for what in (Text(ESCAPES, "red"), ESCAPES, table):
        console.print(what)
    page = shown.getvalue()
    assert set(re.findall("\x1b[^m]*m", page)) <= {"\x1b[31m", "\x1b[1m", "\x1b[0m"} and page.count("\x1b[31m") >= 1
    assert not set(re.sub("\x1b\\[[0-9;]*m", "", page)) & set(map(chr, (*range(9), *range(11, 32), 127, 0x9B)))
    assert "2Jd" in page


def test_an_error_neither_obeys_nor_repeats_what_it_names(capsys):
    common.report(UserError(f"out is {'n' * 5000}\x1b[2J, which is too long"))
    said = capsys.readouterr().err
    assert said.startswith("error: out is nnn") and said.endswith(", which is too long\n")
    assert "\x1b" not in said and len(said) < 250
    common.report(UserError(f"data {chr(92).join(('C:', 'my texts', 'new'))!r} is not there, \\\\host\\x is the run's"))
    assert capsys.readouterr().err == "error: data 'C:\\my texts\\new' is not there, \\\\host\\x is the run's\n"


# ---------------------------------------------------------------- how a command ends


def test_a_file_that_cannot_be_written_ends_a_command_in_one_sentence(tmp_path, capsys):
    def main(_):
        (tmp_path / "none" / "file").write_text("x")

    with pytest.raises(SystemExit) as end:
        common.run(main)
    assert end.value.code == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/none/file cannot be read or written: No such file or directory\n"
    )


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError("of no file"), KeyError("x")])
def test_a_bug_keeps_its_traceback(bug):
    def main(_):
        raise bug

    with pytest.raises(type(bug)):
        common.run(main)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ..."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:40],
)
def test_whoever_had_no_room_a_command_ends_in_one_sentence(error, capsys):
    assert common.is_out_of_memory(error)

    def main(_):
        raise error

    with pytest.raises(SystemExit) as end:
        common.run(main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(
        f"error: memory does not suffice ({first_line(error).split('. ')[0]}): "
    )


def test_what_torch_says_of_a_cpu_without_room():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert common.is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        KeyError("out of memory"),
    ],
)
def test_other_errors_are_not(error):
    assert not common.is_out_of_memory(error)
