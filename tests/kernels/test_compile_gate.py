"""The compile gate: every kernel of a GPT step, compiled with no GPU by bench.audit.

For sm_89 (RTX 4070): all steps, every usual case, and of the other launch cases a sixth, another one each day; for one of the
other architectures, another one each day, the usual cases. ``python -m bench.audit --all --arch sm_XX`` compiles all of it.
Child processes compile, since this one interprets; each test then judges one kernel, and a failure names the case, the config
and the figure.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest
import triton

from bench.compiler import audit
from bench.compiler.audit_child import select
from fastgpt import anatomy
from fastgpt.config import load_preset
from tests.kernels.test_tuning import in_child

ROOT = Path(__file__).parents[2]
SM_89_SHARED_LIMIT = 101_376
USUAL = (
    r"^step gpt2-124m bf16|^attention bf16 D(64|128)$|^(layer|rms)_norm C768( all options)?$"
    r"|^linear_cross_entropy bf16|^adamw (bf16|fp32)|^muon bf16$"
)
ELSEWHERE = ("sm_80", "sm_86", "sm_90", "sm_120")
FP8 = r"|^fp8 C768|^fp8 attention D64$"


def kernels_in_source():
    """(file, function) of every @triton.jit function that host code launches: ``function[grid](...)``."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "fastgpt" / "kernels").rglob("*.py")}
    everything = "\n".join(sources.values())
    return [
        (module, name)
        for module, source in sorted(sources.items())
        for name in re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)\(", source, re.MULTILINE)
        if re.search(rf"\b{name}\[.*\]\(", everything)
    ]


