"""Muon for the matrices of a model, and MuonAdamW, which is one optimizer made of Muon and an AdamW for everything else.

Muon (Jordan et al. 2024) moves a matrix by its momentum after all singular values of it have been brought near 1 with a few
steps of Newton-Schulz (``kernels/reference.py`` has the equations). The momentum is kept as torch.optim.Muon keeps it, whose
state_dict loads here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastgpt.kernels import reference, runtime, working_copy
from fastgpt.optim.shared import (
    DeviceOptimizer,
    DeviceTable,
    check_clip,
    check_numbers,
    check_state,
    local,
    sum_of_squares,
)

SCRATCH = 32 * 2**20
"""Most elements of one batch of matrices. Newton-Schulz needs 4 bytes for each on a GPU, and for square ones 8."""


@dataclass(frozen=True)
class Piece:
    """A matrix that is orthogonalized alone: rows ``first`` to ``last`` of a parameter."""

    param: Tensor
    group: int
    first: int
    last: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    @property
    def tall(self) -> bool:
        """More rows than columns: it is transposed, as the smaller side of the two costs less."""
        return self.last - self.first > self.param.shape[1]

    def oriented(self, matrix: Tensor) -> Tensor:
        """A (short side, long side) matrix of a batch as the parameter has it, a view."""
        return matrix.mT if self.tall else matrix


class Muon(DeviceOptimizer):
    """Momentum and Newton-Schulz for 2-d parameters in fp32 (fp64 works, too, for tests).

    - ``split``, of a parameter group: rows of each matrix that is packed into one parameter, (C, C, C) for queries, keys and
      values; each is orthogonalized alone. None: whole parameters.
    - ``lr``: the update has singular values of about lr sqrt(max(1, rows / columns)).
    - ``nesterov``, ``momentum``: the buffer is an average, m <- mu m + (1 - mu) g.
    - ``weight_decay`` is decoupled, times lr; ``cautious`` decays only where weight and update have one sign.
    - ``coefficients``: "classic", or "polar" for Polar Express; ``ns_steps`` of them.
    - ``normuon``: each row is divided by the running root mean square of its own updates, with ``beta2``, at the matrix's norm
      as it was (Li et al. 2025, arXiv 2510.05491).
    - Sharded parameters (FSDP2's DTensors) are gathered one by one, and each rank updates its shard.
    - ``grad_scale`` and ``found_inf``, where a GradScaler or MuonAdamW sets them, are read on the device.

    Iterations are in bf16 on a GPU. On a CPU they are in fp32: few have bf16 units, and without them bf16 is the slower.
    Each parameter's state is ``momentum_buffer``, and with normuon ``second_moment`` (rows, 1).

    CUDA graphs: as FusedAdamW, with ``sync_hyperparameters`` before a replay and ``graph_tensors``.
    Raises ValueError for a value or a parameter that does not fit.

    >>> qkv = torch.nn.Linear(8, 24, bias=False)  # queries, keys and values: three matrices
    >>> optimizer = Muon([{"params": [qkv.weight], "split": (8, 8, 8)}], lr=0.02)
    >>> qkv(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        ns_steps: int = 5,
        coefficients: str = "classic",
        cautious: bool = False,
        normuon: bool = False,
        beta2: float = 0.95,
        eps: float = 1e-7,
        dtype: torch.dtype | None = None,
        fused: bool | None = None,
    ) -> None:
        """``dtype``: of the iterations, if not as above. ``fused``: by the Triton kernels; None: wherever they run."""
        self.dtype = dtype
        if fused or (fused is None and find_spec("triton") is not None):
            from fastgpt.kernels import fused_muon

            self._kernels: Any = fused_muon  # which leaves what they cannot do to the reference
        else:
            self._kernels = reference
        self._hyper = DeviceTable()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "cautious": cautious,
            "normuon": normuon,
            "beta2": beta2,
            "eps": eps,
            "split": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.Muon, whose groups say nothing of some settings: these stay as they
        are. Raises ValueError, before anything is replaced, for the state of other parameters or of another optimizer."""
        self.check_state(state_dict)
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before):
            group.update({name: value for name, value in own.items() if name not in group})

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError unless it is a state for these parameters."""
        for group in state_dict["param_groups"]:
            if "momentum" not in group or group.get("adjust_lr_fn") == "match_rms_adamw":
                raise ValueError(
                    "the state is of another optimizer, or of a torch.optim.Muon whose adjust_lr_fn is 'match_rms_adamw', "
                    "which gives its rates another meaning: load the state of a Muon"
                )
        for index, param, state in self.matched(state_dict):
            by_row = {"second_moment": torch.Size((len(param), 1))} if "second_moment" in state else {}
            check_state(f"parameter {index}", param, state, "a Muon", {"momentum_buffer": param.shape, **by_row})

    def graph_tensors(self) -> list[Tensor]:
        """What a captured step reads and writes besides gradients."""
        return [*self._hyper.tensors(), *self.state_tensors()]

    def sync_hyperparameters(self) -> None:
        """Bring what ``param_groups`` say to the table that the kernels read: before each replay of a captured step."""
        # A fourth column, unused, so that every row begins at a multiple of 16 bytes: else triton compiles a second binary.
        rows = [[group["lr"], group["momentum"], group["weight_decay"], 0.0] for group in self.param_groups]
        self._hyper.sync(rows, self.device)

    def _update(self) -> None:
        self.sync_hyperparameters()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        params = list(self.with_gradients())
        ahead: dict[Tensor, DTensor] = {  # of sharded parameters: their directions, sharded as well
            param: self._sharded_direction(param, i, scale, found_inf)
            for param, i in params
            if isinstance(param, DTensor)
        }
        # Of parameters that are about to change.
        copies = {param: copy for param, _ in params if (copy := working_copy.existing(param)) is not None}
        for pieces in self._batches():
            x, whole = self._empty(pieces), None
            for i, piece in enumerate(pieces):
                out = piece.oriented(x[i])
                if (sharded := ahead.get(piece.param)) is None:
                    self._direction(piece.param, piece.group, piece.rows, out, scale, found_inf)
                    continue
                if i == 0 or pieces[i - 1].param is not piece.param:
                    whole = sharded.full_tensor()
                assert whole is not None
                out.copy_(whole[piece.rows])
            group = self.param_groups[pieces[0].group]
            x = self._kernels.orthogonalize(x, group["coefficients"], group["ns_steps"], group["eps"])
            factors = self._row_factors(pieces, x, found_inf) if group["normuon"] else [None] * len(pieces)
            for piece, matrix, rows in zip(pieces, x, factors):
                self._apply(piece, piece.oriented(matrix), rows, found_inf, copies.get(piece.param))
        for param in copies:
            working_copy.mark_fresh(param)

    def _batches(self) -> list[list[Piece]]:
        """The matrices that have a gradient, those of one shape and kind together, as many as SCRATCH allows."""
        alike: dict[tuple, list[Piece]] = {}
        for param, i in self.with_gradients():
            group, first = self.param_groups[i], 0
            same = *(group[name] for name in _ALIKE), *((group["beta2"],) if group["normuon"] else ())
            for n in group["split"] or (param.shape[0],):
                kind = (*sorted((n, param.shape[1])), param.dtype, *same)
                alike.setdefault(kind, []).append(Piece(param, i, first, first + n))
                first += n
        batches = []
        for (short, long, *_), pieces in alike.items():
            most = max(1, SCRATCH // max(1, short * long))
            batches += [pieces[i : i + most] for i in range(0, len(pieces), most)]
        return batches

    def _empty(self, pieces: list[Piece]) -> Tensor:
        """What a batch is iterated in: (matrices, short side, long side)."""
        sides = sorted((pieces[0].last - pieces[0].first, pieces[0].param.shape[1]))
        return torch.empty(len(pieces), *sides, dtype=self._dtype(pieces[0].param), device=pieces[0].param.device)

    def _dtype(self, param: Tensor) -> torch.dtype:
        on_gpu = param.is_cuda or runtime.compile_only is not None
        return self.dtype or (torch.bfloat16 if on_gpu and param.dtype == torch.float32 else param.dtype)

    def _direction(
        self, param: Tensor, group: int, rows: slice, out: Tensor, scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Advance the momentum of these rows of this rank's shard, and put their direction into ``out``."""
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        assert param.grad is not None
        grad, buffer = local(param.grad)[rows], local(state["momentum_buffer"])[rows]
        nesterov = self.param_groups[group]["nesterov"]
        self._kernels.muon_momentum(grad, buffer, out, self._hyper.tensor[group], nesterov, scale, found_inf)

    def _sharded_direction(self, param: DTensor, group: int, scale: Tensor | None, found_inf: Tensor | None) -> DTensor:
        out = torch.empty_like(local(param), dtype=self._dtype(param))
        self._direction(param, group, slice(None), out, scale, found_inf)
        return DTensor.from_local(
            out, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    def _row_factors(self, pieces: list[Piece], x: Tensor, found_inf: Tensor | None) -> list[Tensor]:
        """NorMuon: what each row of each matrix is multiplied by, fp32, after the second moments have advanced."""
        beta2 = self.param_groups[pieces[0].group]["beta2"]
        factors: dict[Piece, Tensor] = {}
        for tall in (False, True):
            members = [i for i, piece in enumerate(pieces) if piece.tall == tall]
            if not members:
                continue
            side, dtype = (1 if tall else 2), torch.promote_types(x.dtype, torch.float32)
            norms = torch.linalg.vector_norm(x, dim=side, dtype=dtype)
            # Not norms[members]: indices would come from the host, which a CUDA graph cannot capture.
            square = torch.stack([norms[i] for i in members]).square() / x.shape[side]
            states = [self._second_moment(pieces[i].param) for i in members]
            before = torch.stack([whole[pieces[i].rows, 0] for i, (_, whole) in zip(members, states)])
            moment = before + (square - before) * (1 - beta2)
            if found_inf is not None:
                moment = torch.where(found_inf.squeeze() == 0, moment, before)
            factor = moment.clamp(min=1e-20).rsqrt()
            norm = (square.sum(1) / (square * factor.square()).sum(1).clamp(min=1e-30)).sqrt()
            for i, row, (state, _), new in zip(members, factor * norm[:, None], states, moment):
                factors[pieces[i]] = row
                here, there = _overlap(pieces[i])
                local(state)[here, 0] = new[there]
        return [factors[piece] for piece in pieces]

    def _second_moment(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """The state, and the same of all ranks."""
        state = self.state[param]
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(param.detach()[:, :1])
        moment = state["second_moment"]
        return moment, moment.full_tensor() if isinstance(moment, DTensor) else moment

    def _apply(
        self, piece: Piece, direction: Tensor, factors: Tensor | None, found_inf: Tensor | None, copy: Tensor | None
    ) -> None:
        group = self.param_groups[piece.group]
        here, there = _overlap(piece)
        param = local(piece.param.detach())[here]
        scale = math.sqrt(max(1, direction.shape[0] / max(1, direction.shape[1])))
        factors = None if factors is None else factors[there]
        copy = None if copy is None else copy[here]
        self._kernels.muon_update(
            param, direction[there], self._hyper.tensor[piece.group], scale, group["cautious"], factors, found_inf, copy
        )


class MuonAdamW(DeviceOptimizer):
    """One optimizer of two: ``muon`` for matrices, ``adamw`` (FusedAdamW or torch.optim.AdamW) for everything else, with one
    list of groups, Muon's first, and one state_dict.

    ``max_grad_norm`` clips the norm of all gradients together, of both parts, as ``clip_grad_norm_`` would. Like FusedAdamW it
    has ``grad_norm`` (before clipping, unscaled), skips on the device a step whose norm is inf or NaN, counts these in
    ``skipped_steps``, and unscales what GradScaler has scaled. Raises ValueError for a max_grad_norm that is not positive.

    >>> layer = torch.nn.Linear(8, 8)
    >>> optimizer = MuonAdamW(Muon([layer.weight]), torch.optim.AdamW([layer.bias]), max_grad_norm=1.0)
    >>> layer(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(self, muon: Muon, adamw: Optimizer, max_grad_norm: float | None = None) -> None:
        check_clip(max_grad_norm)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.muon, self.adamw, self.max_grad_norm = muon, adamw, max_grad_norm
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor = torch.zeros((), dtype=torch.int64)
        self._share()

    @classmethod
    def from_optimizer(cls, optimizer: Optimizer, *, max_grad_norm: float | None = None) -> MuonAdamW:
        """Take over nanochat's MuonAdamW: its parameter groups (the very dictionaries, with ``kind`` and ``initial_lr``, so
        that schedules on the old optimizer go on), momentum and moments. Do not step the old one again.

        Settings are nanochat's: Nesterov momentum, Polar Express, NorMuon, cautious decay. Three things differ: nanochat (as
        of July 2026) also brings the rows to one norm before the iteration, and the whole matrix after it, and its second
        moment of a wide matrix is of columns; ours is of rows, and begins anew there.

        Raises TypeError for another optimizer, and ValueError with several ranks, whose gradients nanochat's averages."""
        groups: dict[Any, list[dict[str, Any]]] = {"muon": [], "adamw": []}
        for group in optimizer.param_groups:
            groups.setdefault(group.get("kind"), []).append(group)
        if len(groups) > 2 or not all(groups.values()):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}: from_optimizer takes over nanochat's MuonAdamW, whose groups "
                "are of kind 'muon' and 'adamw'"
            )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "several ranks train: nanochat's optimizer averages their gradients, and fastgpt's leaves that to DDP, so take "
                "it over in a run on one GPU"
            )
        from fastgpt.optim.adamw import FusedAdamW

        old = torch.optim.AdamW(groups["adamw"])
        for param in chain.from_iterable(group["params"] for group in groups["adamw"]):
            old.state[param].update(optimizer.state.get(param, {}))
        muon = Muon(groups["muon"], coefficients="polar", cautious=True, normuon=True)
        for group in groups["muon"]:
            stacked = optimizer.state.get(group["params"][0], {})  # nanochat keeps that of the whole group there
            for i, param in enumerate(group["params"] if "momentum_buffer" in stacked else ()):
                muon.state[param]["momentum_buffer"] = stacked["momentum_buffer"][i].clone()
                moment = stacked["second_momentum_buffer"][i]
                if moment.shape == (len(param), 1):
                    muon.state[param]["second_moment"] = moment.clone()
        return cls(muon, FusedAdamW.from_optimizer(old), max_grad_norm)

    def _share(self) -> None:
        """Let both parts have the groups and states of this one: the very dictionaries."""
        self.state.update({**self.muon.state, **self.adamw.state})
        self.muon.state = self.adamw.state = self.state
        self.param_groups[:] = [*self.muon.param_groups, *self.adamw.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError, before anything is replaced, for a state that does not fit."""
        groups, n = state_dict["param_groups"], len(self.muon.param_groups)
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(f"the state has groups of {sizes} parameters: load that of a MuonAdamW over the same ones")
        own, other = (
            {"param_groups": part, "state": {i: s for i, s in state_dict["state"].items() if i in _indices(part)}}
            for part in (groups[:n], groups[n:])
        )
        self.muon.check_state(own)
        self.adamw.load_state_dict(other)
        self.muon.load_state_dict(own)
        self.state.clear()
        self._share()

    def graph_tensors(self) -> list[Tensor]:
        """What a captured step reads and writes besides gradients."""
        return [self.skipped_steps, *self.muon.graph_tensors(), *self.adamw.graph_tensors()]  # type: ignore[attr-defined]

    def sync_hyperparameters(self) -> None:
        """Before each replay of a captured step."""
        self.muon.sync_hyperparameters()
        self.adamw.sync_hyperparameters()  # type: ignore[attr-defined]

    def _update(self) -> None:
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        self.skipped_steps = self.skipped_steps.to(self.device)
        if not params:
            return
        scale = getattr(self, "grad_scale", None)
        norm = sum_of_squares([param.grad for param in params], scale).sqrt()
        skip = ~torch.isfinite(norm)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            skip = skip | (found_inf.squeeze() != 0)
        self.grad_norm = norm
        self.skipped_steps += skip
        if self.max_grad_norm is not None:  # the factor on the gradients as a scale that divides them
            clip = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
            scale = clip if scale is None else clip * scale.squeeze()
        flags = {"found_inf": skip.float(), **({} if scale is None else {"grad_scale": scale})}
        fused = all(group.get("fused") for group in self.adamw.param_groups)
        if isinstance(self.adamw, torch.optim.AdamW) and (
            not fused or any(isinstance(param, DTensor) for param in params)
        ):
            if skip:  # it takes flags only when it is fused and has no DTensors, so the host has to look
                return
            for param in params if scale is not None else ():
                local(param.grad).div_(scale)  # type: ignore[arg-type]
            flags = {}
        for part in (self.muon, self.adamw):
            part.__dict__.update(flags)
            try:
                part.step()
            finally:
                for name in flags:
                    del part.__dict__[name]


def _indices(groups: list[dict[str, Any]]) -> set[int]:
    return set(chain.from_iterable(group["params"] for group in groups))


def _overlap(piece: Piece) -> tuple[slice, slice]:
    """The rows of a piece that this rank has: in its shard of the parameter, and in the piece."""
    param = piece.param
    if not isinstance(param, DTensor):
        return piece.rows, slice(None)
    first, last = 0, len(param)
    for dim, placement in enumerate(param.placements):
        if placement.is_shard():
            size = -(-len(param) // param.device_mesh.size(dim))
            first = min(param.device_mesh.get_local_rank(dim) * size, last)
            last = min(first + size, last)
    low, high = max(first, piece.first), max(first, piece.first, min(last, piece.last))
    return slice(low - first, high - first), slice(low - piece.first, high - piece.first)


_ALIKE = ("coefficients", "ns_steps", "eps", "normuon")
"""Settings of a group that all matrices of a batch have to share."""


def _check_group(group: dict[str, Any]) -> None:
    check_numbers(group, "lr", "weight_decay", "eps")
    for name in ("momentum", "beta2"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"{name} is {group[name]}: it must be in [0, 1)")
    if group["coefficients"] not in ("classic", "polar"):
        raise ValueError(f"coefficients is {group['coefficients']!r}: use 'classic' or 'polar'")
    if not isinstance(group["ns_steps"], int) or not 1 <= group["ns_steps"] <= 100:
        raise ValueError(f"ns_steps is {group['ns_steps']}: give 1 to 100 steps")
    split = group["split"]
    if split is not None and not (
        isinstance(split, (tuple, list)) and all(isinstance(rows, int) and rows > 0 for rows in split)
    ):
        raise ValueError(f"split is {split}: give the rows of each matrix, such as (768, 768, 768)")
    for param in group["params"]:
        if param.dim() != 2:
            raise ValueError(
                f"a parameter has shape {tuple(param.shape)}: Muon updates matrices, so give those of other dimensions to AdamW"
            )
        if param.dtype not in (torch.float32, torch.float64) or param.layout != torch.strided:
            kind = param.dtype if param.layout == torch.strided else param.layout
            raise ValueError(f"a parameter is {kind}: Muon updates dense fp32 masters, so keep it in float32")
        if group["split"] is not None and sum(group["split"]) != len(param):
            raise ValueError(
                f"split is {tuple(group['split'])}: its rows must add up to the {len(param)} of a parameter"
            )
        shards = [p for p in getattr(param, "placements", ()) if not p.is_replicate()]
        if len(shards) > 1 or any(not p.is_shard(0) for p in shards):
            raise ValueError(
                f"a parameter is sharded as {param.placements}: Muon takes shards of rows, as fully_shard makes them"
            )
