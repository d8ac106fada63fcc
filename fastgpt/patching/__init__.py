"""``fastgpt.patch(model)`` puts the fused operations into a nanoGPT or Hugging Face GPT-2, in place.

docs/patch.md has the table of what is replaced and what is not."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fastgpt import ops as operations
from fastgpt.common import UserError
from fastgpt.patching import huggingface, nanogpt
from fastgpt.patching.plan import PatchPlan, PatchReport
from fastgpt.patching.swap import base_class, check_restorable, fuse, fused_modules, restore


def patch(model: nn.Module, *, keep_logits: bool = False, quiet: bool = False) -> PatchReport:
    """Replace attention, layer norms (with the residual add and its dropout), MLP and loss of ``model`` by the fused
    operations, in place. Return a report of what was replaced and what was kept; print it unless ``quiet``.

    ``model`` is a nanoGPT ``GPT`` (or a fork whose modules have its names) or transformers' ``GPT2LMHeadModel`` or
    ``GPT2Model``: before or after its weights are loaded, on any device, in fp32, fp16 or bf16; before DDP,
    torch.compile, fully_shard or ``accelerator.prepare``. Parameters, names, state_dict, tied weights and ``generate`` stay
    as they are. Patching a patched model starts again with the new options.

    In train mode with targets (labels) the loss is computed without the logits, which are then None; with ``keep_logits``
    loss and logits are the model's own. In eval mode both are returned.

    Raises UserError, and changes nothing, if the model is of another family, wrapped, or partly patched.
    """
    family = _family(model)
    done = fused_modules(model)
    if done and not is_patched(model):
        raise UserError(
            f"{len(done)} modules of this {type(model).__name__} are patched and the model is not: "
            "fastgpt.unpatch(model) first, then patch it whole"
        )
    # Modules patched before get their own forward back first, so that they are probed as they are; kept to undo a failure.
    earlier = [(module, type(module), dict(vars(module))) for module in done]
    for module in done:
        restore(module)
    changed: list[nn.Module] = []
    try:
        plan = PatchPlan()
        family.plan(model, plan)
        ops = operations.get("triton" if find_spec("triton") else "eager")
        for module, mixin in plan.changes:
            fuse(module, mixin, ops)
            changed.append(module)
    except BaseException:
        for module in changed:
            restore(module)
        for module, cls, state in earlier:
            module.__class__ = cls
            vars(module).update(state)
        raise
    # Plain attributes of the instance: not in the state_dict, and gone after unpatch.
    vars(model).update(plan.attributes, _fastgpt_keep_logits=keep_logits, _fastgpt_patched=True)
    report = _report(model, family, plan, keep_logits)
    if not quiet and int(os.environ.get("RANK", 0)) == 0:
        print(report)
    return report


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched module in ``model`` its own forward again, and return the model, which may also be unpatched or
    partly patched. Raises UserError, and changes nothing, if a module has been wrapped since."""
    for wrapper in ("_orig_mod", "module"):
        if type(model).__name__ in _WRAPPERS and isinstance(getattr(model, wrapper, None), nn.Module):
            model = getattr(model, wrapper)
    modules = fused_modules(model)
    for module in modules:
        check_restorable(module)
    for module in modules:
        restore(module)
    for name in [name for name in vars(model) if name.startswith("_fastgpt_")]:
        delattr(model, name)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether this whole model has been patched, not just a part of it."""
    return bool(vars(model).get("_fastgpt_patched", False))


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


def _family(model: Any) -> Any:
    """The module of this package that patches models of this kind. Raises UserError."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model is a {name}: give patch a nanoGPT GPT, or a GPT2LMHeadModel or GPT2Model of transformers"
        )
    if name in _WRAPPERS:
        raise UserError(f"model is wrapped in {name}: patch the model itself, before it is wrapped or compiled")
    if base_class(model).__module__ == "fastgpt.model":
        raise UserError("model is fastgpt's own GPT: it needs no patch, make it with GPT(config, fastgpt.ops.TRITON)")
    if huggingface.matches(model):
        return huggingface
    if nanogpt.matches(model):
        return nanogpt
    inner = getattr(model, "transformer", None)
    if isinstance(inner, nn.Module) and huggingface.matches(inner):
        raise UserError(f"model is a {name}: patch its body with fastgpt.patch(model.transformer)")
    raise UserError(f"model is a {name}: patch knows nanoGPT's GPT, and GPT2LMHeadModel and GPT2Model of transformers")


def _report(model: Any, family: Any, plan: PatchPlan, keep_logits: bool) -> PatchReport:
    name = base_class(model).__name__
    notes: list[str] = []
    if family is huggingface:
        import transformers

        name = f"{name} of transformers {transformers.__version__}"
        if "attention" in plan.replaced:
            notes += huggingface.notes()
    else:
        name = f"nanoGPT's {name}"
    kept = dict(plan.kept)
    replaced = dict(plan.replaced)
    if "loss" in replaced and keep_logits:
        del replaced["loss"]
        kept["loss"] = "keep_logits=True"
    elif "loss" in replaced:
        notes.append("in train mode with targets the logits are None (keep_logits=True returns them)")
    return PatchReport(name, _runs_in(model), replaced, kept, tuple(notes))


def _runs_in(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if not find_spec("triton"):
        return "PyTorch computes everything, as triton is not installed"
    from fastgpt.kernels import runtime

    if device.type == "cuda":
        return "Triton kernels"
    if device.type == "cpu" and runtime.INTERPRET:
        return "Triton's interpreter"
    return f"PyTorch computes while the model is on {device.type}, Triton kernels once it is on a CUDA GPU"
