"""All that a run consists of: built from a configuration, put into a checkpoint, and restored from one."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import __version__
from fastgpt.checkpoints import checkpoint, folder, rng
from fastgpt.common import LARGEST, UserError, file_sha256, shortened
from fastgpt.config import SECTIONS, Config, OptimConfig, differences
from fastgpt.data.loader import TokenLoader
from fastgpt.data.manifest import fingerprint
from fastgpt.data.resolution import ResolvedData, resolve
from fastgpt.data.tokenizer import CharTokenizer
from fastgpt.model import GPT
from fastgpt.ops import get as get_ops
from fastgpt.ops import scales_loss, usable_precision
from fastgpt.optim.build import build_optimizer
from fastgpt.schedule import micro_batches, micro_batches_until, window_limit
from fastgpt.training.distributed import World, parallelize
from fastgpt.training.step import LossScaler, Stepper

AUTOMATIC = False
"""Whether ``--cuda-graphs auto`` captures where it can: not before a GPU has shown what it gains."""

_WEIGHTS = ("model", "optimizer")
SPIKE_WINDOW = 128
"""Steps whose losses a spike is told from."""


def zscore(window: deque[float], loss: float) -> float | None:
    """How many standard deviations ``loss`` lies above the last ``SPIKE_WINDOW`` losses, as llm.c's outlier detector tells
    spikes from noise; it then joins them. None where that cannot be told: too few losses, no spread, or a loss that is not
    finite (which never joins)."""
    if not math.isfinite(loss):
        return None
    earlier = list(window)
    window.append(loss)
    if len(earlier) < SPIKE_WINDOW:
        return None
    mean = math.fsum(earlier) / SPIKE_WINDOW
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in earlier) / SPIKE_WINDOW)
    return (loss - mean) / deviation if deviation > 0 else None


@dataclass
class Run:
    """A run at ``step`` optimizer steps done. ``config`` says what was asked for; ``micro_batch`` and ``grad_accum`` what is
    in force (smaller and more of them after the GPU ran out of memory)."""

    config: Config
    device: torch.device
    world: World
    model: GPT
    stepper: Stepper
    train_loader: TokenLoader
    val_loader: TokenLoader
    micro_batch: int
    grad_accum: int
    """Micro-batches per step of this rank."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    step: int = 0
    best_val_loss: float = math.inf
    interval_losses: list[float] = field(default_factory=list)
    """Of the steps since the last log line."""
    eval_due: bool = True
    """Whether the model as it is now still has to be evaluated: at the start, and after an evaluation that was cut short."""
    last_losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))
    corpus: ResolvedData | None = None
    """What the loaders read."""
    refused: str | None = None
    """Why the precision that was asked for is not the one in force; None if it is."""

    def __post_init__(self) -> None:
        self.eval_batch = self.micro_batch
        """Windows in a batch of an evaluation: fewer after the GPU ran out of memory in one."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: plain values, and tensors that training goes on to change. Called by all ranks."""
        data = self.config.data
        tokenizer = self.corpus.tokenizer if self.corpus else None
        return {
            "run": self.id,
            "config": self.config.to_dict(),
            **({"letters": tokenizer.letters} if isinstance(tokenizer, CharTokenizer) else {}),
            **checkpoint.state_of(self.model, self.stepper.optimizer),
            "scaler": self.stepper.scaler.state_dict(),
            "loader": self.train_loader.state_dict(),
            "rng": rng.rng_state(),
            "best_val_loss": self.best_val_loss,
            "interval_losses": list(self.interval_losses),
            "eval_due": self.eval_due,
            "spikes": list(self.last_losses),
            "geometry": {
                "asked": [data.batch_size, data.grad_accum],
                "used": [self.micro_batch, self.grad_accum * self.world.size],
            },
        }

    def begin_step(self) -> int:
        """Set what a schedule says of the next step's windows. Returns the step's micro-batches on this rank."""
        optim, asked = self.config.optim, self.config.data.grad_accum // self.world.size
        if optim.window_warmup_iters:
            limit = window_limit(self.step, optim, self.config.model.block_size)
            self.model.transformer.limit_windows(limit)  # type: ignore[operator]
        return micro_batches(self.step, optim, asked) * self.grad_accum // asked

    def tokens(self, steps: int) -> int:
        """Tokens of the first ``steps`` steps, on all ranks."""
        asked = self.config.data.grad_accum // self.world.size
        return micro_batches_until(steps, self.config.optim, asked) * self.config.tokens_per_step // asked

    def mark(self) -> dict[str, Any]:
        """What a step changes before its update: kept at its start, so that an abandoned step leaves no trace."""
        return {"loader": self.train_loader.state_dict(), "rng": rng.rng_state()}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Back to the start of a step whose gradients were not applied."""
        self.stepper.optimizer.zero_grad(set_to_none=True)
        self.train_loader.load_state_dict(mark["loader"])
        rng.set_rng_state(mark["rng"])

    def set_geometry(self, micro_batch: int, grad_accum: int) -> None:
        """Go on with other micro-batches at the same tokens per step, at the very next window. ``grad_accum`` counts those
        of all ranks."""
        if self.stepper.graphs is not None:
            self.stepper.graphs.drop()
        position = self.train_loader.state_dict()
        self.close()
        self.micro_batch, self.grad_accum = micro_batch, grad_accum // self.world.size
        self.eval_batch = min(self.eval_batch, micro_batch)
        self.train_loader, self.val_loader = build_loaders(self.config, self.world, micro_batch, self.corpus)
        self.train_loader.load_state_dict(position)

    def close(self) -> None:
        for loader in (self.train_loader, self.val_loader):
            loader.close()


def choose_geometry(config: Config, device: torch.device, world: World) -> Config:
    """The configuration with its micro-batch decided: ``--batch-size auto`` takes the largest that fits.

    Raises UserError for a micro-batch that cannot fit (unless the doctor is off), naming what does.
    """
    if not (config.data.auto_batch or config.train.doctor):
        return config
    from fastgpt.performance import fitting

    room = min(world.gather(fitting.free_bytes(device.type)))  # the fullest of the GPUs decides for all
    if config.data.auto_batch:
        share = fitting.CPU_SHARE if device.type == "cpu" else 1
        micro_batch, grad_accum = fitting.fit_batch(config, int(share * room), world.size, device=device.type)
        return replace(config, data=replace(config.data, batch_size=micro_batch, grad_accum=grad_accum))
    fitting.check_fits(config, room, world.size, device=device.type)
    return config


def initial_weights(config: Config) -> tuple[Config, dict[str, Tensor] | None]:
    """``--init-from``: the configuration with the shape of that checkpoint (dropout stays), and its weights; None without.

    Raises UserError for what is not a checkpoint of a GPT-2, and for a tokenizer that its vocabulary is not made of.
    """
    if config.train.init_from is None:
        return config, None
    from fastgpt.checkpoints.formats.any import load_weights

    portable = load_weights(config.train.init_from)
    shape = portable.config
    if config.data.tokenizer != "gpt2" and shape.vocab_size > 256 and portable.tokenizer != config.data.tokenizer:
        raise UserError(
            f"tokenizer is {config.data.tokenizer!r} but init_from {config.train.init_from} has a vocabulary of "
            f"{shape.vocab_size}: use --tokenizer gpt2"
        )
    return replace(config, model=replace(shape, dropout=config.model.dropout)), portable.weights


def use_graphs(
    asked: str, device: torch.device, kernels: str, compiled: bool, ranks: int, optim: OptimConfig | None = None
) -> bool:
    """``--cuda-graphs``: whether to capture. Raises UserError for "on" where it cannot be."""
    changing = [name for name in ("batch_warmup_iters", "window_warmup_iters") if getattr(optim, name, 0)]
    reasons = {
        f"device is {device.type!r}: use --device cuda": device.type != "cuda",
        f"kernels is {kernels!r}: use --kernels triton": kernels != "triton",
        "compile is on: leave out --compile": compiled,
        f"the run has {ranks} ranks: use one": ranks > 1,
        f"{' and '.join(changing)} changes steps, which a graph repeats: leave it out": bool(changing),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if asked == "on" and reason is not None:
        raise UserError(f"cuda_graphs is 'on' but {reason}, or --cuda-graphs off")
    return reason is None and (asked == "on" or (asked == "auto" and AUTOMATIC))


def build(
    config: Config, device: torch.device, world: World | None = None, weights: dict[str, Tensor] | None = None
) -> Run:
    """Model (with ``weights``, or random ones), optimizer and loaders of a new run. Writes nothing but tokens into the
    user's cache.

    Raises UserError for anything that cannot work.
    """
    world = world or World()
    shape, seed, settings = config.model, config.train.seed, config.train
    graphs = use_graphs(settings.cuda_graphs, device, settings.kernels, settings.compile, world.size, config.optim)
    if config.optim.window_warmup_iters and (shape.family == "gpt2" or settings.compile):
        which = "compile is on, which would compile each window" if settings.compile else "a GPT-2 has no windows"
        raise UserError(f"window_warmup_iters is {config.optim.window_warmup_iters} but {which}: leave it out")
    if config.data.grad_accum % world.size:
        raise UserError(
            f"grad_accum is {config.data.grad_accum}, which {world.size} GPUs do not divide: the micro-batches of a step are "
            f"shared between them, so make it a multiple of {world.size}"
        )
    if weights is not None and world.size > 1:  # each rank has read its own file, and FSDP takes a part of each
        world.agree({"weights of init_from": _sha256(weights)})
    corpus = find_data(config)
    loaders = build_loaders(config, world, config.data.batch_size, corpus)
    torch.manual_seed(seed)
    precision, refused = usable_precision(settings.precision, device, settings.kernels, shape.family)
    model = GPT(shape, get_ops(settings.kernels, precision))
    if weights is not None:
        model.load_state_dict(weights)
    model = model.to(device)
    if world.rank:  # the weights are the same on every rank, dropout is not
        torch.manual_seed(seed + 1_000_003 * world.rank)
    if settings.compile:
        # In place, so that parameters keep their names. FSDP has to stay outside of what is compiled.
        sharded = world.size > 1 and settings.parallel == "fsdp"
        for module in model.transformer.h if sharded else [model]:
            module.compile()
    forward, synchronize = parallelize(model, model.transformer.h, settings.parallel, world)
    stepper = Stepper(
        model=model,
        forward=forward,
        optimizer=build_optimizer(model, config.optim, settings.kernels),
        scaler=LossScaler(device.type, enabled=scales_loss(precision)),
        precision=precision,
        grad_clip=config.optim.grad_clip,
        world=world,
        synchronize=synchronize,
        adds_in_place=settings.kernels == "triton" and world.size == 1 and not settings.compile,
    )
    if graphs:
        from fastgpt.training.graphs import CudaRecorder, Graphs

        stepper.graphs = Graphs(stepper, CudaRecorder(device))
    geometry = config.data.batch_size, config.data.grad_accum // world.size
    return Run(config, device, world, model, stepper, *loaders, *geometry, corpus=corpus, refused=refused)


def _sha256(weights: dict[str, Tensor]) -> str:
    """A short hash of names and values, to name in a sentence."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return f"sha256 {digest.hexdigest()[:12]}"