# bug 21: shared memory and registers of the same source grow from one Triton version to the next.
KERNELS = kernels_in_source()
each_kernel = pytest.mark.parametrize("module, kernel", KERNELS, ids=[f"{m}.{k}" for m, k in KERNELS])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(Rows of bench.audit for sm_89; rows for today's other architecture; errors of cases that do not compile)."""
    today = date.today().toordinal()
    arch = ELSEWHERE[today % len(ELSEWHERE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # triton 3.10's default: every launch has to ask for it
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        todays = "|".join(f"^{re.escape(name)}$" for name, _ in select(None, (today % 6 + 1, 6), 89))
        always = rf"^step |{USUAL}|^layer_norm C4096$|^fp8 sweep$"
        sm_89 = audit.run(audit.target("sm_89", None), only=f"{always}|{todays}", jobs=2)
        fp8 = FP8 if arch in ("sm_90", "sm_120") else ""
        other = audit.run(audit.target(arch, None), only=USUAL + fp8, jobs=2)
    errors = [f"{found.gpu.arch} {case}: {error}" for found in (sm_89, other) for case, error in found.errors.items()]
    return sm_89.rows, other.rows, errors


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
        pytest.fail("\n".join([f"with triton {triton.__version__}:", *wrong]), pytrace=False)


def test_every_case_compiles(compiled):
    if compiled[2]:
        pytest.fail("\n".join(compiled[2]), pytrace=False)


@each_kernel
def test_is_launched_by_a_case(compiled, module, kernel):
    assert of_kernel(compiled[0], module, kernel), f"no case in common.py launches {module}.{kernel}"


@pytest.mark.parametrize("place", [0, 1], ids=["sm_89", "elsewhere"])
@each_kernel
def test_spills_nothing(compiled, module, kernel, place):
    rows = of_kernel(compiled[place], module, kernel)
    for figure in ("stack", "spill_loads", "spill_stores"):
        require(rows, figure, lambda number: number == 0)


@pytest.mark.parametrize("place", [0, 1], ids=["sm_89", "elsewhere"])
@each_kernel
def test_fits_an_sm(compiled, module, kernel, place):
    rows = of_kernel(compiled[place], module, kernel)
    require(rows, "blocks_per_sm", lambda blocks: blocks >= 1)
    if place == 0:
        require(rows, "shared", lambda size: size <= SM_89_SHARED_LIMIT)


@pytest.mark.parametrize("place", [0, 1], ids=["sm_89", "elsewhere"])
@each_kernel
def test_dots_of_16_bit_operands_use_tensor_cores_and_fp32_ones_do_not(compiled, module, kernel, place):
    rows = [row for row in of_kernel(compiled[place], module, kernel) if row["dots"]]
    require(rows, "dtype", lambda dtype: dtype in ("bf16", "fp16", "fp32", "fp8e4nv", "fp8e5"))
    require([r for r in rows if r["dtype"] != "fp32"], "tensor_core", lambda kinds: bool(kinds))
    # On fp32 operands tensor cores would compute in tf32, which parity at fp32 rules out.
    require([r for r in rows if r["dtype"] == "fp32"], "tensor_core", lambda kinds: not kinds)


@pytest.mark.parametrize("place", [0, 1], ids=["sm_89", "elsewhere"])
@each_kernel
def test_products_and_their_sums_are_rounded_once(compiled, module, kernel, place):
    require(of_kernel(compiled[place], module, kernel), "fp_fusion", bool)


def test_the_gate_of_bench_audit_lets_every_kernel_pass(compiled):
    require(compiled[0] + compiled[1], "problems", lambda problems: not problems)


def step_of(compiled, preset):
    return [row for row in compiled[0] if row["case"] == f"step {preset} bf16"]


@each_kernel
def test_a_training_step_launches_it(compiled, module, kernel):
    """In one of the precisions: of the linear matmuls those with sums in fp16, as the others are cuBLAS's until measured. Not
    the sweep behind torch._scaled_mm, which stands for an epilogue on Hopper alone."""
    steps = [row for row in compiled[0] if row["case"].startswith("step ")]
    assert of_kernel(steps, module, kernel) or kernel == "fp8_sweep_kernel", "no step launches it"


@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt2-40m", "gpt2-350m", "demo"])
def test_every_launch_of_a_step_is_found(compiled, preset):
    rows, layers, micro_batches = step_of(compiled, preset), load_preset(preset, "cuda").model.n_layer, 2

    def launches(kernel):
        return sum(row["launches"] for row in rows if row["kernel"] == kernel)

    norms = 2 * layers + 1
    assert launches("layer_norm_forward_kernel") == launches("layer_norm_backward_kernel") == micro_batches * norms
    assert {launches(name) for name in ("forward_kernel", "backward_q_kernel", "backward_kv_kernel")} == {
        micro_batches * layers
    }
    assert launches("rows_kernel") >= micro_batches and launches("_adamw_kernel") == 1


def test_fp16_fast_sums_every_product_of_a_step_but_the_scores_in_fp16(compiled):
    """By the instructions: GeForce cards run those that accumulate in fp16 at twice the rate."""
    rows = [row for row in compiled[0] if row["case"] == "step gpt2-124m fp16-fast" and row["dots"]]
    shares = {
        "forward_kernel": 1 / 2, "backward_q_kernel": 2 / 3, "backward_kv_kernel": 3 / 4, "linear_kernel": 1,
        "weight_grad_kernel": 1,
    }  # fmt: skip
    assert {row["kernel"] for row in rows} == set(shares)
    for row in rows:
        kinds = row["tensor_core"]
        assert set(kinds) <= {"HMMA.16816.F16", "HMMA.16816.F32"}
        assert kinds["HMMA.16816.F16"] / sum(kinds.values()) == pytest.approx(shares[row["kernel"]]), row["kernel"]


def test_the_grids_of_a_step_are_those_of_its_real_shapes(compiled):
    rows, config = step_of(compiled, "gpt2-124m"), load_preset("gpt2-124m", "cuda")
    forward = next(row for row in rows if row["kernel"] == "forward_kernel")
    blocks_of_queries = config.model.block_size // option(forward, "BLOCK_M")
    assert forward["grid"] == [blocks_of_queries * config.model.n_head * config.data.batch_size]
    assert forward["waves"] == pytest.approx(forward["grid"][0] / (46 * forward["blocks_per_sm"]))
    adamw = next(row for row in rows if row["kernel"] == "_adamw_kernel")
    chunks = anatomy.n_params(config.model, positions=True) / option(adamw, "CHUNK")
    assert chunks <= adamw["grid"][0] <= chunks + 100, "a chunk is of one parameter"


def option(row, name):
    return next(int(word.split("=")[1]) for word in row["config"].split() if word.startswith(name + "="))


def test_attention_computes_with_dots(compiled):
    with_dots = {row["kernel"] for row in compiled[0] if row["case"].startswith("attention") and row["dots"]}
    assert len(with_dots) >= 3, f"forward, dQ and dK/dV should each have dots, but only {with_dots} do"


@pytest.mark.parametrize(
    "module, shape", [("fused_layernorm", "C=768"), ("fused_layernorm", "C=4096"), ("fused_cross", "")]
)
def test_row_kernels_move_128_bits_at_a_time(compiled, module, shape):
    rows = [r for r in compiled[0] if r["module"].startswith(module) and shape in r["config"].split() + [""]]
    rows = [r for r in rows if r["dtype"] == "bf16"]
    assert rows
    require(rows, "wide_loads", lambda number: number >= 1)
    if module == "fused_layernorm":
        require(rows, "wide_share", lambda share: share >= 0.5)


def test_adamw_moves_128_bits_at_a_time(compiled):
    # Most of its instructions read tables; what counts is parameter, gradient, moments in, and all but the gradient out.
    rows = [row for row in compiled[0] if row["case"].startswith("step") and "PARAM_DTYPE=fp32" in row["config"]]
    require(rows, "wide_loads", lambda number: number >= 4)
    require(rows, "wide_stores", lambda number: number >= 3)


CASTS = """
import re, torch
from bench.compiler.capture import capture_launches
from fastgpt.kernels.fp8 import launch
found = {}
for arch in (89, 90):
    with capture_launches(arch) as launches:
        for dtype in (launch.FORWARD, launch.GRADIENT):
            launch.quantise(torch.empty(64, 256, dtype=torch.bfloat16), dtype)
    ptx = [each.compiled.asm["ptx"] for each in launches]
    casts = [re.findall(r"cvt[.]r[nz][.](?:satfinite[.])?(?:f16|e.m.x2)[.]\\w+", p) for p in ptx]
    found[arch] = [(sorted(set(names)), "8191" in p) for names, p in zip(casts, ptx)]
print(json.dumps(found))
"""


def test_casts_to_fp8_round_once():
    """To nearest, from fp32. On sm_89 triton before 3.9 cuts to fp16 first, and what it cuts off has left a one in the last bit
    (which changes nothing in a direct cast)."""
    found = in_child(CASTS)
    direct = [["cvt.rn.satfinite.e4m3x2.f32"], ["cvt.rn.satfinite.e5m2x2.f32"]]
    cut = [[f"cvt.rn.satfinite.{to}.f16x2", "cvt.rz.f16.f32"] for to in ("e4m3x2", "e5m2x2")]
    assert found["90"] == [[formats, False] for formats in direct]
    older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    assert [formats for formats, _ in found["89"]] == (cut if older else direct)
    assert all(marked for _, marked in found["89"])
