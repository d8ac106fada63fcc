import json
import re
from datetime import date
from functools import partial

import pytest

from bench import emulate, ops
from fastgpt import kernels
from fastgpt.common import UserError
from tests.bench.emulator.test_machine import ROOT, child

WRONG = """
import json
from functools import partial
from unittest import mock
import torch
from bench import emulate, ops
from bench.emulator import cases
from bench.emulator.cases import Case
from fastgpt.kernels import reference
from tests.bench.emulator.known import no_mask_kernel

def outside(session):
    no_mask_kernel[(2,)](torch.zeros(200), torch.zeros(256), BLOCK=128)
    return [], 0.0

def stopped(session):
    raise KeyboardInterrupt

norm = next(case for case in cases.number_cases(89) if case.name == "numbers layer_norm fp32 C7 33 rows")
known = [Case("numbers outside", outside), norm, Case("numbers C7 stopped", stopped)]
with mock.patch.object(cases, "cases", lambda arch: known):
    codes = [emulate.main(["--all", "-k", "outside"]), emulate.main(["--all", "-k", "C7"])]
right = reference.layer_norm
with mock.patch.object(reference, "layer_norm", lambda *args, **options: 1.01 * right(*args, **options)):
    wrong = cases.execute(norm, 89).problems
print(json.dumps({"codes": codes, "wrong": wrong, "kernels": sorted(cases.kernels(89)), "sm_80": len(cases.kernels(80)),
    "far": sorted(cases.kernels(89, far=True))}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = child(["-c", WRONG], tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_a_kernel_that_reads_outside_fails_with_its_line(found):
    text, results = found
    assert results["codes"] == [1, 130]
    assert re.search(
        r"FAILED numbers outside\n  out of bounds: no_mask_kernel, PTX line \d+ .* from known.py:\d+:\d+", text
    )
    assert "1 of 1 cases failed" in text and "0 of 1 cases failed" in text
    assert "interrupted: 1 of 2 cases were not run" in text, "what ran until Ctrl-C is told all the same"


def test_outputs_and_gradients_are_compared(found):
    wrong = {line.split(":")[0].removeprefix("layer_norm ") for line in found[1]["wrong"]}
    assert wrong == {"out0", "dx", "dweight", "dbias"}


def test_launch_cases_look_their_operations_up_when_they_run():
    """A function that a case holds was taken before the emulator puts one that compares in its place."""
    public = [getattr(kernels, name) for name in kernels.__all__]
    partials = [run for _, run in ops.cases() if isinstance(run, partial)]
    assert not [run for run in partials if any(value in public for value in (*run.args, *run.keywords.values()))]


def test_every_kernel_has_a_case(found):
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "fastgpt" / "kernels").rglob("*.py")}
    launched = set(re.findall(r"\b(\w+)\[[^\]]*\]\(\n", "".join(sources.values())))
    kernels = {
        (path.stem, name)
        for path, text in sources.items()
        for name in re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)\(", text, re.MULTILINE)
        if name in launched or name.endswith("_kernel")
    }
    assert {tuple(each) for each in found[1]["kernels"]} == kernels
    assert found[1]["sm_80"] == len(kernels) - 3, "all but those of fp8"
    near = kernels - {tuple(each) for each in found[1]["far"]}
    few = {
        ("fused_cross_entropy", "rows_kernel"),
        ("fused_attn", "document_extents_kernel"),
        ("matmul", "sum_splits_kernel"),
    }
    assert near == few, "chunks of tokens, ids of documents, parts of a weight's gradient: less than 2^31 elements"


def test_a_sample_of_the_day(tmp_path):
    """Another one each day, and another architecture. The command that is printed repeats it."""
    day = date.today().toordinal()
    command = ["-m", "bench.emulate", "--arch", emulate.MMA_SYNC[day % len(emulate.MMA_SYNC)], "--sample", str(day)]
    print("python", *command)
    done = child([*command, "--json", str(tmp_path / "found.json")], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert sum(len(case["launches"]) for case in cases) > 20
    assert re.search(r"a sample of \d+ cases: --sample \d+ repeats it", done.stdout)


def test_samples_have_every_kind_and_change_with_the_seed():
    class Named(str):
        name = property(str)

    every = [Named(f"{kind} {i}") for kind, count in zip(emulate.KINDS, (178, 194, 14, 12)) for i in range(count)]
    first, again, other = (emulate.sample(every, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [sum(case.startswith(kind) for case in first) for kind in emulate.KINDS] == [1, 1, 1, 1]


@pytest.mark.parametrize("arguments, sentence", [
    (["--arch", "sm_90"], "arch is 'sm_90': it must be one of sm_80, sm_86, sm_89, sm_120"),
    (["-k", "("], "only is '(', which is not a regular expression"),
    (["--json", "no/such/folder/x.json"], "its folder does not exist"),
    (["--once"], "TRITON_INTERPRET is set"),
])  # fmt: skip
def test_refusals(arguments, sentence, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match=re.escape(sentence)):
        emulate.main(arguments)