def find_data(config: Config) -> ResolvedData:
    """The token files of ``--data``, and their tokenizer. Raises UserError, also for what a vocabulary of letters cannot do."""
    data, settings = config.data, config.train
    corpus = resolve(data.data, data.tokenizer, config.model.vocab_size, data.text_column)
    if isinstance(corpus.tokenizer, CharTokenizer):
        if data.mask_documents or settings.hellaswag:
            which = "mask_documents" if data.mask_documents else "hellaswag"
            raise UserError(
                f"{which} is on, and data {data.data!r} has {corpus.tokenizer.vocab_size} letters: leave it out"
            )
        if settings.sample_interval:
            corpus.tokenizer.encode(settings.sample_prompt)
    return corpus


def build_loaders(
    config: Config, world: World, micro_batch: int, corpus: ResolvedData | None = None
) -> tuple[TokenLoader, TokenLoader]:
    """Training and validation batches of this rank, from ``corpus`` or what ``find_data`` finds."""
    shape, data = config.model, config.data
    train_paths, val_paths, tokenizer = corpus or find_data(config)
    world.agree({"training data": fingerprint(train_paths), "validation data": fingerprint(val_paths)})
    loader = partial(
        TokenLoader,
        block_size=shape.block_size,
        batch_size=micro_batch,
        seed=config.train.seed,
        vocab_size=shape.vocab_size,
        rank=world.rank,
        world_size=world.size,
        eot=tokenizer.eot if data.mask_documents else None,
    )
    return loader(train_paths), loader(val_paths)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from: where it lies, and its plain values (the weights are read when the model is there)."""

    path: Path
    values: dict[str, Any]
    damaged: list[str]
    """Newer ones that were passed over, and why, in a sentence each."""

    @property
    def fingerprint(self) -> str:
        """Name and content, short enough for a sentence."""
        return f"{self.path.name}, sha256 {file_sha256(self.path / 'manifest.json')[:12]}"


def find_saved(config: Config) -> ResumePoint | None:
    """The checkpoint that ``--resume`` asks for, checked against the configuration; None for a new run.

    Raises UserError if there is none, it is damaged, its model has another shape, or it has done all the steps ("auto" lets
    that pass).
    """
    asked, out = config.train.resume, config.train.out
    if asked is None or (asked == "auto" and not folder.existing(out)):
        return None
    where = out if asked in ("newest", "auto") else Path(asked)
    is_run = folder.is_run_folder(where)
    path, damaged = folder.newest_valid(where) if is_run else (folder.resolve(where), [])
    values = checkpoint.load(path, without=_WEIGHTS, verify=not is_run)
    checkpoint.check_shape(values["config"], config.model, path)
    before = values["config"].get("optim", {}).get("optimizer", "adamw")
    if before != config.optim.optimizer:
        raise UserError(
            f"optimizer is {config.optim.optimizer!r} but checkpoint {path} holds the state of {shortened(repr(before))}: "
            "resume with the same --optimizer, or begin a new run with --init-from"
        )
    check_saved(values, path)
    # With "auto" that is no error: a script that restarts the run until all steps are done has to come to an end.
    if values["step"] >= config.train.max_iters and asked != "auto":
        raise UserError(
            f"max_iters is {config.train.max_iters} but checkpoint {path} has done {values['step']} steps: raise --max-iters"
        )
    return ResumePoint(path, values, damaged)


def check_saved(values: dict[str, Any], path: Path) -> None:
    """Raise UserError for a value of the run's own (``Run.state``) that ``restore`` could not use."""

    def numbers(value: Any, kinds: tuple[type, ...], least: float) -> bool:
        return isinstance(value, list) and all(type(one) in kinds and least <= one <= LARGEST for one in value)

    whole = (int,)
    loader, geometry = values.get("loader"), values.get("geometry")
    fits = {
        "run": isinstance(values.get("run", ""), str),
        "spikes": numbers(values.get("spikes", []), (int, float), -LARGEST),
        "interval_losses": isinstance(losses := values.get("interval_losses", []), list)
        and all(isinstance(loss, float) for loss in losses),
        "eval_due": isinstance(values.get("eval_due", False), bool),
        "rng": "rng" not in values or rng.fits(values["rng"]),
        "metrics": values.get("metrics") is None or numbers([values["metrics"]], whole, 0),
        "scaler": isinstance(values.get("scaler", {}), dict),
        "loader": loader is None
        or (
            isinstance(loader, dict)
            and numbers([loader.get(key) for key in ("position", "seed", "windows", "block_size")], whole, 0)
        ),
        "geometry": geometry is None
        or (
            isinstance(geometry, dict)
            and all(numbers(p := geometry.get(k, []), whole, 1) and len(p) == 2 for k in ("asked", "used"))
        ),
    }
    for name, fit in fits.items():
        if not fit:
            raise UserError(
                f"checkpoint {path} has {name} {shortened(values[name])}, which no run of fastgpt writes: take another one"
            )


