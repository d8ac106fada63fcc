"""The description of a model against the model itself, and sums over it against closed forms."""

from dataclasses import replace
from math import prod

import pytest
import torch

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Embedding, Heads, Linear, Norm, Shape
from fastgpt.config import ModelConfig, load_preset, preset_names
from fastgpt.model import GPT

SMALL = Shape(n_layer=3, n_head=2, n_embd=48, block_size=7, vocab_size=97)
SHAPES = [SMALL, replace(SMALL, bias=True), GPT2_40M, replace(GPT2_124M, bias=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("preset", preset_names())
def test_parameters_are_those_of_the_model_in_their_order(preset, bias):
    config = replace(load_preset(preset, "cuda").model, bias=bias)
    with torch.device("meta"):
        model = GPT(config)
    assert list(anatomy.parameters(config).items()) == [(name, p.shape) for name, p in model.state_dict().items()]
    assert anatomy.n_params(config) == model.n_params(positions=True)
    assert anatomy.n_params(config, positions=False) == model.n_params()
    assert anatomy.of(config).n_tensors == len(model.state_dict())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_the_closed_forms_of_the_docstrings(shape):
    L, C, T, V = shape.n_layer, shape.n_embd, shape.block_size, shape.vocab_size
    biases = L * 11 * C + C if shape.bias else 0
    assert anatomy.n_params(shape) == L * (12 * C**2 + 2 * C) + C + V * C + T * C + biases
    assert anatomy.n_params(shape) - anatomy.n_params(shape, positions=False) == T * C
    assert anatomy.matmul_params(shape) == 12 * L * C**2 + V * C
    model = anatomy.of(shape)
    assert (model.block_weights, model.head.weights, model.hidden) == (12 * L * C**2, V * C, 4 * C)
    assert sum(norm.count for norm in model.norms) == 2 * L + 1
    assert model.attention == Heads(L, shape.n_head, shape.n_head, C // shape.n_head)


def test_any_config_with_these_names_is_described():
    assert anatomy.of(ModelConfig(**vars(SMALL))) == anatomy.of(SMALL)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_tell_the_shape_back(shape):
    told = anatomy.shape_told_by(anatomy.parameters(shape))
    assert replace(shape, **told) == shape and set(anatomy.SHAPE) - set(told) == {"n_head"}
    assert anatomy.shape_told_by({}) == {}


def test_another_family_is_another_list_of_parts(monkeypatch):
    """An untied head, grouped queries, and value embeddings on every other layer."""
    C, V, every, other = 8, 20, (0, 1, 2), (0, 2)
    parts = (
        Embedding("token embedding", "wte", (), V, C),
        Linear("q", "h.{layer}.q", every, C, C, False, "norms", "attention"),
        Linear("kv", "h.{layer}.kv", every, C, C // 2, False, "norms", "attention"),
        Linear("attention projection", "h.{layer}.proj", every, C, C, False, "attention", "norms"),
        Linear("head", "lm_head", (), C, V, False, "norms", "loss"),
        Embedding("value embeddings", "value_embeds.{layer}", other, V, C // 4),
        Norm("final norm", "norm", (), C, False),
    )
    family = anatomy.Anatomy(parts, Heads(3, 4, 1, 2))
    monkeypatch.setattr(anatomy, "gpt2", lambda shape: family)
    found = anatomy.parameters(SMALL)
    assert list(found) == [
        "wte.weight",
        *(f"h.{layer}.{name}.weight" for layer in every for name in ("q", "kv", "proj")),
        "lm_head.weight",
        *(f"value_embeds.{layer}.weight" for layer in other),
        "norm.weight",
    ]
    assert anatomy.n_params(SMALL) == sum(map(prod, found.values()))
    assert anatomy.matmul_params(SMALL) == 3 * (C * C + C * C // 2 + C * C) + V * C
    assert family.block_linears == list(parts[1:4]) and family.head == parts[4]
