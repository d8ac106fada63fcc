"""The compile gate: every kernel of a GPT step, in every shipped launch config, compiled with no GPU.

For sm_89 (RTX 4070) all launch cases, for sm_80 and sm_90 a subset. Child processes compile, since this one interprets;
each test then judges one kernel, and a failure names the case, the config and the figure.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SM_89_SHARED_LIMIT = 101_376
SUBSET = r"^attention bf16 D(64|128)$|^layer_norm C768( all options)?$|^linear_cross_entropy bf16|^adamw (bf16|fp32)"
JOBS = (
    ("sm_89", "--shard=1/2"),
    ("sm_89", "--shard=2/2"),
    ("sm_80", f"--only={SUBSET}"),
    ("sm_90", f"--only={SUBSET}"),
)


def kernels_in_source():
    """(file, function) of every @triton.jit function that host code launches: ``function[grid](...)``."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "fastgpt" / "kernels").glob("*.py")}
    everything = "\n".join(sources.values())
    return [
        (module, name)
        for module, source in sorted(sources.items())
        for name in re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)\(", source, re.MULTILINE)
        if re.search(rf"\b{name}\[", everything)
    ]


# bug 21: shared memory and registers of the same source grow from one Triton version to the next.
KERNELS = kernels_in_source()
each_kernel = pytest.mark.parametrize("module, kernel", KERNELS, ids=[f"{m}.{k}" for m, k in KERNELS])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(rows of offline.py by architecture, each binary once; errors of cases that do not compile)."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(job):
        arch, selection = job
        command = [sys.executable, "-m", "fastgpt.kernels.offline", "--json", "--arch", arch, selection]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert done.stdout, done.stderr
        return arch, json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, JOBS))
    rows: dict[str, dict] = {}
    errors = [f"{arch} {case}: {error}" for arch, result in results for case, error in result["errors"].items()]
    for arch, result in results:
        rows.setdefault(arch, {}).update({row["key"]: row for row in result["rows"]})
    return {arch: list(found.values()) for arch, found in rows.items()}, errors


def of_kernel(rows, module, kernel):
    return [row for row in rows if (row["module"], row["kernel"]) == (module, kernel)]


def require(rows, figure, allowed):
    """Fail with one line per row whose figure is not allowed."""
    wrong = [
        f"sm_{row['arch']} {row['kernel']} {row['dtype']} ({row['case']}) {row['config']}: {figure} = {row[figure]}"
        for row in rows
        if not allowed(row[figure])
    ]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_every_case_compiles(compiled):
    if compiled[1]:
        pytest.fail("\n".join(compiled[1]), pytrace=False)


@each_kernel
def test_is_launched_by_a_case(compiled, module, kernel):
    assert of_kernel(compiled[0]["sm_89"], module, kernel), f"no case in launch_cases.py launches {module}.{kernel}"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@each_kernel
def test_spills_nothing(compiled, module, kernel, arch):
    rows = of_kernel(compiled[0][arch], module, kernel)
    require(rows, "spills", lambda size: size == 0)
    require(rows, "local_accesses", lambda number: number == 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@each_kernel
def test_fits_an_sm(compiled, module, kernel, arch):
    rows = of_kernel(compiled[0][arch], module, kernel)
    require(rows, "blocks_per_sm", lambda blocks: blocks >= 1)
    if arch == "sm_89":
        require(rows, "shared", lambda size: size <= SM_89_SHARED_LIMIT)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@each_kernel
def test_dots_of_16_bit_operands_use_tensor_cores_and_fp32_ones_do_not(compiled, module, kernel, arch):
    rows = [row for row in of_kernel(compiled[0][arch], module, kernel) if row["dots"]]
    require(rows, "dtype", lambda dtype: dtype in ("bf16", "fp16", "fp32"))
    require([r for r in rows if r["dtype"] != "fp32"], "tensor_core", lambda n: n > 0)
    # HMMA on fp32 operands would be tf32, which parity at fp32 rules out.
    require([r for r in rows if r["dtype"] == "fp32"], "tensor_core", lambda n: n == 0)


def test_attention_computes_with_dots(compiled):
    with_dots = {row["kernel"] for row in compiled[0]["sm_89"] if row["case"].startswith("attention") and row["dots"]}
    assert len(with_dots) >= 3, f"forward, dQ and dK/dV should each have dots, but only {with_dots} do"


@pytest.mark.parametrize("case", ["layer_norm C768", "layer_norm C4096", "linear_cross_entropy bf16"])
def test_row_kernels_move_128_bits_at_a_time(compiled, case):
    rows = [row for row in compiled[0]["sm_89"] if row["case"].startswith(case)]
    assert rows
    require(rows, "wide_loads", lambda number: number >= 1)
    if case.startswith("layer_norm"):
        require(rows, "wide_share", lambda share: share >= 0.5)


def test_adamw_moves_128_bits_at_a_time(compiled):
    # Most of its instructions read tables; what counts is parameter, gradient, moments in, and all but the gradient out.
    rows = [row for row in compiled[0]["sm_89"] if row["case"].startswith("adamw fp32")]
    update = max(rows, key=lambda row: row["wide_stores"])
    require([update], "wide_loads", lambda number: number >= 4)
    require([update], "wide_stores", lambda number: number >= 3)
