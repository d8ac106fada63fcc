"""The description of a model against the model itself, and sums over it against closed forms."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from bench.steps.roofs import step_work
from bench.steps.trace import Namer
from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Embedding, Heads, Linear, Norm, Shape
from fastgpt.config import ModelConfig, load_preset, preset_names
from fastgpt.model import GPT
from fastgpt.performance import flops, memory
from fastgpt.performance.operations import operations
from tests.performance import formulas

SMALL = Shape(n_layer=3, n_head=2, n_embd=48, block_size=7, vocab_size=97)
SHAPES = [SMALL, replace(SMALL, bias=True), GPT2_40M, replace(GPT2_124M, bias=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("preset", preset_names())
def test_parameters_are_those_of_the_model_in_their_order(preset, bias):
    config = load_preset(preset, "cuda").model
    config = replace(config, bias=bias and config.family == "gpt2")
    with torch.device("meta"):
        model = GPT(config)
    assert list(anatomy.parameters(config).items()) == [(name, p.shape) for name, p in model.state_dict().items()]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert anatomy.n_params(config) == count
    positions = model.transformer.wpe.weight.numel() if config.family == "gpt2" else 0
    assert anatomy.n_params(config, positions=False) == count - positions
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


@pytest.fixture
def family(monkeypatch):
    """In place of GPT-2: an untied head, grouped queries, value embeddings on every other layer, no position embedding."""
    C, V, every, other = 128, 1024, (0, 1, 2), (0, 2)
    parts = (
        Embedding("token embedding", "wte", (), V, C),
        Norm("norm before attention", "h.{layer}.norm", every, C, False),
        Linear("q", "h.{layer}.q", every, C, C, False, "norms", "attention"),
        Linear("kv", "h.{layer}.kv", every, C, C // 2, False, "norms", "attention"),
        Linear("attention projection", "h.{layer}.proj", every, C, C, False, "attention", "norms"),
        Linear("mlp up", "h.{layer}.up", every, C, 3 * C, False, "norms", "activation"),
        Linear("mlp down", "h.{layer}.down", every, 3 * C, C, False, "activation", "norms"),
        Linear("head", "lm_head", (), C, V, False, "norms", "loss"),
        Embedding("value embeddings", "value_embeds.{layer}", other, V, C // 4),
        Norm("final norm", "norm", (), C, False),
    )
    found = anatomy.Anatomy(parts, Heads(count=3, heads=4, kv_heads=1, head_dim=32))
    monkeypatch.setattr(anatomy, "gpt2", lambda shape: found)
    return found


FAMILY = ModelConfig(n_layer=3, n_head=4, n_embd=128, block_size=64, vocab_size=1024)


def test_another_family_is_another_list_of_parts(family):
    found = anatomy.parameters(FAMILY)
    assert list(found) == [
        "wte.weight",
        *(f"h.{layer}.{name}.weight" for layer in (0, 1, 2) for name in ("norm", "q", "kv", "proj", "up", "down")),
        "lm_head.weight",
        *(f"value_embeds.{layer}.weight" for layer in (0, 2)),
        "norm.weight",
    ]
    C, V = 128, 1024
    assert anatomy.n_params(FAMILY) == sum(map(prod, found.values()))
    assert anatomy.matmul_params(FAMILY) == 3 * C * C * (1 + 1 / 2 + 1 + 3 + 3) + V * C


def test_what_is_derived_from_the_description_follows_another_family(family):
    """FLOPs, operations, roofs, profile names and memory know nothing of GPT-2's linears."""
    shape, tokens = Shape.of(FAMILY), 2 * FAMILY.block_size
    matmuls = 6 * anatomy.matmul_params(FAMILY) * tokens
    for kernels in memory.KERNELS:
        listed = operations(shape, kernels, 2)
        assert sum(op.flops * op.executions(1) for op in listed if op.kind == "matmul") == matmuls
        forward = next(op for op in listed if op.name == "attention forward")  # q and out of 4 heads, k and v of one
        assert forward.bytes == 2 * (4 + 1) * tokens * 32 * 2 + 4 * tokens * 4
        found = memory.memory(FAMILY, micro_batch=2, kernels=kernels)
        assert found.weights == 4 * anatomy.n_params(FAMILY)
    work = step_work(shape, 2, FAMILY.block_size)
    attention = work.pop("attention forward").flops + work.pop("attention backward").flops
    assert attention == (2 + 5) * 3 * 2 * 128 * tokens * flops.attended_keys(FAMILY.block_size)
    assert sum(one.flops for one in work.values()) == matmuls
    assert set(Namer(shape, tokens).linears) == {linear.name for linear in family.linears}
    attended = 12 * 3 * 128 * flops.attended_keys(FAMILY.block_size)
    assert formulas.exact(shape) == 6 * anatomy.matmul_params(FAMILY) + attended
