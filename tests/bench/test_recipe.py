"""The recipe's experiment: its table, what counts as a finished run, and what the committed results say."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from bench import recipe
from bench.recipe import FULL, SEEDS, Trial, experiment, main, read_run
from bench.reports.tables import markdown
from fastgpt.common import UserError
from fastgpt.config import parse


def finished(folder, trial, **changed):
    """The files of a run that has ended."""
    folder.mkdir()
    config = parse(trial.flags, "cpu").to_dict()
    config["optim"] |= changed
    records = [{"run": "x", "config": config}]
    records += [{"step": step, "val_loss": 5.0 - step / FULL} for step in (0, 100, trial.steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "environment.json").write_text('{"commit": "abc"}')


def test_every_run_has_a_name_of_its_own_and_a_command_line_that_is_understood():
    seen = {}

    def run(trial):
        assert seen.setdefault(trial.name, trial) == trial
        config = parse(trial.flags, "cpu")
        assert (config.train.max_iters, config.train.seed) == (trial.steps, trial.seed)
        assert config.tokens_per_step == recipe.TOKENS_PER_STEP
        rate = config.optim.muon_lr if config.optim.optimizer == "muon" else config.optim.lr
        assert rate == trial.lr
        return 1 + abs(trial.lr - 2e-3) + 1 / trial.steps

    experiment(run)
    assert {trial.seed for trial in seen.values() if not trial.part and trial.recipe == "modern"} == set(SEEDS)
    assert all(any(part in trial.part for trial in seen.values()) for part in recipe.WITHOUT)


def test_a_run_counts_when_it_is_whole_and_of_these_very_settings(tmp_path):
    trial = Trial("gpt2", "adamw", 2e-3, 200)
    finished(tmp_path / "whole", trial)
    finished(tmp_path / "other", trial, weight_decay=0.3)
    finished(tmp_path / "short", Trial("gpt2", "adamw", 2e-3, 150))
    assert read_run(tmp_path / "whole", trial)["evals"][-1] == [200, pytest.approx(5 - 200 / FULL, abs=1e-5)]
    assert [read_run(tmp_path / name, trial) for name in ("other", "short", "missing")] == [None] * 3


def test_results_of_half_an_experiment_are_refused(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        recipe.collect(tmp_path)


@pytest.mark.parametrize("flags", [["--out", "elsewhere"], ["--run", "--results", "old.json"]])
def test_a_flag_that_would_not_count_is_refused(flags):
    with pytest.raises(UserError, match="--run"):
        main(flags)


def test_the_ratio_is_of_the_shortest_run_that_reached_the_loss():
    found = json.loads(recipe.COMMITTED.read_text())
    seen = recipe.summary(found)
    for seed, steps in ((s, tokens / recipe.TOKENS_PER_STEP) for s, tokens in seen["modern_tokens"].items()):
        modern = [r for r in found["runs"] if (r["recipe"], r["part"], r["seed"]) == ("modern", "", seed)]
        shorter = [r for r in modern if r["steps"] < steps and r["lr"] == seen["best_learning_rate"]["modern"]]
        assert seen["modern_losses"][seed] <= seen["gpt2_losses"][seed]
        assert all(run["evals"][-1][1] > seen["gpt2_losses"][seed] for run in shorter)
    assert seen["tokens_ratio"] == pytest.approx(mean(seen["tokens_ratio_by_seed"].values()), abs=1e-3)


def test_json_has_what_was_measured_and_what_is_projected(capsys):
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["tokens_ratio"] < 1 and found["experiment"]["measured"]
    assert all(row["projected"] for row in found["projection"])
    for key in ("hours_to_3.28_rtx4070", "hours_to_3.28_rtx4070_fp16_fast", "gpt2_hours"):
        assert found[key]["low"] < found[key]["central"] < found[key]["high"]
    assert len(found["sources"]) > 5
    hours = [found["gpt2_hours"], found["hours_to_3.28_rtx4070"], found["hours_to_3.28_rtx4070_fp16_fast"]]
    ends = [found["factors"][i]["hours"] for i in (0, 2, 3)]
    assert ends == pytest.approx([each["central"] for each in hours], abs=0.02)


def test_the_page_has_the_figures_that_the_command_prints():
    found = json.loads(recipe.COMMITTED.read_text())
    page = (recipe.COMMITTED.parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    for cells in (recipe.loss_cells(found), recipe.part_cells(found)):
        assert markdown(cells, right=True) in page
    rows = [line.split(" | ") for line in page.splitlines()]
    for preset, precision, *_, hours, _, _ in recipe.hour_cells()[1:]:
        assert any(row[0] == f"| {preset}" and row[1] == precision and row[4:5] == [hours] for row in rows)
    for part, _, old, _, new in recipe.step_cells()[1:]:  # what is counted, not what is projected
        assert any(row[0] == f"| {part}" and row[2:5:2] == [old, f"{new} |"] for row in rows), part
    step = recipe.costs()
    assert f"{step['muon_share_of_step']:.2%} of a step" in page and f"{step['memory_gb']:.2f} GB" in page
    for change, _, hours in recipe.factor_cells()[1:]:
        assert any(row[0] == f"| {change}" and row[2:3] == [f"{hours} |"] for row in rows)


def test_it_prints_and_draws(capsys, tmp_path):
    assert main(["--plot", str(tmp_path / "a.png")]) == 0
    assert "of the tokens" in capsys.readouterr().out and (tmp_path / "a.png").stat().st_size > 10_000
