"""The ways to run a training step that the benchmarks compare, by the names that their results give them."""

from __future__ import annotations

from typing import NamedTuple


class StepVariant(NamedTuple):
    """One way to run a step, as the options of bench.steps.step with these names."""

    kernels: str
    compile: str = "none"
    """The mode of torch.compile."""
    cuda_graphs: str = "off"
    precision: str = "bf16"

    def flags(self) -> list[str]:
        """The command line of bench.steps.step that runs it."""
        return [word for name, value in self._asdict().items() for word in ("--" + name.replace("_", "-"), value)]


VARIANTS = {
    "eager": StepVariant("eager"),
    "triton": StepVariant("triton"),
    "triton+graphs": StepVariant("triton", cuda_graphs="on"),
    "compile": StepVariant("eager", "default"),
    "triton+compile": StepVariant("triton", "default"),
    "triton fp8": StepVariant("triton", precision="fp8"),
    "triton fp16-fast": StepVariant("triton", precision="fp16-fast"),
    "compile max-autotune": StepVariant("eager", "max-autotune-no-cudagraphs"),
}
"""eager is PyTorch with SDPA, F.cross_entropy, fused AdamW and clip_grad_norm_; triton is this repository's kernels."""

_BACKENDS = ("eager", "compile", "compile max-autotune", "triton", "triton+compile")
BACKENDS = {name.replace(" ", "-"): VARIANTS[name] for name in _BACKENDS}
"""Those that bench.mfu times in turns, by the names of its --backends."""
