"""The HTML page: self-contained, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from fastgpt.common import UserError
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.report.curve_plot import ticks
from fastgpt.doctor.report.page import render, write
from tests.doctor.runs import RTX4070, config, curve, log, real, real_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def page():
    return render(real_report("40m"), real("40m"), RTX4070)


def test_it_needs_nothing_from_anywhere(page):
    assert not re.search(r"(src|href)\s*=\s*['\"]?(https?:)?//|@import|url\(|<script|<link", page)
    assert len(page) < 200_000


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
def test_a_browser_shows_curve_pins_and_true_units(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, file.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    dom = done.stdout
    assert dom.count("<svg") == 2 and dom.count("<polyline") == 2 and dom.count("<article") == 9
    assert re.findall(r'<circle class="pin-(\d)"', dom), "findings are pinned to the curve"
    for number in (1, 3, 4, 6):
        assert f'class="pin-{number}"' in dom and f'href="#finding-{number}"' in dom and f'id="finding-{number}"' in dom
    assert "69.0% of the card" in dom and "18.7% is all this card has" in dom
    assert dom.rstrip().endswith("</html>")


def test_pins_stand_where_the_evidence_is(page):
    """Finding 4's line is iteration 12,000 of 20,000: three fifths of the way along the axis."""
    (at,) = re.findall(r"<circle class=pin-4 cx=([\d.]+)", page)
    assert float(at) == pytest.approx(48 + (900 - 48 - 12) * 0.6, abs=0.2)


def test_a_users_text_is_escaped():
    text = render(diagnose(Evidence(config("# 350M parameters <script>alert(1)</script>"))), Evidence(config()), None)
    assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(),
        Evidence(config()),
        Evidence(config(), log()),
        Evidence(config(), log(np.full(30, np.nan))),
        Evidence(config(), log([3.0])),
        Evidence(config(), log(np.full(30, 3.0))),
        Evidence(config(), log(val=curve(5), train=curve(5))),
        Evidence(config(), log(curve(100_000), every=1)),
    ],
    ids=["nothing", "config", "empty log", "all NaN", "one step", "constant", "evaluations only", "long"],
)
def test_whatever_there_is_makes_a_page(evidence):
    text = render(diagnose(evidence, RTX4070), evidence, RTX4070)
    assert text.startswith("<!doctype html>") and "nan" not in re.findall(r"[=' ,]nan\b", text) and len(text) < 500_000


@pytest.mark.parametrize("low, high", [(3.5, 10.9), (0.0, 20_000), (1.0, 1.0), (0.001, 0.002)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert len(marks) <= 8 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_only_a_report_is_replaced(tmp_path):
    mine = tmp_path / "train.log"
    mine.write_text("iter 1: loss 3.0\n")
    with pytest.raises(UserError, match=r"train\.log, which exists and is not a report of the doctor"):
        write(mine, real_report("40m"), real("40m"), RTX4070)
    assert mine.read_text() == "iter 1: loss 3.0\n"
    (tmp_path / "empty.html").touch()
    for _ in range(2):
        write(tmp_path / "empty.html", real_report("40m"), real("40m"), RTX4070)
    assert (tmp_path / "empty.html").stat().st_size > 1000


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"html is .*cannot be written"):
        write(tmp_path / "no" / "such" / "page.html", real_report("40m"), real("40m"), RTX4070)
