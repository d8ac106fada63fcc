"""A model's optimizer: which parameters decay, at which rates, and which implementation updates them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastgpt.config import OptimConfig


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups. Matrices and embeddings decay, norms and biases (fewer than two dimensions) do not. Where embeddings,
    head or vectors have a rate of their own, there is a group for each."""
    if optim.own_rates:
        kinds = by_kind(model)
        kinds["matrices"] += kinds.pop("qkv")
        return _groups(kinds, optim)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters as a recipe tells them apart: "matrices" of the blocks (``transformer.h``), among them packed
    projections apart as "qkv"; "embedding"s; "head", where it is no embedding; "scalar"s, which are vectors, too."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "qkv": [], "embedding": [], "head": [], "scalar": []}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if id(param) in embeddings:
            kinds["embedding"].append(param)
        elif param.dim() < 2:
            kinds["scalar"].append(param)
        elif not name.startswith("transformer.h."):
            kinds["scalar" if len(param) == 1 else "head"].append(param)  # a gate of one row is a vector
        else:
            kinds["qkv" if name.endswith("c_attn.weight") else "matrices"].append(param)
    return kinds


def _groups(kinds: dict[str, list[nn.Parameter]], optim: OptimConfig) -> list[dict[str, Any]]:
    rates = {"embedding": optim.embedding_lr, "head": optim.head_lr, "scalar": optim.scalar_lr}
    return [
        {
            "params": params,
            "weight_decay": 0.0 if kind == "scalar" else optim.weight_decay,
            "lr_ratio": (rates.get(kind) or optim.lr) / optim.lr,
        }
        for kind, params in kinds.items()
        if params
    ]


def muon_groups(kinds: dict[str, list[nn.Parameter]], optim: OptimConfig) -> list[dict[str, Any]]:
    """Muon's groups: takes "matrices" and "qkv" out of ``kinds``. Queries, keys and values of a packed projection are
    orthogonalized each alone, all heads of one of them together."""
    groups: list[dict[str, Any]] = [{"params": kinds.pop("matrices"), "split": None}]
    for param in kinds.pop("qkv"):
        rows, width = param.shape
        split = (
            width,
            (rows - width) // 2,
            (rows - width) // 2,
        )  # as many queries as the width; fewer keys with grouped heads
        if groups[-1]["split"] != split:
            groups.append({"params": [], "split": split})
        groups[-1]["params"].append(param)
    return [{**group, "lr_ratio": optim.muon_lr / optim.lr} for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim: OptimConfig, kernels: str) -> torch.optim.Optimizer:
    """FusedAdamW for triton, torch's own fused one for eager: same maths, same state_dict. With ``--optimizer muon`` a
    MuonAdamW of either. Clipping, where torch's AdamW is alone, is left to the caller."""
    clip, betas = optim.grad_clip or None, (optim.beta1, optim.beta2)
    if optim.optimizer == "muon":
        from fastgpt.optim.muon import Muon, MuonAdamW

        kinds = by_kind(model)
        muon = Muon(
            muon_groups(kinds, optim),
            optim.muon_lr,
            optim.muon_momentum,
            weight_decay=optim.muon_weight_decay,
            coefficients=optim.muon_coefficients,
            cautious=optim.muon_cautious,
            normuon=optim.muon_normuon,
            fused=kernels == "triton",
        )
        return MuonAdamW(muon, _adamw(_groups(kinds, optim), optim.lr, betas, kernels), max_grad_norm=clip)
    return _adamw(parameter_groups(model, optim), optim.lr, betas, kernels, max_grad_norm=clip)


def _adamw(
    groups: list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    kernels: str,
    max_grad_norm: float | None = None,
) -> torch.optim.Optimizer:
    if kernels == "triton":
        from fastgpt.optim.adamw import FusedAdamW

        return FusedAdamW(groups, lr=lr, betas=betas, eps=1e-8, max_grad_norm=max_grad_norm)
    first = groups[0]["params"][0]
    fused = first.is_cuda or not isinstance(first, DTensor)  # torch's fused one knows no DTensors on a CPU
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)
