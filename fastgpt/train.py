"""Train a GPT-2: ``python train.py`` in a checkout, ``fastgpt train`` or ``python -m fastgpt.train`` everywhere."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec

from fastgpt import common
from fastgpt.config import parse


def _told(data: str) -> tuple[str, int] | None:
    """Tokenizer and vocabulary of a folder of tokens, as it says itself."""
    from fastgpt.data.resolution import told  # NumPy: no help page needs it

    return told(data)


def main(args: list[str]) -> int:
    if {"-h", "--help"} & set(args):  # no torch, whose import takes seconds: the driver's tool is sign enough of a GPU
        parse(args, "cuda" if shutil.which("nvidia-smi") else "cpu", "triton" if find_spec("triton") else "eager")
    with common.importing():
        from fastgpt.hardware import device, requirements
    kind = device.present()
    config = parse(args, kind, "eager" if requirements.no_triton(kind) else "triton", _told)
    if config.train.explain_kernels is not None:
        from fastgpt.training.explain import explain

        return explain(config, common.console(width=None if sys.stdout.isatty() else 140, highlight=False))
    where = device.pick(config.train.device, config.train.kernels, compiled=config.train.compile)
    # After pick(): it chooses Triton's interpreter before triton is imported.
    with common.importing():
        from fastgpt.training import distributed, loop

    run, code = loop.train(config, where)
    distributed.leave(run.world.size, code)
    return code


if __name__ == "__main__":
    common.run(main)
