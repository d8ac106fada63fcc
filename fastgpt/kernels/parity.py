"""How far a kernel's result may be from PyTorch's: the bound of the tests, the benchmarks and ``patch(model, verify=batch)``.

The allowed error follows Apple's cut-cross-entropy tests: that of the same operation in plain PyTorch in the same dtype.
Both errors are measured against an fp64 run on the same (already rounded) inputs:

    rms error / rms(reference)      <= 2 x PyTorch's + 4 eps(output dtype) [+ 2 eps(operand dtype)]
    max |error| / max |reference|   <= 2 x PyTorch's + 4 eps(output dtype) [+ 2 eps(operand dtype)]

The operand term is for intermediates that the kernel must quantise to feed a tensor core (attention's P, dS; dlogits).
The bound is never widened.
"""

from __future__ import annotations

import torch
from torch import Tensor


def errors(got: Tensor, ref: Tensor) -> tuple[float, float]:
    """(rms error / rms of ref, max error / max of ref); absolute errors where ref is zero everywhere. ref is fp64."""
    if ref.numel() == 0:
        return 0.0, 0.0
    difference = got.detach().to(ref.device, torch.float64) - ref
    rms, peak = ref.square().mean().sqrt().item(), ref.abs().max().item()
    return difference.square().mean().sqrt().item() / (rms or 1.0), difference.abs().max().item() / (peak or 1.0)


def allowed(error: float, dtype: torch.dtype, operand_dtype: torch.dtype | None = None) -> float:
    """The largest error that a result in ``dtype`` may have where PyTorch's has ``error``."""
    return 2 * error + 4 * torch.finfo(dtype).eps + (2 * torch.finfo(operand_dtype).eps if operand_dtype else 0)
