"""Checkpoints of nanoGPT, fastgpt, Hugging Face and nanochat into each other: ``python -m fastgpt.convert IN OUT``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastgpt import command, common
from fastgpt.checkpoints.formats import Format
from fastgpt.command import Arg
from fastgpt.common import UserError, millions

_NAMES = {
    **{"nanogpt": "nanoGPT checkpoint", "fastgpt": "fastgpt run", "hf": "Hugging Face folder"},
    "nanochat": "nanochat checkpoint",
}


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a GPT-2 checkpoint: nanoGPT's ckpt.pt, a fastgpt run or checkpoint, a Hugging Face folder, any into any.

    What comes in is recognised. What goes out is nanoGPT's if OUT ends in .pt, else what --to says. Weights arrive bit for
    bit, and so does the optimizer's state between nanoGPT and fastgpt. Nothing is written unless everything fits. A model of
    --family modern goes to and from nanochat's folders (model_....pt, meta_....json) instead.

    Examples:
      python -m fastgpt.convert out/ckpt.pt runs/mine --to fastgpt    then: python train.py --init-from runs/mine
      python -m fastgpt.convert runs/mine my-gpt2 --to hf             then: GPT2LMHeadModel.from_pretrained("my-gpt2")
      python -m fastgpt.convert runs/mine my-gpt2 --push you/my-gpt2  and upload it, with its model card
      python -m fastgpt.convert runs/mine out/ckpt.pt                 then: nanoGPT's sample.py or --init_from=resume
      python -m fastgpt.convert gpt2 runs/gpt2                        OpenAI's weights, from the hub
      python -m fastgpt.convert runs/modern-124m d12 --to nanochat    then: nanochat's own scripts
    """

    source: Annotated[str, Arg("IN", positional=True)]
    """A file, a folder, or a model on the Hugging Face hub (gpt2, gpt2-medium, owner/name)."""
    out: Annotated[Path, Arg("OUT", positional=True)]
    """A file that ends in .pt, or a folder; it must not exist yet."""
    push: Annotated[str | None, Arg("NAME")] = None
    """Upload the Hugging Face folder as NAME, such as you/my-gpt2; private, unless there is a model of that name."""
    to: Format | None = None
    """What OUT is to be. Left out: nanogpt for .pt, fastgpt for what came from Hugging Face or nanochat, hf for what came from
    fastgpt, or nanochat if it is of the modern family."""


def main(args: list[str]) -> int:
    config = command.parse(ConvertConfig, args, "fastgpt.convert")
    from fastgpt.checkpoints import lock  # which import torch: no help page needs it
    from fastgpt.checkpoints.formats import huggingface, nanochat, nanogpt, own
    from fastgpt.checkpoints.formats.any import read

    out = config.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists: name another output, or remove it")
    kind, portable = read(config.source)
    to = config.to or ("hf" if config.push else _target(kind, out, portable.config.family))
    if to == "nanogpt" and out.suffix != ".pt":
        raise UserError(f"out is {out}: nanoGPT's checkpoint is a file that ends in .pt")
    if to != "nanogpt" and out.suffix == ".pt":
        raise UserError(f"out is {out}: a {_NAMES[to]} is a folder, so leave .pt out")
    if to in ("nanogpt", "hf") and portable.config.family != "gpt2":
        raise UserError(
            f"{config.source} is a {portable.config.family} model, which a {_NAMES[to]} cannot hold: use --to fastgpt or "
            "--to nanochat"
        )
    if config.push is not None and to != "hf":
        raise UserError(f"push is {config.push!r} but OUT is a {_NAMES[to]}: use --to hf")
    upload = huggingface.Upload(config.push) if config.push else None
    writers: dict[str, Callable[[Path, Any], None]] = {
        **{"nanogpt": nanogpt.write, "fastgpt": own.write, "nanochat": nanochat.write},
        "hf": partial(huggingface.write, called=config.push),
    }
    common.say(f"{_NAMES[kind]} {config.source} -> {_NAMES[to]} {out}")  # before what may take a minute
    try:
        with lock.held(out) if to == "fastgpt" else nullcontext():  # a run may have been started there meanwhile
            writers[to](out, portable)
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
    notes, shape = list(portable.notes), portable.config
    if portable.exact_gelu and to == "fastgpt":
        notes.append("trained with the exact GELU; fastgpt computes its tanh form, which differs by up to 0.0005")
    elif not portable.exact_gelu and to == "nanogpt":
        notes.append("trained with GELU's tanh form; nanoGPT computes the exact one, which differs by up to 0.0005")
    if portable.letters is not None and to == "nanogpt":
        notes.append("nanoGPT's sample.py takes the letters from data/NAME/meta.pkl, where NAME is config['dataset']")
    if broken := portable.not_finite():
        notes.append(
            f"{len(broken)} of {len(portable.weights)} weights hold NaN or infinity, {broken[0]} first: the model computes "
            "nothing, so take an earlier checkpoint"
        )
    moved = f"{millions(sum(tensor.numel() for tensor in portable.weights.values()))} parameters"
    if portable.optimizer is not None and portable.optimizer["state"] and to not in ("hf", "nanochat"):
        moved += ", optimizer state"
    common.say(f"  {moved}, step {portable.step}: {shape.in_words}")
    for note in notes:
        common.say(f"  note: {note}")
    if upload is not None:
        common.say(f"uploading to {upload.name} ...")
        common.say(f"  {upload.send(out)}")
    return 0


def _target(kind: Format, out: Path, family: str) -> Format:
    if out.suffix == ".pt":
        return "nanogpt"
    if kind == "nanogpt":
        raise UserError(f"out is {out}: say --to fastgpt or --to hf")
    if kind in ("hf", "nanochat"):
        return "fastgpt"
    return "hf" if family == "gpt2" else "nanochat"


if __name__ == "__main__":
    common.run(main)
