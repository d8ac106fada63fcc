"""bench.ablation: every fusion off alone, projected; and the measuring path, on a tiny model in the interpreter."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from bench import ablation
from bench.reports import results
from bench.steps import ablation_measure
from bench.steps.ablation_measure import VARIANTS, Variant
from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.config import load_preset
from fastgpt.hardware import cards
from fastgpt.performance.operation import AS_SHIPPED, Fusions
from fastgpt.performance.projection import project

RTX_4070 = cards.lookup("rtx4070")
CPU = torch.device("cpu")
BY_KEY = {variant.key: variant for variant in VARIANTS}


def rows(model="gpt2-124m", gpu=RTX_4070, measured=None):
    return {row.variant.key: row for row in ablation.table([model], gpu, measured)}


# ---------------------------------------------------------------- projected


def test_every_fusion_is_switched_once():
    switched = [variant.fusion for variant in VARIANTS if variant.fusion]
    assert sorted(switched) == sorted(field.name for field in fields(Fusions)) and len(BY_KEY) == len(VARIANTS)
    for variant in VARIANTS:
        assert variant.fusion is None or getattr(AS_SHIPPED, variant.fusion) != variant.on, (
            f"{variant.name} changes nothing"
        )


@pytest.mark.parametrize("model", ["gpt2-124m", "gpt2-40m"])
def test_the_shipped_step_is_that_of_the_projection(model):
    preset = load_preset(model, "cuda")
    for precision in ("bf16", "fp16-fast"):
        found = project(
            Shape.of(preset.model), RTX_4070, precision=precision,
            micro_batch=preset.data.batch_size, tokens_per_step=preset.tokens_per_step,
        )  # fmt: skip
        assert rows(model)[f"{precision}: as shipped"].projected_ms == pytest.approx(found.ms_per_step)


def test_changes_are_relative_to_the_shipped_step_of_the_same_precision():
    found = rows()
    shipped, off = found["bf16: as shipped"], found["bf16: loss off"]
    assert shipped.projected_change == 0
    assert off.projected_change == pytest.approx(off.projected_ms / shipped.projected_ms - 1)
    assert found["fp16-fast: as shipped"].projected_change == 0


def test_parts_of_fp16_fast_add_up_to_all_of_it():
    found = rows()
    fast = found["fp16-fast: as shipped"].projected_ms
    lost = sum(found[f"fp16-fast: {part} off"].projected_ms - fast for part in ablation.PARTS)
    plain = sum(op.ms for op in ablation._times(load_preset("gpt2-124m", "cuda"), RTX_4070, "fp16", AS_SHIPPED))
    assert fast + lost == pytest.approx(plain, rel=0.01)  # but for copies around the head


def test_a_card_that_gains_nothing_from_fp16_fast_has_no_such_rows():
    found = rows(gpu=cards.lookup("h200"))
    assert found["fp16-fast: as shipped"].projected_ms is None and found["bf16: as shipped"].projected_ms > 0


@pytest.mark.parametrize("model", ["gpt2-124m", "gpt2-40m"])
def test_the_documented_table_is_what_the_command_prints(model):
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for line in ablation.cells(list(rows(model).values()))[1:]:
        assert " | ".join(line).replace("|  |", "| |") in text, line


def test_the_documented_targets_are_what_the_projection_says():
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for model in ("gpt2-124m", "gpt2-40m"):
        preset = load_preset(model, "cuda")
        for precision in ("bf16", "fp16-fast"):
            p = project(
                Shape.of(preset.model), RTX_4070, precision=precision,
                micro_batch=preset.data.batch_size, tokens_per_step=preset.tokens_per_step,
            )  # fmt: skip
            low, central, high = (
                f"{rate / 1e3:.1f}k"
                for rate in (p.tokens_per_second_low, p.tokens_per_second, p.tokens_per_second_high)
            )
            assert f"{low} / **{central}** / {high}" in text, (model, precision, low, central, high)


# ---------------------------------------------------------------- output


def test_nothing_measured_is_said_in_every_row(capsys):
    assert ablation.main(["--models", "gpt2-40m"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("projected only") == len(VARIANTS) and "not a measurement" in shown


def test_measured_figures_stand_beside_projected_ones(capsys):
    key = ("gpt2-124m", "bf16: loss off")
    measured = {
        key: {"ms": 2.0, "iqr_ms": 0.1, "runs": 5, "change": 0.25},
        ("gpt2-124m", "bf16: norms off"): {"error": "no"},
    }
    found = rows(measured=measured)
    cells = {line[1]: line for line in ablation.cells(list(found.values())) if line[0] == "bf16"}
    assert cells["loss off"][4] == "+25.0%" and cells["norms off"][4] == "no figure"
    assert cells["in place off"][4] == "projected only"
    ablation.show(list(found.values()), RTX_4070)
    assert "bf16: norms off: no" in capsys.readouterr().out


def test_json_and_picture(tmp_path):
    assert (
        ablation.main(["--models", "gpt2-40m", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
        == 0
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["rows"]) == len(VARIANTS) and all(row["measured"] is None for row in found["rows"])
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--gpu rtx9999", "gpu is 'rtx9999', which is not in the table: nearest are"),
        ("--models gpt3", "models has 'gpt3': each can be demo, gpt2-124m"),
        ("--budget soon", "budget is 'soon'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        ablation.main(arguments.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_measuring_without_a_gpu_ends_with_a_sentence():
    with pytest.raises(UserError, match="measure needs a CUDA GPU"):
        ablation.main(["--measure"])


# ---------------------------------------------------------------- measured


def tiny(model="tiny"):
    config = load_preset("demo", "cpu")
    small = replace(config.model, n_layer=1, n_embd=32, n_head=2, block_size=16, vocab_size=64)
    return replace(config, model=small, data=replace(config.data, batch_size=1))


@pytest.fixture(scope="module")
def measured():
    """Every variant of a tiny model, in the interpreter. Its times mean nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_measure, "GRAD_ACCUM", 1)
        return ablation_measure.run(["tiny"], CPU, math.inf, load=tiny, steps=1)


