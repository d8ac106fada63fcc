"""bench.audit: what it prints, what its exit code says, and bad input."""

from __future__ import annotations

import json

import pytest

from bench import audit
from bench.compiler.audit import judge
from fastgpt.common import UserError
<<<<<<< HEAD
from tests.bench.compiler.test_audit import RTX4070, row
=======
from fastgpt.training.dry_run import no_arithmetic

RTX4070 = audit.target("sm_89", None)


def row(**changed):
    """A kernel of a step that nothing is wrong with."""
    fine = Row(
        case="step gpt2-124m bf16",
        module="fused_attn",
        kernel="forward_kernel",
        dtype="bf16",
        config="D=64 w8 s3",
        arch=89,
        grid=[768],
        launches=24,
        registers=128,
        stack=0,
        spill_loads=0,
        spill_stores=0,
        shared=32768,
        warps=8,
        blocks_per_sm=2,
        limiter="registers",
        dots=2,
        tensor_dots=2,
        tensor_core={"HMMA.16816.F32.BF16": 64},
        wide_share=0.95,
        wide_loads=4,
        wide_stores=4,
        key="a",
    )
    return asdict(fine) | changed


# ---- a step without its arithmetic


def test_large_results_have_shape_and_dtype_but_are_never_computed():
    with no_arithmetic():
        a = torch.empty(2**15, 2**15, dtype=torch.bfloat16)  # 2 GiB that no page is ever touched of
        product = a @ a.T
        cast = product.float().view(2**10, -1).transpose(0, 1)
        total = cast.sum(1)
    assert (product.shape, product.dtype) == ((2**15, 2**15), torch.bfloat16)
    assert (cast.shape, cast.dtype, total.shape) == ((2**20, 2**10), torch.float32, (2**20,))


def test_writes_return_what_they_write_to():
    with no_arithmetic():
        x = torch.empty(2**20)
        out = torch.empty(2**10, 2**10)
        matrix = x.view(2**10, 2**10)
        assert x.mul_(2) is x and torch.mm(matrix, matrix, out=out) is out


def test_small_values_are_computed():
    with no_arithmetic():
        lengths = torch.tensor([1, 2, 3])
        assert int(lengths.cumsum(0)[-1]) == 6 and lengths.repeat_interleave(lengths).tolist() == [1, 2, 2, 3, 3, 3]


def test_gradients_reach_the_leaves():
    with no_arithmetic():
        weight = torch.nn.Parameter(torch.empty(1024, 1024))
        torch.nn.functional.gelu(torch.empty(4096, 1024) @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape


# ---- compiled, in a child process


def test_another_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = audit.audit("sm_120", only="adamw fp32 no clip")
    assert {row["arch"] for row in rows} == {120} and "_adamw_kernel" in {row["kernel"] for row in rows}
    assert all(row["waves"] is None for row in rows), "the grid of a launch case is no real step's"


def test_a_card_decides_the_architecture_and_an_architecture_the_card():
    assert audit.target(None, "rtx3090").sm_count == 82
    assert {arch: audit.target(arch, None).sm_count for arch in audit.DEFAULT_GPU} == {
        "sm_80": 108,
        "sm_86": 46,
        "sm_89": 46,
        "sm_90": 132,
        "sm_120": 48,
    }
    assert audit.target("sm_89", "rtx4090").sm_count == 128


# ---- which cases


def test_parts_hold_every_case_once_and_the_shipped_steps_always():
    shipped = [name for name, _ in audit_step.shipped_steps()]
    parts = [[name for name, _ in audit_child.select(None, (k, audit.SAMPLE), 89)] for k in range(1, audit.SAMPLE + 1)]
    assert shipped == ["step gpt2-124m bf16", "step gpt2-40m bf16"]
    assert all(part[:2] == shipped for part in parts)
    rest = [name for part in parts for name in part[2:]]
    everything = [name for name, _ in audit_child.select(None, (1, 1), 89)]
    assert sorted(shipped + rest) == sorted(everything) and len(set(everything)) == len(everything)
    assert [name for name, _ in audit_child.select(None, None, 89)] == shipped
    assert all("D64" in name for name, _ in audit_child.select("D64", None, 89))


def test_the_sample_changes_from_day_to_day_and_is_fixed_by_a_seed():
    assert audit._shard(None, 3) == audit._shard(None, 3 + audit.SAMPLE) == (4, audit.SAMPLE)
    assert {audit._shard(None, day)[0] for day in range(audit.SAMPLE)} == set(range(1, audit.SAMPLE + 1))
    assert 1 <= audit._shard(None, None)[0] <= audit.SAMPLE
    assert audit._shard("2/5", 3) == (2, 5)


def test_a_binary_that_a_step_launches_is_not_listed_again():
    rows = [
        row(case="attention bf16 D64"),
        row(),
        row(grid=[384]),
        row(case="other", key="b"),
        row(case="more", key="b"),
    ]
    assert [(r["case"], r["key"], r["grid"]) for r in audit._merge(rows)] == [
        ("step gpt2-124m bf16", "a", [768]),
        ("step gpt2-124m bf16", "a", [384]),
        ("other", "b", [768]),
    ]


# ---- the judgement


@pytest.mark.parametrize(
    "grid, blocks_per_sm, waves, last",
    [
        ([92], 2, 1.0, 1.0),
        ([138, 1], 2, 1.5, 0.5),
        ([46, 2], 1, 2.0, 1.0),
        ([23], 1, 0.5, 0.5),
        ([93], 2, 93 / 92, 1 / 92),
    ],
)
def test_waves_are_counted_on_the_cards_sms(grid, blocks_per_sm, waves, last):
    judged = audit.judge(row(grid=grid, blocks_per_sm=blocks_per_sm), RTX4070)
    assert (judged["waves"], judged["last_wave"]) == (pytest.approx(waves), pytest.approx(last))
    assert audit.judge(row(case="attention bf16 D64"), RTX4070)["waves"] is None


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"stack": 64}, "spills 64 bytes a thread, 0 loads, 0 stores"),
        ({"spill_loads": 3, "spill_stores": 2}, "spills 0 bytes a thread, 3 loads, 2 stores"),
        ({"shared": 101_377, "blocks_per_sm": 0}, "takes 101,377 bytes of shared memory, over the limit of 101,376"),
        ({"blocks_per_sm": 0}, "does not fit an SM: registers"),
        ({"tensor_core": {}}, "has 2 matrix products and no tensor-core instruction"),
    ],
)
def test_what_the_gate_refuses(changed, problem):
    assert audit.judge(row(**changed), RTX4070)["problems"] == [problem]


