"""Run an unmodified nanoGPT train.py with fastgpt's kernels: ``python -m fastgpt.nanogpt path/to/train.py config/x.py``.

Its model.py is imported first and the GPT class told to patch every model that it makes; then train.py runs as if it had been
called itself, with the same arguments, and in its own folder if that is where it finds its configurator.py.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError


@dataclass(frozen=True)
class NanogptConfig:
    """Run an unmodified nanoGPT train.py (or a fork's) with fastgpt's kernels in its model.

    What follows train.py goes to it as it is. With --compile=True or False; under torchrun as well: the model is patched when
    it is made, before it is compiled or wrapped. In train mode the model returns None for the logits, as it never forms them;
    nanoGPT's train.py does not use them. What is replaced is printed when the model is made; docs/patch.md has the table.

    Examples:
      python -m fastgpt.nanogpt train.py config/train_shakespeare_char.py
      python -m fastgpt.nanogpt train.py config/train_gpt2.py --batch_size=8
      torchrun --standalone --nproc_per_node=2 -m fastgpt.nanogpt train.py ...
    """

    script: Annotated[Path, Arg("TRAIN.PY", positional=True)]
    """nanoGPT's train.py, beside its model.py. What follows it is its own: [CONFIG.PY] [--key=value ...]"""
    fused_adamw: bool = False
    """Let fastgpt.FusedAdamW take over the optimizer that configure_optimizers makes."""


def main(args: list[str]) -> int:
    own = next((i for i, arg in enumerate(args, 1) if not arg.startswith("-")), len(args))  # up to train.py
    config = command.parse(NanogptConfig, args[:own], "fastgpt.nanogpt")
    script, rest = config.script.expanduser(), args[own:]
    if not script.is_file():
        raise UserError(f"{script} {'is not a file' if script.exists() else 'does not exist'}: name nanoGPT's train.py")
    script = script.resolve()
    # nanoGPT opens configurator.py, data/ and out/ relative to the working directory: its own.
    if not Path("configurator.py").exists() and (script.parent / "configurator.py").exists():
        rest = [str(Path(arg).resolve()) if "=" not in arg and Path(arg).exists() else arg for arg in rest]
        os.chdir(script.parent)
    sys.path.insert(0, str(script.parent))
    _patch_every_model(_import_model(script.parent), config.fused_adamw)
    sys.argv = [str(script), *rest]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _import_model(folder: Path) -> ModuleType:
    """model.py of ``folder``, as train.py will import it. Raises UserError unless it is there and has a class GPT."""
    if not (folder / "model.py").is_file():
        raise UserError(f"{folder} has no model.py: train.py has to lie beside nanoGPT's model.py")
    module = importlib.import_module("model")
    if not isinstance(getattr(module, "GPT", None), type):
        raise UserError(f"{folder / 'model.py'} has no class GPT: it is not nanoGPT's")
    return module


def _patch_every_model(module: Any, fused_adamw: bool) -> None:
    """Make ``GPT(...)`` and ``GPT.from_pretrained`` return patched models, and with ``fused_adamw`` their
    ``configure_optimizers`` a FusedAdamW."""
    from fastgpt.patching import patch

    GPT = module.GPT
    own_init = GPT.__init__

    @wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **kwargs)
        if type(self) is GPT:
            patch(self)

    GPT.__init__ = init
    if not fused_adamw:
        return
    if not hasattr(GPT, "configure_optimizers"):
        raise UserError("model.py's GPT has no configure_optimizers: leave --fused-adamw out")
    from fastgpt.optim.adamw import FusedAdamW

    own_optimizers = GPT.configure_optimizers

    @wraps(own_optimizers)
    def configure_optimizers(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedAdamW.from_optimizer(own_optimizers(self, *args, **kwargs))

    GPT.configure_optimizers = configure_optimizers


if __name__ == "__main__":
    common.run(main)
