"""Configuration: four dataclasses, presets in TOML, and train's command line, which is made from them (command.py).

Precedence, lowest first: the defaults below, the preset, a TOML file, flags. Every field is one flat flag
(``optim.lr`` is ``--lr``). Config files are data: they are parsed, never executed. Nothing here imports torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least, nearest, shortened, unknown, within

Kernels = Literal["triton", "eager"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp16-fast", "fp8"]
EXPERIMENTAL = ("fp16-fast", "fp8")
"""Precisions that no GPU has confirmed yet: auto never picks them, every report of a run marks them, and only --kernels triton
has them."""
GPT2_ALONE = ("fp8",)
"""Precisions that a modern model does not have."""
PLAIN = {"fp16-fast": "fp16", "fp8": "bf16"}
"""The precision of the operations that an experimental one does not change."""
Device = Literal["auto", "cpu", "cuda"]
Family = Literal["gpt2", "modern"]
Activation = Literal["gelu", "relu2"]
Schedule = Literal["cosine", "wsd", "linear", "constant"]


def _at_least(least: int, section: Any, *names: str) -> None:
    at_least(least, **{name: getattr(section, name) for name in names})


LARGEST_MODEL = {"n_layer": 10_000, "n_head": 100_000, "n_embd": 100_000, "block_size": 2**24, "vocab_size": 2**24}
"""Far above every GPT there is, and so small that listing a model's parameters or the heads that fit takes no time: the shape
may come from a stranger's checkpoint."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-2, or of a modern model (docs/recipe.md). A checkpoint only loads into the very same shape.

    Raises UserError for a shape that cannot be.

    >>> ModelConfig(n_head=5)
    Traceback (most recent call last):
    fastgpt.common.UserError: n_embd is 768, which n_head 5 does not divide: n_head can be 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48
    """

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; n_embd must be a multiple of it."""
    n_embd: int = 768
    """Width C of the residual stream."""
    block_size: int = 1024
    """Context length T, in tokens."""
    vocab_size: int = 50304
    """Rows of the token embedding. GPT-2's 50257 padded to a multiple of 64; 256 for byte tokens."""
    bias: bool = False
    """Biases in linear layers and norms. GPT-2 has them; without is a little faster and no worse."""
    dropout: float = 0.0
    """0 is right for one pass over a large corpus."""
    family: Family = "gpt2"
    """GPT-2, or RMS norms without weights and the parts named below, which a GPT-2 does not have."""
    n_kv_head: int = 0
    """Modern: heads of keys and values, which n_head is a multiple of; 0 is as many as there are queries."""
    rotary_base: float = 0.0
    """Modern: rotary positions, whose slowest pair of columns turns once in 2 pi times so many tokens; 0 is no positions at
    all."""
    qk_norm: bool = False
    """Modern: an RMS norm of each head's queries and keys."""
    activation: Activation = "gelu"
    """Modern: what the MLP does between its linears; relu2 is the squared ReLU."""
    tied_head: bool = True
    """The LM head is the token embedding; modern: --no-tied-head gives it a weight of its own."""
    zero_init: bool = False
    """Modern: each projection back to the residual stream begins at zero, so that each block begins as the identity."""
    embedding_norm: bool = False
    """Modern: a norm behind the token embedding."""
    residual_scalars: bool = False
    """Modern: each block begins with a x + b x0, x0 the embedded token, a and b learned."""
    value_embeddings: bool = False
    """Modern: every other block, the last one among them, adds a row of a table of its own to each token's values, behind a
    learned gate."""
    softcap: float = 0.0
    """Modern: logits z become c tanh(z / c) for a c of this size, such as 15; 0 leaves them."""
    smear: bool = False
    """Modern: the embedded token before is added to each, behind a learned gate, as in nanochat."""
    backout: bool = False
    """Modern: a learned share of the residual stream at half the depth is taken off before the final norm, as in nanochat."""
    window_pattern: str = "L"
    """Modern: what the blocks attend to, repeated over them: L all tokens before, S the quarter of block_size before; the last
    block has L."""

    def __post_init__(self) -> None:
        _at_least(1, self, *LARGEST_MODEL)
        for name, most in LARGEST_MODEL.items():
            within(f"[1, {most}]", **{name: getattr(self, name)})
        if self.n_embd % self.n_head:
            heads = ", ".join(
                str(h) for h in range(1, self.n_embd + 1) if self.n_embd % h == 0 and self.n_embd // h >= 16
            )
            raise UserError(
                f"n_embd is {self.n_embd}, which n_head {self.n_head} does not divide: n_head can be {heads or 1}"
            )
        within("[0, 1)", dropout=self.dropout)
        self._check_modern()

    def _check_modern(self) -> None:
        """Raise UserError for a part of a modern model that a GPT-2 does not have, and for one that cannot be."""
        if self.family == "gpt2":
            for each in fields(self):
                value = getattr(self, each.name)
                if each.name in MODERN and value != each.default:
                    raise UserError(
                        f"{each.name} is {value!r}, which a GPT-2 does not have: leave it out, or use --family modern"
                    )
            return
        if self.bias:
            raise UserError("bias is True, which a modern model does not have: leave it out, or use --family gpt2")
        _at_least(0, self, "n_kv_head", "rotary_base", "softcap")
        if self.n_head % self.kv_heads:
            heads = ", ".join(str(h) for h in range(1, self.n_head + 1) if self.n_head % h == 0)
            raise UserError(
                f"n_kv_head is {self.n_kv_head}, which does not divide n_head {self.n_head}: it can be {heads}"
            )
        paired = ("rotary_base", "qk_norm", "value_embeddings")  # one pass over pairs of columns
        if self.head_size % 2 and (given := [name for name in paired if getattr(self, name)]):
            raise UserError(
                f"{given[0]} is {shortened(getattr(self, given[0]))} but heads have {self.head_size} columns, which "
                f"{', '.join(given)} take in pairs: choose n_embd and n_head so that their quotient is even"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern is {self.window_pattern!r}: it must be made of S and L, such as SSSL")

    @property
    def in_words(self) -> str:
        """As commands print it."""
        return (
            f"layers {self.n_layer}, heads {self.n_head}, width {self.n_embd}, context {self.block_size}, "
            f"vocabulary {self.vocab_size}"
        )

    @property
    def head_size(self) -> int:
        """Columns of a head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.n_kv_head or self.n_head


_FIELDS = [each.name for each in fields(ModelConfig)]
MODERN = tuple(_FIELDS[_FIELDS.index("family") + 1 :])
"""Fields of ModelConfig that only family "modern" may set."""


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how many make a micro-batch."""

    data: Annotated[str, Arg("FOLDER")] = "stdlib"
    """'stdlib' (Python's own library sources: real text on every machine), a folder of token shards (python -m fastgpt.data
    prepare, llm.c's, nanoGPT's .bin, build-nanogpt's .npy), or a text, jsonl(.gz, .zst) or parquet file or folder."""
    tokenizer: Literal["gpt2", "bytes", "chars"] = "gpt2"
    """GPT-2's BPE, raw bytes (vocabulary 256), or the letters of a folder with nanoGPT's meta.pkl. A folder of tokens says
    itself which: left out, tokenizer and vocabulary are the folder's."""
    text_column: str = "text"
    """The column of a table, or the field of a JSON line, that holds the text."""
    mask_documents: bool = False
    """Let tokens attend within their own document only, not to the one that happens to stand before it in the window."""
    batch_size: Annotated[int, Arg("N", aliases=("--batch",), words=("auto",))] = 8
    """Sequences per micro-batch; '--batch-size auto' (or --batch auto) takes the most that fit."""
    auto_batch: bool = False
    """What '--batch-size auto' sets: batch_size and grad_accum are chosen at the start, so that the largest micro-batch
    that fits is used at the same tokens per step."""
    grad_accum: int = 1
    """Micro-batches per optimizer step, over all GPUs together: tokens per step = batch_size x block_size x grad_accum,
    on one GPU or on eight."""

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size", "grad_accum")
        within(f"[1, {10**9}]", batch_size=self.batch_size, grad_accum=self.grad_accum)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon beside it, with warmup and a schedule. Norms and biases are not decayed."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything; or Muon for the matrices of the blocks, which needs fewer tokens, and AdamW for embeddings, head,
    norms and biases."""
    lr: float = 6e-4
    """Peak learning rate of AdamW. The other rates below follow the same schedule."""
    embedding_lr: float = 0.0
    """Peak rate of AdamW for embeddings; 0: --lr. A head that is tied to an embedding goes with it."""
    head_lr: float = 0.0
    """Peak rate of AdamW for an untied head; 0: --lr."""
    scalar_lr: float = 0.0
    """Peak rate of AdamW for norms, biases and other vectors and scalars; 0: --lr."""
    muon_lr: float = 0.02
    """Peak rate of Muon, for an update whose singular values are 1, times sqrt(rows / columns) of a tall matrix."""
    muon_momentum: float = 0.95
    """Share of the running mean of the gradients that each step keeps."""
    muon_momentum_start: float = 0.85
    """Muon's momentum at step 0; it rises to --muon-momentum in a straight line."""
    muon_momentum_warmup: int = 300
    """Steps that this takes."""
    muon_weight_decay: float = 0.0
    """Weight decay of the matrices that Muon updates, times their rate."""
    muon_cautious: bool = False
    """Decay those weights only where decay and update pull the same way."""
    muon_coefficients: Literal["classic", "polar"] = "classic"
    """Coefficients of Muon's Newton-Schulz steps: those first published, or Polar Express, which comes closer to orthogonal."""
    muon_normuon: bool = False
    """Divide each row of Muon's updates by a running mean of its size."""
    schedule: Schedule = "cosine"
    """What follows the warmup: half a cosine, warmup-stable-decay, a straight line, or no decay."""
    decay_share: float = 0.2
    """Share of the run over which wsd decays, at its end."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup_iters: int = 100
    """Steps of linear warmup; step 0 already learns."""
    batch_warmup_iters: int = 0
    """Steps over which the micro-batches of a step, on several GPUs those of each, rise in a straight line to --grad-accum; 0:
    all from the start."""
    window_warmup_iters: int = 0
    """Modern: steps over which the tokens that any block attends to rise to the context in a straight line, in training alone;
    0: the model's own windows from the start."""
    weight_decay: float = 0.1
    """AdamW's, of matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's memory of the gradient."""
    beta2: float = 0.95
    """AdamW's memory of its square."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _at_least(0, self, "lr", "weight_decay", "grad_clip", "warmup_iters", "min_lr_ratio")
        _at_least(0, self, "batch_warmup_iters", "window_warmup_iters")
        _at_least(
            0, self, "embedding_lr", "head_lr", "scalar_lr", "muon_lr", "muon_weight_decay", "muon_momentum_warmup"
        )
        within("[0, 1]", decay_share=self.decay_share)
        within("[0, 1)", beta1=self.beta1, beta2=self.beta2)
        within("[0, 1)", muon_momentum=self.muon_momentum, muon_momentum_start=self.muon_momentum_start)
        if self.lr == 0 and (self.optimizer == "muon" or self.own_rates):
            raise UserError("lr is 0, and the other rates follow it: give a positive --lr")

    @property
    def own_rates(self) -> bool:
        """Whether some parameters have another rate than ``lr`` under AdamW."""
        return any((self.embedding_lr, self.head_lr, self.scalar_lr))


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, on what, and what is written when."""

    kernels: Kernels = "triton"
    """The fused Triton kernels (interpreted, slowly, where there is no GPU), or plain PyTorch: the default where Triton is
    missing, or the GPU is older than Ampere."""
    precision: Precision = "auto"
    """Dtype of matmul operands and activations; auto is fp32 on a CPU, and on a GPU bf16, or fp16 if it has none. Masters stay
    fp32. fp16-fast, which is experimental: fp16 operands, products summed in fp16 over at most 128 at a time, at twice the
    rate on GeForce RTX cards.
    fp8, which is experimental too: bf16, but the linears of the blocks in fp8, on RTX 40 and 50, L4, L40S, H100, H200.
    On other cards the run uses auto's choice and says so."""
    device: Device = "auto"
    """auto takes a CUDA GPU if there is one."""
    compile: bool = False
    """Run the model under torch.compile (with either --kernels)."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay training steps as CUDA graphs, for small models on fast cards: docs/cuda-graphs.md. 'on' is experimental: no GPU
    has measured it yet, and until one has, 'auto' is off. One GPU, --kernels triton, without --compile."""
    explain_kernels: Annotated[str | None, Arg("[GPU]", bare="here")] = None
    """Train nothing: print who computes what in a step, cuBLAS or which Triton kernel in which config, and which table says so;
    on the GPU that is here, or '--explain-kernels rtx4070' on that card."""
    max_iters: int = 1000
    """Optimizer steps."""
    eval_interval: int = 250
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_iters: int = 20
    """Batches per evaluation, always the same ones."""
    checkpoint_interval: int = 250
    """Steps between checkpoints; 0 saves only at the end and on Ctrl-C."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay in --out; the one with the best validation loss stays as well."""
    log_interval: int = 10
    """Steps between log lines; metrics.jsonl has a line for every step."""
    verbose: bool = False
    """Log lines of more than 100 columns: also the share of waiting for data, memory, clock, power, temperature."""
    profile: bool = False
    """Write a trace of three early steps into --out, which are slower for it."""
    sample_interval: int = 0
    """Steps between samples of text on the terminal; 0 prints none."""
    sample_prompt: Annotated[str, Arg("TEXT")] = "\n"
    """What the samples continue."""
    hellaswag: Annotated[str | None, Arg("FILE")] = None
    """Score HellaSwag at the end: a local jsonl or parquet file, or 'hub'."""
    spike_zscore: float = 6.0
    """A loss this many standard deviations above the last 128 is called a spike; 0 looks for none."""
    on_spike: Literal["log", "rollback"] = "log"
    """What a spike does: a line in the log, or back to the newest checkpoint and on with the data that follow."""
    max_skipped: int = 10
    """Steps skipped in a row, for a loss or gradient that is not finite, before the run stops."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a whole model on every GPU, or parameters, gradients and optimizer state in shards (FSDP2)."""
    rank_timeout: float = 60.0
    """Under torchrun: seconds without a sign of life after which the other ranks give one up and end."""
    init_from: Annotated[str | None, Arg("MODEL")] = None
    """Begin with the weights (and the shape) of a checkpoint: nanoGPT's ckpt.pt, a run of this package, a Hugging Face folder,
    or a name on its hub such as gpt2. A resumed run goes on with its own."""
    tensorboard: bool = True
    """Write TensorBoard events into --out, where tensorboard is installed."""
    wandb: Annotated[str | None, Arg("PROJECT")] = None
    """Send metrics to this Weights & Biases project."""
    doctor: bool = True
    """Look for what is known to go wrong before the first step."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and dropout."""
    out: Annotated[Path, Arg("FOLDER")] = Path("runs/default")
    """The run's folder: config, checkpoints, metrics.jsonl, TensorBoard events, environment."""
    resume: Annotated[str | None, Arg("[PATH]", bare="newest")] = None
    """Continue a run: '--resume' takes the newest whole checkpoint in --out, '--resume PATH' that one; '--resume auto'
    starts anew if there is none."""

    @property
    def implementation(self) -> str:
        """What computes the step, as the VRAM model and the projection name it: kernels, or "compile" for plain PyTorch under
        torch.compile."""
        return "compile" if self.compile and self.kernels == "eager" else self.kernels

    def __post_init__(self) -> None:
        _at_least(1, self, "max_iters", "eval_iters", "keep_checkpoints", "log_interval", "max_skipped", "rank_timeout")
        _at_least(0, self, "eval_interval", "checkpoint_interval", "sample_interval", "spike_zscore", "seed")


@dataclass(frozen=True)
class Config:
    """Train a GPT-2 on hand-written Triton kernels.

    Examples:
      python train.py                                    the demo, on whatever this machine has
      python train.py --preset gpt2-124m --data fineweb  GPT-2 124M on a folder of token shards
      python train.py configs/gpt2-40m.toml --lr 1e-3    a config file, one value changed
      python train.py --preset gpt2-124m --resume        go on from the newest checkpoint in --out
    """

    config: Annotated[Path | None, Arg("FILE", positional=True)] = None
    """A TOML file with any of the sections [model], [data], [optim], [train]."""
    preset: Annotated[str | None, Arg("NAME")] = None
    """demo, gpt2-40m, gpt2-124m, gpt2-350m, gpt2-xl; with the modern recipe modern-demo, modern-40m, modern-124m."""
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def tokens_per_step(self) -> int:
        """Tokens behind one optimizer step of all GPUs together: micro-batch x accumulation x block size."""
        return self.data.batch_size * self.data.grad_accum * self.model.block_size

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values only (safe to store in a checkpoint), by section."""
        plain = {name: asdict(getattr(self, name)) for name in SECTIONS}
        plain["train"]["out"] = str(self.train.out)
        return plain


HELP = {
    "most used": (
        "The ten to know first.",
        ("preset", "data", "out", "resume", "init_from", "batch_size", "max_iters", "lr", "precision", "kernels"),
    ),
    "Muon": ("For --optimizer muon.", [each.name for each in fields(OptimConfig) if each.name.startswith("muon_")]),
    "modern model": ("For --family modern: docs/recipe.md says what each part is and bought.", MODERN),
}
"""Groups of train's help page beside its sections."""
SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}


