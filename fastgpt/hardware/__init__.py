"""The machine: GPUs and their peaks, measured ceilings, the choice of a device, the environment report.

``lookup("rtx4070").peak_flops("bf16")`` is a card's dense peak in FLOP per second; ``peak_flops(device, precision)`` is that of
a device that is present.
"""

from fastgpt.hardware.cards import GPUS, Gpu, card, lookup, peak_flops, present

__all__ = ["GPUS", "Gpu", "card", "lookup", "peak_flops", "present"]