def agree(world: World, config: Config, device: torch.device, **facts: str | None) -> None:
    """Raise UserError on every rank, naming a setting, unless all ranks have the same ones, and the same ``facts``."""
    settings = {name: value for section in config.to_dict().values() for name, value in section.items()}
    versions = {"version of fastgpt": __version__, "version of torch": str(torch.__version__)}
    world.agree({**settings, "type of device": device.type, **versions, **facts})


def restore(run: Run, saved: ResumePoint) -> None:
    """Put a checkpoint into a freshly built run."""
    restore_weights(run, saved.path)
    values, data = saved.values, run.config.data
    run.id = values.get("run", run.id)
    run.best_val_loss = values.get("best_val_loss", math.inf)
    run.interval_losses = list(values.get("interval_losses", ()))
    run.eval_due = values.get("eval_due", values["step"] == 0)
    run.last_losses.extend(values.get("spikes", ()))
    geometry = values.get("geometry")
    if geometry and geometry["asked"] == [data.batch_size, data.grad_accum] != geometry["used"]:
        micro_batch, grad_accum = geometry["used"]
        if grad_accum % run.world.size == 0:
            run.set_geometry(micro_batch, grad_accum)
    if "loader" in values:  # a converted checkpoint has weights and optimizer state, and begins with the first window
        run.train_loader.load_state_dict(values["loader"])
    if "rng" in values:  # absent on ranks that were not there then: they keep the seeds they were built with
        rng.set_rng_state(values["rng"])


