"""The ways to run a training step that the benchmarks compare, by the names that their results give them."""

from __future__ import annotations

from typing import NamedTuple


class StepVariant(NamedTuple):
    """One way to run a step."""

    kernels: str
    compile: str = "none"
    """The mode of torch.compile."""
    cuda_graphs: str = "off"
    precision: str = "bf16"
    nanogpt: bool = False
    """The step and the model of nanoGPT's train.py (bench/steps/nanogpt.py) instead of ours."""


VARIANTS = {
    "eager": StepVariant("eager"),
    "triton": StepVariant("triton"),
    "triton+graphs": StepVariant("triton", cuda_graphs="on"),
    "compile": StepVariant("eager", "default"),
    "nanogpt": StepVariant("eager", "default", nanogpt=True),
    "triton+compile": StepVariant("triton", "default"),
    "triton fp8": StepVariant("triton", precision="fp8"),
    "triton fp16-fast": StepVariant("triton", precision="fp16-fast"),
    "compile max-autotune": StepVariant("eager", "max-autotune-no-cudagraphs"),
}
"""eager is PyTorch with SDPA, F.cross_entropy, fused AdamW and clip_grad_norm_; triton is this repository's kernels; nanogpt
is its train.py with --compile=True, as it is by default."""

PLAIN_STEPS = tuple(name for name, variant in VARIANTS.items() if variant.kernels == "eager")
"""Those in plain PyTorch: the first loss of one of them is what the others' has to be."""

_BACKENDS = ("eager", "compile", "compile max-autotune", "triton", "triton+compile", "nanogpt")
BACKENDS = {name.replace(" ", "-"): VARIANTS[name] for name in _BACKENDS}
"""Those that bench.mfu times in turns, by the names of its --backends."""
