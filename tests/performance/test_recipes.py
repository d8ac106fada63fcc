"""Tokens of public runs and projected speeds, as hours and as the sentence of the planner and the doctor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.config import load_preset
from fastgpt.hardware import cards
from fastgpt.performance import recipes

RTX4070 = cards.card("rtx4070")
MODERN_124M = Shape.of(load_preset(recipes.MODERN.preset, "cuda").model)


@pytest.mark.parametrize("recipe", [recipes.GPT2, recipes.MODERN])
def test_hours_are_tokens_by_speed_and_widest_where_both_are_worst(recipe):
    rates = recipes.tokens_per_second(recipe, RTX4070)
    found = recipes.hours(recipe, RTX4070)
    assert found.central == pytest.approx(recipe.tokens[1] / rates[1] / 3600)
    assert found.low == pytest.approx(recipe.tokens[0] / rates[2] / 3600)
    assert found.high == pytest.approx(recipe.tokens[2] / rates[0] / 3600)
    assert found.low < found.central < found.high


def test_every_factor_needs_fewer_tokens_than_the_one_before():
    tokens = [factor.billions for factor in recipes.FACTORS]
    assert tokens == sorted(tokens, reverse=True) and 1e9 * tokens[0] == recipes.GPT2.tokens[1]


@pytest.mark.parametrize("shape", [GPT2_124M, MODERN_124M])
def test_the_sentence_compares_both_recipes_on_the_same_card(shape):
    said = recipes.comparison(shape, RTX4070)
    for recipe in (recipes.GPT2, recipes.MODERN):
        assert str(recipes.hours(recipe, RTX4070)) in said
    assert f"--preset {recipes.MODERN.preset}" in said and "projected" in said


@pytest.mark.parametrize(
    ("shape", "gpu"),
    [
        (GPT2_124M, None),
        (GPT2_40M, RTX4070),  # never reaches that loss
        (replace(GPT2_124M, n_layer=24, n_embd=1024), RTX4070),
        (replace(GPT2_124M, family="modern"), RTX4070),
        (replace(MODERN_124M, block_size=1024), RTX4070),  # another context, another loss
        (GPT2_124M, cards.card("t4")),  # no bf16
    ],
)
def test_nothing_is_said_of_other_models_and_unknown_cards(shape, gpu):
    assert recipes.comparison(shape, gpu) is None
