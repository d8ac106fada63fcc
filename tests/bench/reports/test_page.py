"""How a result of bench.mfu is shown: on the terminal, as pictures, as one HTML page that a browser opens."""

from __future__ import annotations

import base64
import copy
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO

import pytest

from bench.reports import mfu_tables, page, pictures
from bench.steps import roofs
from fastgpt.anatomy import GPT2_124M
from fastgpt.hardware import cards
from fastgpt.performance.operations import GAPS
from tests.bench.mfu_run import result

__all__ = ["result"]  # a fixture

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def on_a_gpu(result):
    """The same figures as a GPU would give them: nominal peak, memory, launches, overlap, and something unaccounted."""
    found = copy.deepcopy(result)
    found["environment"] |= {"device": "NVIDIA GeForce RTX 4070", "sms": 46, "driver": "580.1"}
    del found["environment"]["threads"]
    found["setup"] |= {"precision": "bf16", "model": "gpt2-124m <script>alert(1)</script>"}
    found["nominal"] = cards.lookup("rtx4070").to_json()
    for i, name in enumerate(("triton", "triton+compile")):
        backend = found["backends"][name] = copy.deepcopy(found["backends"]["eager"])
        backend |= {"ms": backend["ms"] / (i + 2), "peak_memory": 6 * 2**30, "launches": 1234}
        backend["mfu"][0] |= {"value": 0.82, "denominator_tflops": 58.3}
        backend["profile"] |= {
            "device_ms": (0.7, 0.97)[i] * backend["ms"],
            "overlap_ms": 0.5,
            "unaccounted_ms": {"secret_kernel": 0.25},
            "accounted": 0.98,
        }
        backend["rows"].append({**backend["rows"][0], "name": "unaccounted", "flops": None, "bytes": None})
    found["interpreted"] = found["projection"] = found["audit"] = None
    return found


def test_the_terminal_shows_every_section(result, capsys):
    mfu_tables.show(result[0])
    shown = capsys.readouterr().out
    for text in (
        "MFU of the nominal peak",
        "eager: where a step's time goes",
        "100.0% named",
    ):
        assert text in shown
    assert "what would help" not in shown, "the advice is for GPUs"
    assert "failed compile" in shown and mfu_tables.INTERPRETED in shown
    assert "Projected, not measured: gpt2-124m on NVIDIA GeForce RTX 4070" in shown and "(sm_89), not run" in shown
    assert re.search(r"attention backward .* (compute|memory) ", shown)


def test_what_would_help_is_said_of_a_gpu(result, capsys):
    mfu_tables.show(on_a_gpu(result[0]))
    assert "eager: what would help" in capsys.readouterr().out


def test_a_profile_that_leaves_too_much_unnamed_is_a_failure(result):
    found = copy.deepcopy(result[0])
    found["backends"]["eager"]["profile"] |= {"accounted": 0.95, "unaccounted_ms": {"secret_kernel": 3.0}}
    found["backends"]["triton"] = {"ms": 1.0, "profile_error": "RuntimeError: CUPTI is not permitted"}
    assert mfu_tables.failures(found)[0].startswith("eager: only 95.0% of its profiled step has a name (97% is wanted)")
    assert mfu_tables.failures(found)[2] == "triton: no profile, RuntimeError: CUPTI is not permitted"


def test_a_ceiling_that_a_step_exceeds_is_said_to_be_none(result):
    found = copy.deepcopy(result[0])
    notes = mfu_tables.mfu_notes(found)
    found["backends"]["eager"]["mfu"][1]["value"] = 2.08
    assert len(notes) == 3 and mfu_tables.mfu_notes(found)[3:] == [
        "above 100% of the measured ceiling: the matmul that it was measured with is slower than the step's own"
    ]


def test_what_would_help_is_sorted_by_milliseconds(result):
    cells = mfu_tables.help_cells(result[0]["backends"]["eager"], 100)
    gaps = [float(row[1]) for row in cells[1:]]
    assert gaps == sorted(gaps, reverse=True) and len(gaps) > 10
    assert any(row[0] == GAPS for row in cells)


@pytest.mark.parametrize(("value", "text"), [(None, "n/a"), (0.0123, "0.012"), (1.234, "1.23"), (123.44, "123.4")])
def test_milliseconds_have_the_digits_that_matter(value, text):
    assert mfu_tables.milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "-"), (12, "12 B"), (1.234e9, "1.23 GB"), (5.5e12, "5.5 TB")]
)
def test_quantities_have_a_prefix(value, text):
    assert mfu_tables.quantity(value, "B") == text


