"""The audit's cases, compiled in a child process, and its judgement of them.

tests/kernels/test_compile_gate.py audits everything that ships; here a few small cases suffice.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from bench.compiler import audit, audit_child, audit_step
from bench.compiler.cubin import Row
from fastgpt.common import UserError

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
        fp_fusion=True,
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


# ---- compiled, in a child process


def test_another_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = audit.run(audit.target("sm_120", None), only="adamw fp32 no clip").rows
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
    parts = [[name for name, _ in audit_child.select(None, (k, 8), 89)] for k in range(1, 8 + 1)]
    assert shipped == ["step gpt2-124m bf16", "step gpt2-40m bf16"]
    assert all(part[:2] == shipped for part in parts)
    rest = [name for part in parts for name in part[2:]]
    everything = [name for name, _ in audit_child.select(None, (1, 1), 89)]
    assert sorted(shipped + rest) == sorted(everything) and len(set(everything)) == len(everything)
    assert [name for name, _ in audit_child.select(None, None, 89)] == shipped
    assert all("D64" in name for name, _ in audit_child.select("D64", None, 89))


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


def test_an_expression_that_matches_no_case_is_refused():
    with pytest.raises(UserError, match="only is 'zebra', and no case has that in its name"):
        audit.run(RTX4070, only="zebra")
