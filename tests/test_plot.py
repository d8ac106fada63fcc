"""Pictures of runs: what is read from a run's folder and from other programs' logs, and the PNG itself."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastgpt import plot
from fastgpt.common import UserError
from tests.doctor.runs import config, log

REAL = Path(__file__).parents[1] / "docs" / "rtx4070-runs"


@pytest.fixture
def folder(tmp_path):
    """A run's folder as the loop leaves it: 300 steps, speed on every tenth, three evaluations."""
    run = tmp_path / "mine"
    run.mkdir()
    records = [{"run": "a", "config": {}}]
    for step in range(1, 301):
        record = {"step": step, "loss": 5 / step + 3, "lr": 1e-3, "grad_norm": 1.0}
        records.append(record | ({"tokens_per_second": 1000.0 + step} if step % 10 == 0 else {}))
        if step % 100 == 0:
            records.append({"step": step, "val_loss": 3.1})
    records.append({"event": "spike", "at_step": 5, "loss": 9.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_a_run_folder_is_read_whole(folder):
    run = plot.read(folder)
    assert run.name == "mine" and list(run.steps.step) == list(range(1, 301))
    rate = run.steps.tokens_per_second
    assert run.steps.loss[0] == 8 and np.nanmax(rate) == 1300 and np.isnan(rate[0]) and run.steps.grad_norm[0] == 1
    assert list(run.evals.step) == [100, 200, 300] and list(run.evals.val) == [3.1] * 3
    assert plot.read(folder / "metrics.jsonl").name == "mine"


def test_damaged_lines_are_passed_over_and_counted(folder, capsys):
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('{"step": 7, ', '{"ste'))
    assert len(plot.read(folder).steps) == 299
    out, err = capsys.readouterr()
    assert not out and err.endswith("1 of 305 lines of metrics.jsonl could not be read, the first is line 8\n")


def test_a_nanogpt_log_gives_a_rate_once_the_tokens_of_a_step_are_known():
    path = REAL / "nanogpt-40m-fineweb.log"
    assert np.isnan(plot.read(path).steps.tokens_per_second).all()
    run = plot.read(path, 524288)
    assert np.nanmedian(run.steps.tokens_per_second) == pytest.approx(134_060, rel=0.002)
    assert run.evals.val[0] == 10.8727 and np.isnan(run.steps.grad_norm).all()


def test_the_config_beside_a_log_gives_its_rate_and_evaluations_are_no_slowness(tmp_path):
    log = tmp_path / "old.log"
    lines = [f"iter {i}: loss 5.0, time {900 if i % 50 == 0 else 100:.2f}ms, mfu 10.00%" for i in range(0, 200, 10)]
    lines += [f"step {i}: train loss 5.0000, val loss 5.1000" for i in range(0, 200, 50)]
    log.write_text("\n".join(sorted(lines, key=lambda line: int(line.split()[1][:-1]))))
    assert np.isnan(plot.read(log).steps.tokens_per_second).all()
    config = "batch_size = 4\nblock_size = 25\ngradient_accumulation_steps = 2\n"
    (tmp_path / "train.py").write_text(config)
    rates = plot.read(log).steps.tokens_per_second
    assert set(rates[~np.isnan(rates)]) == {2000.0} and np.isnan(rates).sum() == 4
    (tmp_path / "other.py").write_text(config.replace("4", "8"))
    assert np.isnan(plot.read(log).steps.tokens_per_second).all()  # which of the two?
    assert np.nanmax(plot.read(log, config=tmp_path / "other.py").steps.tokens_per_second) == 4000


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_an_old_run_and_a_new_one_lie_on_one_picture(folder, tmp_path, capsys):
    assert plot.main([str(folder), str(REAL / "nanogpt-124m-fineweb.log"), "--out", str(tmp_path / "both.png")]) == 0
    assert is_png(tmp_path / "both.png") and "both.png" in capsys.readouterr().out
    plot.main([str(folder)])
    assert is_png(folder / "curves.png")


def test_what_is_drawn_is_what_was_read(folder, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot.draw([plot.read(folder)], tmp_path / "x.png")
    loss, rate, speed, norm = figures[0].axes
    assert list(loss.lines[0].get_ydata()) == list(plot.read(folder).steps.loss)
    assert list(loss.lines[2].get_ydata()) == [3.1] * 3
    assert set(rate.lines[0].get_ydata()) == {1e-3}
    assert len(speed.lines[0].get_ydata()) == 30
    assert all(axes.get_xlabel() == "optimizer step" for axes in figures[0].axes)
    smooth = norm.lines[1].get_ydata()
    assert np.allclose(smooth, 1.0) and len(smooth) == 300 - 6 + 1


@pytest.fixture
def drawn(monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def test_no_panel_is_empty(drawn, tmp_path):
    def run(**columns):
        made = log(np.arange(10) + 1.0)
        return plot.Curves("a", replace(made.steps, **columns), made.evals, config())

    some = np.arange(10.0)
    for runs, panels in (([run()], 1), ([run(), run(lr=some)], 2), ([run(lr=some, grad_norm=some)], 3)):
        plot.draw(runs, tmp_path / "x.png")
        assert len(drawn[-1].axes) == panels and all(axes.lines for axes in drawn[-1].axes)


def test_an_axis_of_tokens(drawn, folder, capsys):
    record = {"run": "a", "config": {"data": {"batch_size": 4, "grad_accum": 2}, "model": {"block_size": 128}}}
    path = folder / "metrics.jsonl"
    plain = path.read_text()
    path.write_text("\n".join([json.dumps(record), *plain.splitlines()[1:]]))
    assert plot.main([str(folder), "--x", "tokens"]) == 0
    loss = drawn[0].axes[0]
    assert loss.get_xlabel() == "tokens" and loss.lines[0].get_xdata()[-1] == 300 * 1024
    assert loss.lines[2].get_xdata()[0] == 100 * 1024 and loss.xaxis.get_major_formatter()(250_000) == "250k"
    record["config"]["optim"] = {"batch_warmup_iters": 100}
    path.write_text("\n".join([json.dumps(record), *plain.splitlines()[1:]]))
    assert plot.main([str(folder), "--x", "tokens"]) == 0
    assert drawn[1].axes[0].lines[0].get_xdata()[-1] == 200 * 1024 + (50 * 1 + 50 * 2) * 512
    path.write_text(plain.replace('"config"', '"another"'))
    with pytest.raises(UserError, match="mine does not say how many tokens a step has"):
        plot.main([str(folder), "--x", "tokens"])


def test_without_a_name_the_newest_run_is_drawn(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    older = tmp_path / "runs" / "older"
    older.mkdir(parents=True)
    (older / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    os.utime(older / "metrics.jsonl", (1, 1))
    assert plot.main([]) == 0
    assert capsys.readouterr().out == "mine/curves.png\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "neither a run's folder nor a log"),
        (lambda path: path.write_text("nothing of the kind\n"), "no training step"),
        (lambda path: path.mkdir(), "neither a run's folder nor a log"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(tmp_path, make, words):
    path = tmp_path / "thing.log"
    make(path)
    with pytest.raises(UserError, match=words) as error:
        plot.read(path)
    assert "\n" not in str(error.value)


def test_an_output_that_cannot_be_written_and_no_runs_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="out is"):
        plot.main([str(folder), "--out", str(tmp_path / "none" / "x.png")])
    with pytest.raises(UserError, match="name the log that it belongs to before it"):
        plot.main(["train.py", str(folder)])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="RUN is missing, and no run lies in runs/ or here"):
        plot.main([])


def test_a_run_that_has_not_logged_yet_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(UserError, match="no training step yet"):
        plot.read(tmp_path)


@pytest.mark.parametrize("name", ["cost$_$x", "_first", "a\x1b]0;title\x07", "\u202egnp"])
def test_a_runs_name_is_shown_as_it_is(folder, name, recwarn, capsys):
    run = folder.rename(folder.with_name(name))
    assert plot.main([str(run), "--out", str(run / "x.png")]) == 0
    assert not [str(warning.message) for warning in recwarn] and "\x1b" not in capsys.readouterr().out
