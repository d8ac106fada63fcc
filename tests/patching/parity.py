"""Small models to patch, and a patched one held against itself unpatched, in the same dtype and in fp64: logits, loss and
every gradient."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench.parity import assert_parity
from bench.steps import nanogpt as nanogpt_model
from fastgpt.patching import patch

V = 67


def measure(model, call, autocast=None):
    """{name: tensor} of ``call(model) -> {name: output}``, whose "loss" is differentiated, and of every gradient."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(next(model.parameters()).device.type, autocast) if autocast else nullcontext():
        outputs = call(model)
    outputs["loss"].backward()
    gradients = {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {**{k: v.detach() for k, v in outputs.items() if v is not None}, **gradients}


def assert_same(model, call, train, autocast=None, **options):
    """Assert that patching ``model`` (in place) changes no result of ``call`` beyond bench/parity.py's bound."""
    model.train(train)
    wide = measure(copy.deepcopy(model).double(), call)
    same_dtype = measure(model, call, autocast)
    report = patch(model, quiet=True, **options)
    assert report.replaced["attention"], report
    got = measure(model, call, autocast)
    if train and not options.get("keep_logits"):
        assert "logits" not in got
    else:
        assert "logits" in got
    for name, tensor in got.items():
        assert_parity(name, tensor, wide[name], same_dtype[name], autocast)
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), f"{name}: the gradient has another layout"


# ---- nanoGPT -----------------------------------------------------------------------------------------------------------


def make_nanogpt(device, dropout=0.0, bias=True, flash=True, **shape):
    config = {"block_size": 32, "vocab_size": V, "n_layer": 2, "n_head": 2, "n_embd": 24, **shape}
    return nanogpt_model.GPT(nanogpt_model.GPTConfig(dropout=dropout, bias=bias, **config), flash).to(device)


def batch(device, B=2, T=17):
    """Token ids and targets (B, T), some of them ignored."""
    idx, targets = torch.randint(0, V, (2, B, T), device=device)
    targets[0, : T - 1 : 3] = -1  # nanoGPT's ignore_index
    return idx, targets


def loss_of(idx, targets):
    def call(model):
        logits, loss = model(idx, targets)
        return {"logits": logits, "loss": loss}

    return call


# ---- Hugging Face ------------------------------------------------------------------------------------------------------


def make_huggingface(device, cls=GPT2LMHeadModel, dropout=0.0, implementation="sdpa", **changes):
    config = {
        **{"n_layer": 2, "n_head": 2, "n_embd": 24, "n_positions": 32, "vocab_size": V},
        **{"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout},
        **{"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": implementation},
    }
    return cls(GPT2Config(**{**config, **changes})).to(device)


def tokens(device, B=2, T=17):
    return torch.randint(1, V, (B, T), device=device)


def labelled(ids, **kwargs):
    labels = ids.clone()
    labels[0, :2] = -100

    def call(model):
        outputs = model(ids, labels=labels, **kwargs)
        return {"loss": outputs.loss, "logits": outputs.logits}

    return call
