"""python -m bench.project --calibration: fits of the two real runs, and whether the frozen clocks are theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import project
from bench.reports import calibration
from fastgpt.common import tomllib
from fastgpt.hardware import cards
from fastgpt.performance import projection
from fastgpt.performance.projection import FITTED_CLOCKS, KNOWN, RUN_40M, RUN_124M, left_out_errors
from fastgpt.performance.step_time import CONSTANTS, DESCRIBED, RANGES

DOCS = Path(__file__).parents[3] / "docs" / "projection.md"


def test_the_frozen_clock_is_the_fit_on_the_124m_run():
    assert calibration.fit(RUN_124M).clock == pytest.approx(CONSTANTS.clock, abs=1e-4)
    assert calibration.fit(RUN_40M).clock == pytest.approx(DESCRIBED["clock"]["low"], abs=1e-4)


def test_every_frozen_clock_is_what_a_new_fit_finds():
    assert calibration.fit_clocks() == pytest.approx(FITTED_CLOCKS, rel=1e-6)


@pytest.mark.parametrize("run", [RUN_40M, RUN_124M], ids=["40M", "124M"])
def test_a_fit_reproduces_its_run(run):
    assert run.error(calibration.fit(run)) == pytest.approx(0, abs=1e-6)


def test_the_fitted_clock_is_one_that_such_boards_can_hold():
    nominal = cards.lookup("rtx4070").boost_mhz
    assert 2500 < nominal * calibration.fit(RUN_40M).clock < nominal * CONSTANTS.clock < 2850


def test_the_documentation_has_every_fit_with_a_constant_at_an_end_of_its_range():
    text = DOCS.read_text(encoding="utf-8")
    for each in calibration.refits():
        assert f"| `{each.constant}` | {each.value:g} | {each.clock:.4f} | {each.error:+.1%} |" in text, each


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_exposures_are_solved_for_a_public_speed(way):
    assert calibration.solve_exposed(way) == pytest.approx(DESCRIBED[f"exposed_{way}"]["value"], abs=0.005)


@pytest.mark.parametrize("case, speeds", calibration.FLASH_ATTENTION_2.items(), ids=lambda each: str(each))
def test_attention_is_near_the_public_speeds_that_nothing_was_solved_for(case, speeds):
    """As near as docs/projection.md says: within 11% without a causal mask, at most 13% too fast with one; and its table."""
    said = [calibration.attention_speed(*case, T) for T in calibration.LENGTHS]
    for measured, projected in zip(speeds, said):
        assert -0.035 < projected / measured - 1 < (0.13 if case[2] else 0.11)
    way, D, causal = case
    row = " | ".join(f"{measured} / {projected:.0f}" for measured, projected in zip(speeds, said))
    assert f"| {way}, {D} columns{', causal' if causal else ''} | {row} |" in DOCS.read_text(encoding="utf-8")


def test_the_documentation_has_every_matrix_product_and_what_the_model_says_of_it():
    """Within 18%, as it says, but for the one that takes 25 microseconds."""
    text = DOCS.read_text(encoding="utf-8")
    for card, mnk, measured, source in calibration.MATMULS:
        size, said = " x ".join(f"{n:,}" for n in mnk), calibration.matmul_speed(card, mnk)
        assert f"| {size} | {measured} | {said:.0f} | {source} |" in text, (card, size)
        assert 0.85 < said / measured < (1.34 if mnk == (2048, 2048, 2048) else 1.18)


def test_the_documentation_has_every_further_card_and_says_how_many_lie_inside():
    text, found = DOCS.read_text(encoding="utf-8"), calibration.figures(FITTED_CLOCKS)["further_cards"]
    for each in found:
        rates = f"{each['measured_tokens_per_second']:,.0f} | {each['projected_tokens_per_second']:,.0f}"
        inside = "inside" if each["inside"] else "**outside**"
        assert f"| {each['name']} | {each['micro_batch']} | {rates} | {each['error']:+.1%} | {inside} |" in text, each
    assert (sum(each["inside"] for each in found), len(found)) == (10, 13) and "Ten of 13 are inside, 77%" in text


def test_a_narrow_terminal_cuts_no_figure(capsys):
    calibration.show(calibration.figures(FITTED_CLOCKS), Console(width=80))
    out = capsys.readouterr().out
    assert all(f"{error:+.1%}" in out for error in left_out_errors().values())
    assert "5 of 8 lie inside" in " ".join(out.split())


def test_calibration_shows_both_fits_every_anchor_and_every_constant(capsys):
    assert project.main(["--calibration"]) == 0
    out = capsys.readouterr().out
    assert "-6.1%" in out and "+7.2%" in out and "3,911" in out and "9,350" in out
    for run in KNOWN:
        assert run.name in out
    for name in ("clock", *RANGES):
        assert name in out
    assert project.main(["--calibration", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["projected"] is True and len(found["fits"]) == 2 and len(found["left_out"]) == len(KNOWN)
    assert {each["name"] for each in found["constants"]} == {"clock", *RANGES}
    assert all(each["source"] for each in found["constants"])


def test_calibration_says_if_the_frozen_clocks_are_not_those_of_the_fit(capsys, monkeypatch):
    assert project.main(["--calibration"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(projection.FITTED_CLOCKS, "40M", 1.0256)
    assert project.main(["--calibration", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["fits"][1]["clock"] == pytest.approx(1.02440, abs=1e-5), "the fit, not the frozen clock"
    assert "differ from this fit" in said.err
    new = tomllib.loads(said.err.split("\n", 1)[1])
    assert new["clock"]["fitted"] == calibration.fit_clocks()