def restore_weights(run: Run, path: Path) -> None:
    """Model, optimizer and loss scale of a checkpoint that has been verified, and the steps it has done. Hyperparameters stay
    the configuration's: a flag changed on resume takes effect."""
    values = checkpoint.load(path, only=("scaler",), verify=False)
    checkpoint.load_into(path, run.model, run.stepper.optimizer)
    if values.get("scaler"):  # empty: of a precision that needs none
        run.stepper.scaler.load_state_dict(values["scaler"])
    if run.stepper.graphs is not None:
        run.stepper.graphs.drop()
    run.step = values["step"]


def changed_settings(saved: ResumePoint, config: Config) -> list[str]:
    """Settings that a resumed run changes: allowed, but said."""
    now = config.to_dict()
    return [
        change
        for section in SECTIONS
        for change in differences(saved.values["config"].get(section, {}), now[section])
        if not change.startswith(("out:", "resume:")) and ": absent -> " not in change  # an older version's checkpoint
    ]


def smaller(micro_batch: int, grad_accum: int) -> tuple[int, int] | None:
    """The geometry to try when a micro-batch does not fit: half of it or less, at the same sequences per step. None for 1."""
    total = micro_batch * grad_accum
    half = next((size for size in range(micro_batch // 2, 0, -1) if total % size == 0), None)
    return None if half is None else (half, total // half)
