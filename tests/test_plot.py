"""Pictures of runs: what is read from a run's folder and from other programs' logs, and the PNG itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastgpt import plot
from fastgpt.common import UserError

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
    assert run.name == "mine" and list(run.step) == list(range(1, 301))
    assert run.loss[0] == 8 and np.nanmax(run.tokens_per_second) == 1300 and np.isnan(run.tokens_per_second[0])
    assert list(run.eval_step) == [100, 200, 300] and list(run.val_loss) == [3.1] * 3
    assert plot.read(folder / "metrics.jsonl").name == "mine"


def test_a_nanogpt_log_gives_a_rate_once_the_tokens_of_a_step_are_known():
    path = REAL / "nanogpt-40m-fineweb.log"
    assert np.isnan(plot.read(path).tokens_per_second).all()
    run = plot.read(path, 524288)
    assert np.nanmedian(run.tokens_per_second) == pytest.approx(134_060, rel=0.002)
    assert run.val_loss[0] == 10.8727 and np.isnan(run.grad_norm).all()


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
    assert list(loss.lines[0].get_ydata()) == list(plot.read(folder).loss)
    assert list(loss.lines[2].get_ydata()) == [3.1] * 3
    assert set(rate.lines[0].get_ydata()) == {1e-3}
    assert len(speed.lines[0].get_ydata()) == 30
    assert all(axes.get_xlabel() == "optimizer step" for axes in figures[0].axes)
    smooth = norm.lines[1].get_ydata()
    assert np.allclose(smooth, 1.0) and len(smooth) == 300 - 6 + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "neither a run's folder nor a log"),
        (lambda path: path.write_text("nothing of the kind\n"), "no training step"),
        (lambda path: path.mkdir(), "cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(tmp_path, make, words):
    path = tmp_path / "thing.log"
    make(path)
    with pytest.raises(UserError, match=words) as error:
        plot.read(path)
    assert "\n" not in str(error.value)


def test_an_output_that_cannot_be_written_and_no_runs_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="out is"):
        plot.main([str(folder), "--out", str(tmp_path / "none" / "x.png")])
    with pytest.raises(UserError, match="RUN is missing"):
        plot.main([])


def test_a_run_that_has_not_logged_yet_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(UserError, match="no training step yet"):
        plot.read(tmp_path)