def config_folder() -> Path:
    """The folder with the presets: beside the package in a checkout, inside it in an installed wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def preset_names() -> list[str]:
    return sorted(path.stem for path in config_folder().glob("*.toml"))


def load_preset(name: str, device: str = "cpu", base: Config | None = None) -> Config:
    """The preset of that name, for a device type ("cpu" or "cuda"); ``base``: the defaults, if others than the dataclasses'.
    Raises UserError for an unknown name."""
    if name not in preset_names():
        raise UserError(unknown("preset", name, preset_names()))
    return replace(load_toml(config_folder() / f"{name}.toml", base or Config(), device), preset=name)


def load_toml(path: Path, base: Config, device: str = "cpu") -> Config:
    """``base`` overridden by a TOML file. Sections under [cuda] apply on a CUDA device only.

    Raises UserError naming the file and the key for anything that is not a known field of the right type.
    """
    table = common.load_toml(path, "config file")
    on_cuda = table.pop("cuda", {})
    if not isinstance(on_cuda, dict):
        raise UserError(
            f"config file {path} has cuda = {shortened(on_cuda)}: it can have sections such as [cuda.train]"
        )
    for sections, applies in ((table, True), (on_cuda, device == "cuda")):
        for section, values in sections.items():
            if section not in SECTIONS or not isinstance(values, dict):
                raise UserError(
                    f"config file {path} has [{section}]{nearest(section, SECTIONS)}: sections are {', '.join(SECTIONS)}"
                )
            typed = typed_fields(SECTIONS[section], values, f"{path} [{section}]")
            try:
                changed = replace(base, **{section: replace(getattr(base, section), **typed)})
            except UserError as error:
                raise UserError(f"config file {path}: {error}") from error
            base = changed if applies else base  # what holds on a GPU only is checked everywhere
    return base


def parse(
    args: Sequence[str],
    device_type: str,
    kernels: Kernels = "triton",
    told: Callable[[str], tuple[str, int] | None] = lambda _: None,
) -> Config:
    """The configuration that a command line asks for. ``device_type`` ("cpu" or "cuda") is what is present, ``kernels`` what
    this machine can run, which a file or flag overrules. ``told``: tokenizer and vocabulary that a folder of tokens says that
    it was made with (data/resolution.py); they count where neither a flag nor the file says others.

    Raises UserError for bad values and unknown flags; ``--help`` is printed with the defaults of the preset asked for.
    """
    words = [arg for arg in args if arg not in ("-h", "--help")]
    asked, rest = command.parse_known(Config, words, "fastgpt.train")
    command.refuse(rest, Config)
    if asked.get("explain_kernels") is not None:
        device_type = "cuda"  # what is explained is what a GPU would run
    if asked.get("device") == "cpu":
        device_type = "cpu"
    file, preset = asked.get("config"), asked.get("preset")
    if file is not None and file.suffix != ".toml":
        meant = f"--preset {file}" if str(file) in preset_names() else "a .toml file"
        if file.suffix == ".py":
            meant = "a .toml file; nanoGPT's configs are for python -m fastgpt.nanogpt TRAIN.PY CONFIG.PY"
        elif "=" in str(file):  # model.n_layer=4, +optim.lr=1e-3
            flag = f"--{str(file).partition('=')[0].rpartition('.')[2].lstrip('+').replace('_', '-')}"
            meant += f", or a flag for each value: {command.ELSEWHERE.get(flag, flag)} {str(file).partition('=')[2]}"
        raise UserError(f"{str(file)!r} is not TOML, as a config has to be: give {meant}")
    defaults = Config(train=TrainConfig(kernels=kernels))
    base = load_preset(preset or "demo", device_type, defaults)
    if file is not None:
        base = replace(load_toml(file, base if preset else defaults, device_type), config=file)
    if len(words) < len(args):
        whose = (
            f"of {file}" if file else f"of --preset {preset or 'demo'} on a {'GPU' if device_type == 'cuda' else 'CPU'}"
        )
        about = f"{inspect.cleandoc(Config.__doc__ or '')}\n\nDefaults below are those {whose}."
        command.show_help(Config, "fastgpt.train", about, base, HELP)
    if asked.get("batch_size") == "auto":
        asked |= {"batch_size": base.data.batch_size, "auto_batch": True}
    for section, kind in SECTIONS.items():
        values = {f.name: asked[f.name] for f in fields(kind) if f.name in asked}
        base = replace(base, **{section: replace(getattr(base, section), **values)})
    for name in asked:
        if name.startswith("muon_") and base.optim.optimizer != "muon":
            raise UserError(f"{name} is {asked[name]} but optimizer is {base.optim.optimizer!r}: use --optimizer muon")
    given = {*asked, *_set_in(file, device_type)}
    if "tokenizer" not in given and (tokens := told(base.data.data)) is not None:
        tokenizer, size = tokens
        if "vocab_size" not in given and (tokenizer != base.data.tokenizer or base.model.vocab_size < size):
            size = ModelConfig.vocab_size if tokenizer == "gpt2" else size  # padded
            base = replace(base, model=replace(base.model, vocab_size=size))
        base = replace(base, data=replace(base.data, **typed_fields(DataConfig, {"tokenizer": tokenizer}, "data")))
    return base


def _set_in(file: Path | None, device: str) -> set[str]:
    """The fields that a TOML file, which has been loaded before, sets on a device."""
    sections = common.load_toml(file, "config file") if file else {}
    on_cuda = sections.pop("cuda", {})
    return {key for table in (sections, on_cuda if device == "cuda" else {}) for part in table.values() for key in part}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every key whose value differs, as "key: old -> new"."""
    keys = sorted({*old, *new})
    return [f"{k}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}" for k in keys if old.get(k) != new.get(k)]


