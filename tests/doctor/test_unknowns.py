"""What could not be checked, and the file that would tell."""

from __future__ import annotations

from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence
from tests.doctor.runs import RTX4070, config, curve, log, real


def test_what_is_missing_is_named_with_the_file_that_would_tell():
    nothing = diagnose(Evidence()).not_checked
    assert (
        any("config" in s for s in nothing) and any("log" in s for s in nothing) and any("--gpu" in s for s in nothing)
    )
    only_log = diagnose(Evidence(log=log(curve(100), val=[5, 4, 3]))).not_checked
    assert any("give the config" in s for s in only_log)
    resuming = diagnose(Evidence(config("init_from = 'resume'"))).not_checked
    assert any("ckpt.pt" in s for s in resuming)
    assert diagnose(real("40m"), RTX4070, corpus_tokens=10**11).not_checked == []
