"""The commands of tools/newcomers.py exist, and refuse what they are to refuse: the whole takes minutes and pip's index."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

from fastgpt.common import UserError
from tests import test_docs

PATH = Path(__file__).parents[1] / "tools" / "newcomers.py"
spec = importlib.util.spec_from_file_location("newcomers", PATH)
newcomers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(newcomers)
STEPS = {step.command: step for steps in newcomers.ROLES.values() for step in steps if step.command != "fastgpt"}
OURS = re.compile(r"fastgpt |python -m (fastgpt|bench)|make ")


@pytest.mark.parametrize("command", [command for command in STEPS if OURS.search(command)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="some have to be refused where there is no GPU")
def test_its_commands_do_what_they_say(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    step, words = STEPS[command], shlex.split(command.split(" && ")[-1])
    if words[0] == "make":
        test_docs.make(words)
        return
    main, args = test_docs.entry(words)
    if step.code:
        Path("mine.yaml").write_text(newcomers.FILES["expert"]["mine.yaml"])
        with pytest.raises(UserError, match=step.shows):
            main(args)
    elif words[1] != "nanogpt":  # which parses nothing itself
        test_docs.accepts(main, args, monkeypatch)


def test_what_is_not_ours_is_little():
    assert len(STEPS) > 25 and sum(OURS.search(command) is None for command in STEPS) < 9