def typed_fields(section: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of fields of a dataclass, from TOML or from a checkpoint. Raises UserError, which begins with ``where``, for a
    field that it does not have and for a value of another type."""
    hints = get_type_hints(section)
    for key in values:
        if key not in hints:
            raise UserError(f"{where} has {key!r}{nearest(key, hints)}: fields are {', '.join(hints)}")
    return {key: _typed(value, hints[key], f"{where} {key}") for key, value in values.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A TOML value as the field's type, or a UserError: TOML has no paths, and writes 1 for 1.0."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise UserError(f"{where} is {shortened(repr(value))}: it can be {', '.join(get_args(hint))}")
    accepted = {float: (float, int), Path: (str,)}.get(hint) or get_args(hint) or (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        names = " or ".join(kind.__name__ for kind in accepted if kind is not type(None))
        raise UserError(f"{where} is {shortened(repr(value))}: it must be of type {names}")
    if isinstance(value, int):
        at_least(-common.LARGEST, **{where: value})  # before it becomes a float, which a longer one cannot
    if value == "":
        raise UserError(f"{where} is empty: leave it out, or give a value")
    if isinstance(value, str) and "\0" in value:  # no name of a file has one, and the system raises for it
        raise UserError(f"{where} is {shortened(repr(value))}: it must not have a NUL character in it")
    return hint(value) if hint in (float, Path) else value