def test_what_the_gate_lets_through():
    assert audit.judge(row(), RTX4070)["problems"] == []
    true_fp32 = row(dtype="fp32", tensor_dots=0, tensor_core={})
    assert audit.judge(true_fp32, RTX4070)["problems"] == []
    assert audit.judge(row(shared=101_376, blocks_per_sm=1), RTX4070)["problems"] == []


# ---- the command
>>>>>>> c50c32d (Attention in one file that reads top to bottom, with one cached choice per launch; one hook for fp8; the specification and the checks shorter)


def stub(monkeypatch, *rows, errors=None):
    asked = []

    def run(card, **options):
        asked.append((card, options))
        return audit.Audit(card, "3.7.1", ["step gpt2-124m bf16"], [judge(r, card) for r in rows], errors or {})

    monkeypatch.setattr(audit, "run", run)
    return asked


def test_a_clean_audit_prints_a_table_and_exits_with_0(monkeypatch, capsys):
    asked = stub(
        monkeypatch, row(), row(case="adamw fp32", kernel="_sum", key="b", tensor_core={}, tensor_dots=0, dots=0)
    )
    assert audit.main(["--sample", "0", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    figures = next(line for line in printed.splitlines() if "8.35" in line)
    assert " ".join(figures.split()) == "1 attn: forward 24 768 8.35 (35%) 128 0 32,768 2 registers 95% 64"
    assert "bf16 D=64 w8 s3, 64 HMMA.16816.F32.BF16" in printed
    assert "46 SMs" in printed and "D=64 w8 s3" in printed and "attn: sum" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert "2 micro-batches of 8 x 1024" in printed and "gate: passed" in printed and "not measurements" in printed
    assert asked == [(RTX4070, {"only": None, "shard": (1, audit.SAMPLE), "jobs": 1})]


def test_a_failed_gate_exits_with_1_and_names_kernel_case_and_figure(monkeypatch, capsys):
    stub(monkeypatch, row(stack=16), errors={"attention bf16 D80": "forward does not compile for sm_89"})
    assert audit.main(["--all"]) == 1
    failures = capsys.readouterr().err.splitlines()
    assert failures == [
        "gate: attention bf16 D80: forward does not compile for sm_89",
        "gate: forward bf16 (step gpt2-124m bf16) D=64 w8 s3: spills 16 bytes a thread, 0 loads, 0 stores",
    ]


def test_json_has_schema_card_rows_and_failures(monkeypatch, capsys):
    asked = stub(monkeypatch, row())
    assert audit.main(["--json", "--gpu", "h100", "--all"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["arch"], found["sms"], found["triton"]) == (1, "sm_90", 132, "3.7.1")
    assert found["gpu"] == "NVIDIA H100 80GB HBM3" and found["failures"] == [] and found["errors"] == {}
    assert found["rows"][0]["waves"] == pytest.approx(768 / 264)
    assert asked[0][1]["shard"] == (1, 1)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--arch", "sm_61"], "arch is 'sm_61': it must be one of sm_80, sm_86, sm_89, sm_90, sm_120"),
        (["--gpu", "rtx4071"], "gpu is 'rtx4071', which is not in the table: nearest are NVIDIA GeForce RTX 407"),
        (["--gpu", "v100"], "gpu is 'v100' .sm_70.: kernels are compiled for sm_80"),
        (["--gpu", "h100", "--arch", "sm_89"], "gpu is 'h100', whose arch is sm_90, not 'sm_89'"),
        (["--only", "("], "only is '[(]', which is not a regular expression"),
        (["--shard", "3/2"], "shard is '3/2': it must be K/N with 1 <= K <= N"),
        (["--shard", "x"], "shard is 'x'"),
        (["--jobs", "0"], "jobs is 0: it must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        audit.main(arguments)
    assert "\n" not in str(error.value)


def test_the_sample_changes_from_day_to_day_and_is_fixed_by_a_seed():
    assert audit._shard(None, 3) == audit._shard(None, 3 + audit.SAMPLE) == (4, audit.SAMPLE)
    assert {audit._shard(None, day)[0] for day in range(audit.SAMPLE)} == set(range(1, audit.SAMPLE + 1))
    assert 1 <= audit._shard(None, None)[0] <= audit.SAMPLE
    assert audit._shard("2/5", 3) == (2, 5)