def test_every_operation_has_a_colour():
    work = roofs.step_work(GPT2_124M, 1, 64)
    groups = {name: pictures.group_of(name) for name in [*work, GAPS, "data", "matmul (unknown which)"]}
    assert "unaccounted" not in groups.values() and pictures.group_of("unaccounted") == "unaccounted"
    assert groups["attention projection dW"] == groups["qkv forward"] == "matmuls of the blocks"
    assert (groups["head dX"], groups["attention forward"], groups["norms backward"]) == ("head", "attention", "norms")


def test_pictures_are_drawn_of_a_cpu_and_of_a_gpu(result, tmp_path):
    import matplotlib.image

    card = on_a_gpu(result[0])
    del card["backends"]["eager"]
    for found, names in ((result[0], ["eager"]), (card, ["triton", "triton+compile"])):
        drawn = pictures.draw(found, tmp_path)
        assert [path.name for path in drawn] == ["time.png", *(f"roofline-{name}.png" for name in names)]
        for path in drawn:
            image = matplotlib.image.imread(path)
            assert image.shape[1] > 1200 and image[..., :3].std() > 0.05, "not blank"


@pytest.mark.parametrize(
    ("precision", "measured", "expected"),
    [
        ("bf16", {"bf16": 55.0}, ["bf16 roof, measured here", "bf16 roof, nominal"]),
        (
            "fp8",
            {"bf16": 55.0, "fp8": 110.0},
            [f"{a} roof, {b}" for b in ("measured here", "nominal") for a in ("fp8", "bf16")],
        ),
        ("fp16-fast", {"fp16": 55.0}, ["fp16 roof, measured here", "fp16_fp16acc roof, nominal", "fp16 roof, nominal"]),
        ("fp16-fast", {}, ["roof of memory, measured here", "fp16_fp16acc roof, nominal", "fp16 roof, nominal"]),
    ],
)
def test_a_roof_is_drawn_of_each_arithmetic_that_the_step_computes_in(precision, measured, expected, result, tmp_path):
    found = on_a_gpu(result[0])
    found["setup"]["precision"], found["ceilings"]["matmul_tflops"] = precision, measured
    assert [label for label, *_ in pictures.step_roofs(found)] == expected
    assert pictures.roofline(found, "triton", tmp_path / "roofline.png").exists()


def test_nothing_profiled_draws_nothing(result, tmp_path):
    assert pictures.draw({**result[0], "backends": {"eager": {"error": "x"}}}, tmp_path) == []


class Page(HTMLParser):
    """Text and links of a page, and whether its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text = [], [], ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_its_pictures_are_pictures(result):
    import matplotlib.image

    html = (result[1] / "report.html").read_text()
    parsed = Page(html)
    assert len(parsed.links) == 2 and all(link.startswith("data:image/png;base64,") for link in parsed.links)
    for link in parsed.links:
        assert matplotlib.image.imread(BytesIO(base64.b64decode(link.split(",", 1)[1]))).shape[1] > 1200
    without_pictures = re.sub(r"base64,[^\"]*", "", html)  # whose letters may spell anything
    assert not re.search(r"http|url\(|<script|@import", without_pictures)
    for text in ("MFU nanoGPT's own", "failed: compile", mfu_tables.INTERPRETED, "Projected, not measured", "not run"):
        assert text in parsed.text


def test_the_page_of_a_gpu_shows_memory_launches_and_what_has_no_name_and_escapes_names(result):
    html = page.render(on_a_gpu(result[0]), {})
    text = Page(html).text
    for expected in (
        "1,234",
        "6.44",
        "82.0%",
        "secret_kernel 0.250 ms",
        "Kernels overlapped for 0.500 ms",
        "98.0% named",
        "ms (70%): otherwise it waits for the host; a larger micro-batch hides that, and in training --cuda-graphs on",
        "ms (97%): the host keeps up",
    ):
        assert expected in text, expected
    assert text.count("measured, the GPU computes for") == 2, "the CPU's eager has no such line"
    assert "<script" not in html and "matplotlib is not installed" in text
    assert "Projected" not in text


def test_without_matplotlib_the_page_is_written_and_says_so(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page.write(result[0], tmp_path).read_text()
    assert "No pictures: matplotlib is not installed" in text and "eager: every operation" in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
def test_a_browser_opens_the_page(result, tmp_path):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    shown = subprocess.run(
        [*command, (result[1] / "report.html").as_uri()], capture_output=True, text=True, timeout=60, env=environment
    )
    assert shown.returncode == 0, shown.stderr[-500:]
    parsed = Page(shown.stdout)
    assert "How fast is a training step?" in parsed.text and len(parsed.links) == 2
    rows = len(result[0]["backends"]["eager"]["rows"])
    assert shown.stdout.count("<tr") > rows and "attention backward" in parsed.text