def test_every_variant_runs_and_begins_with_the_shipped_steps_loss(measured):
    for variant in VARIANTS:
        found = measured["tiny", variant.key]
        if variant.graphs:
            assert found == {"error": "not run: CUDA graphs need a CUDA GPU"}
        else:
            assert "error" not in found, f"{variant.key}: {found}"
            assert found["ms"] > 0 and (found["change"] == 0) == variant.is_shipped


def test_a_variant_exchanges_what_it_says_and_no_more():
    shipped = ablation_measure.table_of(BY_KEY["bf16: as shipped"])
    for name, exchanged in ablation_measure._EAGER_PARTS.items():
        found = ablation_measure.table_of(next(v for v in VARIANTS if v.fusion == name))
        different = {key for key in shipped.__dataclass_fields__ if getattr(found, key) is not getattr(shipped, key)}
        assert different == set(exchanged)


def test_rounded_weight_gradients_are_of_16_bits():
    table = ablation_measure.table_of(BY_KEY["bf16: weight gradients off"])
    weight = torch.nn.Parameter(torch.randn(8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        table.linear(torch.randn(4, 16), weight).float().square().sum().backward()
    assert torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_another_first_loss_gets_no_figure():
    fine = {"ms": 1.0, "iqr_ms": 0.0, "runs": 3, "first_loss": 4.0}
    for loss in (4.1, math.nan):
        assert "no speed: its first loss" in ablation_measure._compared({**fine, "first_loss": loss}, fine)["error"]
    assert ablation_measure._compared({**fine, "ms": 1.5}, fine)["change"] == pytest.approx(0.5)
    assert "nothing to compare with" in ablation_measure._compared(fine, {"error": "out of memory"})["error"]


def test_no_time_left_runs_nothing():
    found = ablation_measure.run(["tiny"], CPU, 0.0, load=tiny)
    assert {str(one) for one in found.values()} == {"{'error': 'not run: the budget is up'}"}


def test_a_variant_that_fails_is_a_reason(monkeypatch):
    build = ablation_measure.build

    def failing(variant, *rest):
        return build(variant, *rest) if variant.is_shipped else 1 / 0

    monkeypatch.setattr(ablation_measure, "build", failing)
    monkeypatch.setattr(ablation_measure, "VARIANTS", (VARIANTS[0], Variant("x", "")))
    saved = []
    found = ablation_measure.run(
        ["tiny"], CPU, math.inf, load=tiny, steps=1, save=lambda so_far: saved.append(len(so_far))
    )
    assert found["tiny", "bf16: x"] == {"error": "ZeroDivisionError: division by zero"} and saved == [1, 2]


def test_what_was_measured_is_kept(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_RESULTS", str(tmp_path))
    path = ablation_measure.store(measured, CPU)
    kept = results.load(path)
    assert kept["kind"] == "ablation" and "tiny | bf16: loss off" in kept["entries"]
