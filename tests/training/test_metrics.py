"""metrics.jsonl: every step exactly once across crashes and resumes, and never another run's file."""

import os
from dataclasses import replace

import pytest

from fastgpt.common import UserError
from fastgpt.config import Config, TrainConfig
from fastgpt.training import metrics
from fastgpt.training.metrics import Metrics, connect_wandb

CONFIG = Config(train=TrainConfig(tensorboard=False))


def written(folder, run="a", step=0, upto=5):
    file = Metrics(folder, run, step, CONFIG)
    for i in range(step + 1, upto + 1):
        file.write({"step": i, "loss": 1.0 / i})
    file.close()


def steps(folder):
    return [record["step"] for record in metrics.read(folder) if "step" in record]


def test_the_first_line_names_the_run_and_its_config(tmp_path):
    written(tmp_path)
    first = metrics.read(tmp_path)[0]
    assert first["run"] == "a" and first["config"]["optim"]["lr"] == CONFIG.optim.lr
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    written(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # what a crash leaves
    written(tmp_path, step=3, upto=7)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert sum("run" in record for record in metrics.read(tmp_path)) == 1


def test_what_a_checkpoint_has_seen_stays_and_later_events_do_not(tmp_path):
    file = Metrics(tmp_path, "a", 0, CONFIG)
    for step in (1, 2, 3):
        file.write({"step": step})
    file.write({"event": "spike", "at_step": 3})
    file.write({"event": "rollback", "at_step": 3, "to_step": 1})
    file.write({"step": 2, "again": True})
    kept = file.size  # the checkpoint of step 2, made after the rollback
    file.write({"step": 2, "hellaswag_acc": 0.3})
    file.write({"event": "out_of_memory", "at_step": 2})
    file.write({"step": 3, "again": True})
    file.close()
    whole = metrics.read(tmp_path)
    Metrics(tmp_path, "a", 2, CONFIG, kept=kept).close()
    assert metrics.read(tmp_path) == whole[:8]
    for unknown in (None, 5, 10**9, "x"):  # an older checkpoint's, or another file's
        Metrics(tmp_path, "a", 2, CONFIG, kept=unknown).close()
        assert metrics.read(tmp_path) == [r for r in whole[:8] if r.get("step", r.get("at_step", 0)) < 3]


def test_another_runs_file_is_refused_and_left_alone(tmp_path):
    written(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"another run \(a, the checkpoint is of b\)"):
        Metrics(tmp_path, "b", 3, CONFIG)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_what_would_never_end_is_no_metrics_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"cannot be read .it is not a regular file"):
        metrics.read(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    monkeypatch.setattr(metrics, "LONGEST_LINE", 1000)
    for line in ("1" * 5000, "[" * 900):
        (tmp_path / "metrics.jsonl").write_text('{"run": "a"}\n' + line + "\n{}\n")
        with pytest.raises(UserError, match="line 2 is not a JSON object"):
            metrics.read(tmp_path)


def test_a_damaged_file_and_a_missing_one_end_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        metrics.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"run": "a"}\nnoise\n{"step": 1}\n')
    with pytest.raises(UserError, match="damaged: line 2"):
        metrics.read(tmp_path)


@pytest.mark.parametrize("step", ['"x"', "null", "[1]"])
def test_a_record_of_no_step_is_refused_by_a_resumed_run(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text := f'{{"run": "a"}}\n{{"step": {step}}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 2 is of step"):
        Metrics(tmp_path, "a", 1, CONFIG)
    assert path.read_text() == text


def test_tensorboard_has_the_numbers_of_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = Metrics(tmp_path, "a", 0, replace(CONFIG, train=TrainConfig()))
    for step in (1, 2):
        file.write({"step": step, "loss": 3.0 / step, "note": "text", "mfu": None})
    file.write({"event": "spike", "loss": 9.0})
    file.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 3.0), (2, 1.5)]


def test_wandb_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is 'project' but the package is not installed: pip install wandb"):
        connect_wandb(replace(CONFIG, train=TrainConfig(wandb="project")), "a")


def test_wandb_that_does_not_get_through_is_said(monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured\nand more")

    monkeypatch.setitem(__import__("sys").modules, "wandb", type("wandb", (), {"init": staticmethod(init)}))
    with pytest.raises(UserError, match=r"^wandb is 'p', which cannot be reached \(api_key not configured\): see"):
        connect_wandb(replace(CONFIG, train=TrainConfig(wandb="p")), "a")


def test_wandb_gets_the_numbers_of_every_step_and_goes_on_with_a_resumed_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append((name, step_metric))

        def log(self, numbers):
            calls.append(numbers)

        def finish(self):
            calls.append("finished")

    fake = type("wandb", (), {"init": staticmethod(lambda **kwargs: calls.append(kwargs) or Run())})
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    config = replace(CONFIG, train=TrainConfig(wandb="p", tensorboard=False, out=tmp_path / "mine"))
    file = Metrics(tmp_path / "mine", "a", 0, config, connect_wandb(config, "a"))
    file.write({"step": 1, "loss": 2.0, "note": "text"})
    file.write({"event": "spike", "loss": 9.0})
    file.close()
    begun, axis, logged, finished = calls
    assert (begun["project"], begun["name"], begun["id"], begun["resume"]) == ("p", "mine", "a", "allow")
    assert begun["config"]["train"]["wandb"] == "p"
    assert axis == ("*", "step")  # W&B drops what it is given for an earlier step than its own
    assert logged == {"step": 1, "loss": 2.0} and finished == "finished"
