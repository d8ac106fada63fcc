"""A patched model under the Trainer, Accelerate and DDP: real runs of a few steps."""

from __future__ import annotations

import gc
import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from bench.steps import nanogpt as nanogpt_model
from fastgpt.patching import patch
from tests import processes

KINDS = ("nanogpt", "huggingface")
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 31}


def huggingface():
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_positions=16, **SMALL, **quiet))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one state per process and refuses another precision."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def sequences(n=16):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 31, (n, 9), generator=generator)
    labels = rows.clone()
    labels[::2, :5] = -100  # unequal micro-batches: num_items_in_batch matters
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels)]


def test_trainer_trains_evaluates_and_saves_as_without_the_patch(tmp_path, device):
    """With gradient checkpointing, accumulation over unequal micro-batches, and a real evaluation."""

    def train(model, out):
        arguments = TrainingArguments(
            output_dir=str(out), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=device.type == "cpu", seed=7, save_strategy="no",
            disable_tqdm=True, gradient_checkpointing=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=sequences(), eval_dataset=sequences(4))
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model(str(out))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, metrics["eval_loss"]

    want, want_eval = train(huggingface(), tmp_path / "own")
    patched = huggingface()
    patch(patched, quiet=True)
    got, got_eval = train(patched, tmp_path / "patched")
    assert len(got) == 2 and got[-1] < got[0]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)  # the Trainer rounds what it logs to 4 digits
    torch.testing.assert_close(got_eval, want_eval, atol=1e-4, rtol=0)
    own, ours = (GPT2LMHeadModel.from_pretrained(tmp_path / name).state_dict() for name in ("own", "patched"))
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-3)


def test_accelerate_prepares_it_in_bf16_and_unwraps_it(device):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    model = huggingface()
    patch(model, quiet=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.stack([row["input_ids"] for row in sequences(4)]).to(accelerator.device)
    losses = []
    for _ in range(2):
        outputs = prepared(ids, labels=ids)
        assert outputs.logits is None
        accelerator.backward(outputs.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model and unwrapped(ids, labels=ids).logits is None


def test_patch_after_accelerates_prepare_keeps_the_loss_and_says_so(device):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    model = accelerator.prepare(huggingface())
    report = patch(model, quiet=True)
    assert "patch before that" in report.kept["loss"]
    ids = torch.arange(9, device=accelerator.device)[None]
    assert model(ids, labels=ids).logits is not None


def _rank(rank, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    for kind in KINDS:
        model, step = _model_and_step(kind)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        step(wrapped, slice(2 * rank, 2 * rank + 2)).backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{path}/{kind}-ddp-{rank}.pt")
        model, step = _model_and_step(kind)
        for module in (*model.transformer.h, model):
            fully_shard(module)
        step(model, slice(2 * rank, 2 * rank + 2)).backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        torch.save(gradients, f"{path}/{kind}-fsdp-{rank}.pt")
        del wrapped, model, module, gradients
    gc.collect()  # what holds on to the group's threads has to go before the group
    dist.barrier()
    dist.destroy_process_group()


def _model_and_step(kind):
    ids = torch.stack([row["input_ids"] for row in sequences(4)])
    if kind == "huggingface":
        model = huggingface()
        patch(model, quiet=True)
        return model, lambda model, rows: model(ids[rows], labels=ids[rows]).loss
    torch.manual_seed(0)
    model = nanogpt_model.GPT(nanogpt_model.GPTConfig(block_size=16, **SMALL))
    patch(model, quiet=True)
    return model, lambda model, rows: model(ids[rows, :-1], ids[rows, 1:].contiguous())[1]


def test_two_ranks_of_ddp_and_of_fsdp_have_the_gradients_of_one(tmp_path):
    processes.ensure_server()
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for kind in KINDS:
        model, step = _model_and_step(kind)
        step(model, slice(0, 4)).backward()
        for how, rank in itertools.product(("ddp", "fsdp"), range(2)):
            gradients = torch.load(tmp_path / f"{kind}-{how}-{rank}.pt", weights_only=True)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
