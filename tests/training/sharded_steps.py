"""A program for each rank: four clipped steps of a tiny GPT with FusedAdamW and with Muon, in FSDP2 (uneven shards), and
on a modern model with Muon in plain PyTorch, under DDP, too; rank 0 prints loss and gradient norm of each, then a checksum of
weights and states."""

from __future__ import annotations

import json
import os
import sys

import torch

from fastgpt import ops
from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.hardware import device

TINY = ModelConfig(n_layer=1, n_head=1, n_embd=17, block_size=8, vocab_size=33)
MODERN = ModelConfig(
    n_layer=1, n_head=3, n_embd=18, block_size=8, vocab_size=33, family="modern", n_kv_head=1, rotary_base=100.0,
    qk_norm=True, activation="relu2", tied_head=False, zero_init=True, embedding_norm=True, residual_scalars=True,
    value_embeddings=True, softcap=15.0,
)  # fmt: skip


def run(world, optim, parallel, shape, kernels="triton"):
    from fastgpt.model import GPT
    from fastgpt.optim.build import build_optimizer
    from fastgpt.training import distributed
    from fastgpt.training.step import Stepper

    torch.manual_seed(0)
    model = GPT(shape, ops.EAGER)
    forward, synchronize = distributed.parallelize(model, model.transformer.h, parallel, world)
    optimizer = build_optimizer(model, optim, kernels)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    stepper = Stepper(model, forward, optimizer, scaler, "fp32", 0.5, world, synchronize)
    generator = torch.Generator().manual_seed(1)
    steps = []
    for step in range(4):
        batches = torch.randint(0, 33, (2, 2, 9), generator=generator)[world.rank :: world.size]
        poison = float("nan") if step == 2 and world.rank == 0 else 1.0  # not finite on one rank: all must skip
        stepper.forward = lambda x, y, poison=poison: (None, forward(x, y)[1] * poison)
        loss, norm = stepper([(x[:, :-1], x[:, 1:]) for x in batches], len(batches), 1e-2)
        steps.append([loss.item(), norm.item()])

    def total(tensor):
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).double().abs().sum().item()

    return {
        "steps": steps,
        "skipped": stepper.skipped_steps(),
        "sharded": any(hasattr(p, "full_tensor") for p in model.parameters()),
        "moments": sum(total(m) for state in optimizer.state.values() for name, m in state.items() if name != "step"),
        "weights": [total(tensor) for tensor in model.state_dict().values()],
    }


def main() -> None:
    where = device.pick("cpu", "triton")  # the kernels themselves, in the interpreter
    from fastgpt.training import distributed

    adamw, muon = OptimConfig(grad_clip=0.5), OptimConfig(grad_clip=0.5, optimizer="muon", muon_normuon=True)
    torch.set_num_threads(1)
    with distributed.connect(where) as (world, where):
        result = {
            "adamw fsdp": run(world, adamw, "fsdp", TINY),
            "muon fsdp": run(world, muon, "fsdp", TINY),
            "modern fsdp": run(world, muon, "fsdp", MODERN, "eager"),
            "modern ddp": run(world, muon, "ddp", MODERN, "eager"),
        }
        if world.is_main:
            print("RESULT " + json.dumps(result), flush=True)
        distributed.leave(world.size, 0)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
