"""The campaign in its short form: one of each kind happens to a real run; and a run that is not the undisturbed one is told."""

import io
import json
import re
import signal
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

from bench import kill_campaign
from bench.kill_campaign import Campaign, KillConfig, fingerprint, main


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Exit code, what was printed, and the folder of the short form."""
    out, said = tmp_path_factory.mktemp("campaign"), io.StringIO()
    with redirect_stdout(said):
        code = main(["--tries", "1", "--steps", "24", "--window", "0.4", "--out", str(out)])
    return code, said.getvalue(), out


def test_one_of_each_kind_is_survived(done):
    code, said, _ = done
    assert code == 0, said
    for kind in ("kill", "signal", "start", "two"):
        assert re.search(rf"^{kind}: tried 1, fell short 0", said, re.MULTILINE), said
    assert re.search(r"^disk: tried (1, fell short 0$|0, fell short 0; this user may mount no)", said, re.MULTILINE), (
        said
    )


def test_what_falls_short_is_found(done):
    out = done[2]
    campaign = Campaign(out, KillConfig(tries=1, steps=24))
    run = out / "undisturbed"
    campaign.wanted = fingerprint(run)
    assert campaign.judge(run, 0) == ""
    assert "ended with code 1" in campaign.judge(run, 1)
    path = run / "metrics.jsonl"
    before = path.read_text()
    record = next(json.loads(line) for line in before.splitlines() if '"loss"' in line)
    path.write_text(before + json.dumps(record) + "\n")
    assert campaign.judge(run, 0) == f"{run} ended with other losses"
    path.write_text(before)
    campaign.log(run).write_text("Traceback (most recent call last):\n")
    ended = SimpleNamespace(pid=2**22 + 1, exitcode=0, join=lambda _: None)
    assert "SIGHUP ended it with code 0: Traceback" in campaign.obeys(ended, signal.SIGHUP, run)
    assert kill_campaign.wait(ended, lambda: False) is False
