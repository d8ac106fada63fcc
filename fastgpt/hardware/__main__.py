"""What a GPU can do, and what an MFU means on it: ``python -m fastgpt.hardware rtx4070 --nanogpt-mfu 12.9``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import Annotated

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, teraflops
from fastgpt.hardware.cards import GPUS, NANOGPT_PEAK, Gpu, card, present


def describe(gpu: Gpu) -> str:
    chip = gpu.chip
    lines = [
        f"{gpu.name}  ({chip.name}, {gpu.arch})",
        f"  {gpu.sm_count} SMs at {gpu.boost_mhz} MHz, {gpu.power_w} W",
        f"  memory {gpu.vram_gb} GB at {gpu.memory_gbs:g} GB/s, L2 {gpu.l2_mb} MB",
        f"  per SM: shared memory {chip.shared_per_sm // 1024} KB (a block: at most {chip.shared_per_block:,} bytes),",
        f"    {chip.registers:,} registers, {chip.max_warps} warps, {chip.max_blocks} blocks",
        "  dense peak, TFLOP/s (accumulating in fp32 unless named fp16acc):",
    ]
    for arithmetic, tflops in gpu.to_json()["dense_tflops"].items():
        lines.append(f"    {arithmetic:13} " + ("n/a" if tflops is None else f"{tflops:7.1f}"))
    source = textwrap.fill(f"source: {gpu.source}", command.WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join([*lines, source])


@dataclass(frozen=True)
class HardwareConfig:
    """What a GPU can do: dense peak per arithmetic, memory, limits.

    Examples:
      python -m fastgpt.hardware                                the card in this machine
      python -m fastgpt.hardware rtx4070
      python -m fastgpt.hardware --list                         every card that is known
      python -m fastgpt.hardware rtx4070 --nanogpt-mfu 12.9
    """

    name: Annotated[tuple[str, ...], Arg("GPU", positional=True)] = ()
    """torch's device name or a short form such as rtx4070 or h100. Without it, the card in this machine."""
    list: bool = False
    """Print every card in the table: memory, and dense peak in 16 bits."""
    json: bool = False
    """Print JSON."""
    nanogpt_mfu: Annotated[float | None, Arg("PERCENT")] = None
    """An mfu as nanoGPT prints it, in percent of an A100, translated into this card's own peak."""

    def __post_init__(self) -> None:
        if self.list and (self.name or self.nanogpt_mfu):
            raise UserError("list is for the whole table: leave out the card and nanogpt_mfu")
        if self.nanogpt_mfu is not None and not self.nanogpt_mfu > 0:
            raise UserError(f"nanogpt_mfu is {self.nanogpt_mfu}: it must be positive, in percent (12.9)")


def show(asked: HardwareConfig) -> str:
    """What the command prints. Raises UserError if no card is named and this machine's is not known."""
    if asked.list:
        return dumps([gpu.to_json() for gpu in GPUS], indent=2) if asked.json else "\n".join(map(_line, GPUS))
    gpu = card(" ".join(asked.name)) if asked.name else present()
    if gpu is None:
        import torch

        from fastgpt.hardware.requirements import name_a_gpu

        if torch.cuda.is_available():
            raise UserError(f"{torch.cuda.get_device_name()} is not in the table: its nominal peak is n/a")
        raise UserError(name_a_gpu())
    if asked.json:
        return dumps(gpu.to_json(), indent=2)
    return describe(gpu) if asked.nanogpt_mfu is None else translate(gpu, asked.nanogpt_mfu)


def _line(gpu: Gpu) -> str:
    """A card of the list. Turing and Volta have no bf16."""
    arithmetic = "bf16" if gpu.peak_flops("bf16") else "fp16"
    peak = teraflops(gpu.peak_flops(arithmetic) or 0)
    return f"{gpu.name:<42} {gpu.arch:<6} {gpu.vram_gb:4} GB {peak:>13} {arithmetic}"


def translate(gpu: Gpu, percent: float) -> str:
    """What an mfu printed by nanoGPT, whose denominator is an A100 on every card, means on ``gpu``."""
    flops, peak = percent / 100 * NANOGPT_PEAK, gpu.peak_flops("bf16")
    own = "n/a (no bf16)" if peak is None else f"{flops / peak:.1%} of its dense bf16 peak, {teraflops(peak)}"
    return f"nanoGPT's mfu of {percent:g}% is {teraflops(flops)}; on the {gpu.name} that is {own}"


def main(args: Sequence[str]) -> int:
    print(show(command.parse(HardwareConfig, args, "fastgpt.hardware")))
    return 0


if __name__ == "__main__":
    common.run(main)
