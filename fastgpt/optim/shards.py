"""What optimizers need to know of FSDP2's shards: a rank's own part of a tensor, and a norm over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_squares(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    """Sum over all unscaled gradients, one fp32, the same on every rank. Raises ValueError if their shards differ in kind."""
    layouts = {(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None for grad in grads}
    if len(layouts) > 1:
        raise ValueError(
            "parameters are sharded in different ways: shard all of them alike, or use one FusedAdamW each"
        )
    norm = torch.nn.utils.get_total_norm([local(grad) for grad in grads]).float()
    total = (norm if grad_scale is None else norm / grad_scale.squeeze()).square()
    mesh, placements = next(iter(layouts)) or (None, ())
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            assert mesh is not None
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total
