"""``patch(model)``: fused operations inside somebody else's nanoGPT, nanochat or Hugging Face GPT-2, in place.

docs/patch.md has the table of what is replaced and what is not."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from torch import nn

from fastgpt import ops as operations
from fastgpt.common import UserError
from fastgpt.kernels import runtime
from fastgpt.patching import huggingface, nanochat, nanogpt
from fastgpt.patching.plan import PatchPlan, PatchReport
from fastgpt.patching.probe import plain_defaults
from fastgpt.patching.swap import all_or_nothing, base_class, fuse, fused_modules, restore
from fastgpt.patching.verify import fuse_and_verify


def patch(model: nn.Module, *, keep_logits: bool = False, verify: Any = None, quiet: bool = False) -> PatchReport:
    """Replace attention, norms (with the residual add and its dropout), MLP and loss of ``model`` by the fused
    operations, in place. Return a report of what was replaced and what was kept; print it unless ``quiet``.

    ``model`` is a ``GPT`` of nanoGPT or nanochat (or a fork whose modules have its names) or transformers' ``GPT2LMHeadModel``
    or ``GPT2Model``: before or after its weights are loaded, on any device, in fp32, fp16 or bf16; before DDP,
    torch.compile, fully_shard or ``accelerator.prepare``. Parameters, names, state_dict, tied weights and ``generate`` stay
    as they are. Patching a patched model starts again with the new options.

    In train mode with targets (labels) the loss is computed without the logits, which are then None; with ``keep_logits``
    loss and logits are the model's own. In eval mode both are returned. nanochat's GPT returns one of the two in any case.

    ``verify`` is a small batch, (idx, targets) or a dict with labels: loss and gradients of the patched model are compared with
    its own on it, on the model's device and under the autocast that is on. The report has the figures.

    Raises UserError, and changes nothing, if the model is of another family, wrapped, or partly patched, or if it computes
    something else on ``verify`` than before.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> shape = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=64)
    >>> model = GPT2LMHeadModel(shape)
    >>> sorted(patch(model, quiet=True).replaced)
    ['MLP', 'attention', 'layer norm', 'loss', 'residual add with its norm']
    """
    family = _family(model)
    done = fused_modules(model)
    if done and "_fastgpt_patched" not in vars(model):
        raise UserError(
            f"{len(done)} modules of this {type(model).__name__} are patched and the model is not: "
            "fastgpt.unpatch(model) first, then patch it whole"
        )
    plan = PatchPlan()
    with all_or_nothing(model):
        for module in done:  # so that the modules are probed as they are
            restore(module)
        with plain_defaults(model):
            family.plan(model, plan, keep_logits)
        ops = operations.get("triton" if find_spec("triton") else "eager")
        verified = {}
        if verify is not None:
            verified = fuse_and_verify(model, plan.changes, ops, verify)
        else:
            for change in plan.changes:
                fuse(change, ops)
    # A plain attribute of the instance: not in the state_dict, and gone after unpatch.
    vars(model).update(_fastgpt_patched=True)
    if "loss" in plan.replaced and family is not nanochat:
        plan.notes.append("in train mode with targets the logits are None (keep_logits=True returns them)")
    report = PatchReport(plan.model, _runs_in(model), plan.replaced, plan.kept, tuple(plan.notes), verified)
    if not quiet and int(os.environ.get("RANK", 0)) == 0:
        print(report)
    return report


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched module in ``model`` its own forward again, and return the model, which may also be unpatched or
    partly patched. Raises UserError, and changes nothing, if a module has been wrapped since.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> shape = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=64)
    >>> model = GPT2LMHeadModel(shape)
    >>> report = patch(model, quiet=True)
    >>> unpatch(model) is model
    True
    """
    for wrapper in ("_orig_mod", "module"):
        if type(model).__name__ in _WRAPPERS and isinstance(getattr(model, wrapper, None), nn.Module):
            model = getattr(model, wrapper)
    with all_or_nothing(model):
        for module in fused_modules(model):
            restore(module)
    vars(model).pop("_fastgpt_patched", None)  # of a model whose own forward was kept
    return model


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


def _family(model: Any) -> Any:
    """The module of this package that patches models of this kind. Raises UserError."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model is a {name}: give patch a nanoGPT GPT, a nanochat GPT, or a GPT2LMHeadModel or GPT2Model of transformers"
        )
    if name in _WRAPPERS:
        raise UserError(f"model is wrapped in {name}: patch the model itself, before it is wrapped or compiled")
    if base_class(model).__module__ == "fastgpt.model":
        raise UserError("model is fastgpt's own GPT: it needs no patch, make it with GPT(config, fastgpt.ops.TRITON)")
    for family in (huggingface, nanogpt, nanochat):
        if family.matches(model):
            return family
    for inner, module in model.named_modules():
        if any(family.matches(module) for family in (huggingface, nanogpt, nanochat)):
            raise UserError(f"model is a {name}: patch its body with fastgpt.patch(model.{inner})")
    known = (
        f"model is a {name}: patch knows nanoGPT's GPT, nanochat's, and GPT2LMHeadModel and GPT2Model of transformers"
    )
    like, near = "nanoGPT", nanogpt.missing
    if any(inner.endswith(".attn.c_q") for inner, _ in model.named_modules()):
        like, near = "nanochat", nanochat.missing
    lacks = f"; as {like}'s it lacks {near(model)}" if hasattr(model, "transformer") else ""
    raise UserError(known + lacks)


def _runs_in(model: nn.Module) -> str:
    if not find_spec("triton"):
        return "PyTorch computes everything, as triton is not installed"
    device = next(model.parameters()).device.type
    if device == "cuda":
        return "Triton kernels"
    if device == "cpu" and runtime.INTERPRET:
        return "Triton's interpreter"
    return f"PyTorch computes while the model is on {device}, Triton kernels once it is on a CUDA GPU"
