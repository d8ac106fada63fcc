"""What a model is made of: every embedding, norm and linear with its parameters and sizes, and what happens around each.

This is the one description that FLOPs, memory, operations, profile names, conversion and the doctor read. A model family is
one function that lists its parts: ``gpt2`` and ``modern`` below. Another family is another such function, and a line in ``of``.

L counts blocks, C is the width, T the longest sequence, V the vocabulary. Plain integers, nothing of ours and no torch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by their names in a state_dict."""

# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Shape:
    """What a model's tensors and FLOPs depend on; ``Shape.of`` takes it from any config with these names. A config that has no
    other names than nanoGPT's is a GPT-2's. The fields from ``family`` on are ModelConfig's."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool = False
    family: str = "gpt2"
    n_kv_head: int = 0
    rotary_base: float = 0.0
    qk_norm: bool = False
    activation: str = "gelu"
    tied_head: bool = True
    embedding_norm: bool = False
    residual_scalars: bool = False
    value_embeddings: bool = False
    softcap: float = 0.0
    smear: bool = False
    backout: bool = False
    window_pattern: str = "L"

    @classmethod
    def of(cls, config: Any) -> Shape:
        names = SHAPE if getattr(config, "family", "gpt2") == "gpt2" else [field.name for field in fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})


SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
"""What a GPT-2's tensors depend on, under nanoGPT's names."""

GPT2_124M = Shape(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
GPT2_40M = Shape(n_layer=12, n_head=12, n_embd=384, block_size=1024, vocab_size=50304)

# ---------------------------------------------------------------- parts


@dataclass(frozen=True)
class Part:
    """A module with parameters, in each of ``layers``; () is once, outside of the blocks."""

    name: str
    module: str
    """Its name in the state_dict; {layer} stands for the number of the block."""
    layers: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.layers) or 1

    @property
    def in_blocks(self) -> bool:
        return bool(self.layers)

    def parameters(self) -> Shapes:
        """Shapes of the parameters of one such module, by their names in it."""
        raise NotImplementedError

    @property
    def n_params(self) -> int:
        """Elements of all its parameters, in all layers."""
        return self.count * sum(math.prod(shape) for shape in self.parameters().values())


@dataclass(frozen=True)
class Embedding(Part):
    """An embedding: (rows, width), of which a token reads one row."""

    rows: int
    width: int
    positions: bool = False
    """Indexed by position, not by token: nanoGPT leaves such a table out of N."""

    def parameters(self) -> Shapes:
        return {"weight": (self.rows, self.width)}


@dataclass(frozen=True)
class Norm(Part):
    """A norm over rows of ``width``. All but those before the first branch are one pass with the residual add before them."""

    width: int
    bias: bool
    weight: bool = True
    """An RMS norm without one has no parameters: its ``module`` is only a name."""

    def parameters(self) -> Shapes:
        held = {"weight": self.weight, "bias": self.bias}
        return {name: (self.width,) for name, there in held.items() if there}


@dataclass(frozen=True)
class Scalars(Part):
    """Learned numbers, one for each block or one in all, under their ``names`` in the module."""

    names: tuple[str, ...]
    number: int

    def parameters(self) -> Shapes:
        return {name: (self.number,) for name in self.names}


@dataclass(frozen=True)
class Gate(Part):
    """A weight of (n_out, n_in) with few columns: counted as parameters, and too small to be timed as a linear."""

    n_in: int
    n_out: int

    def parameters(self) -> Shapes:
        return {"weight": (self.n_out, self.n_in)}


Neighbour = Literal["norms", "attention", "activation", "loss"]


@dataclass(frozen=True)
class Linear(Part):
    """y = x w^T + b with a weight of (n_out, n_in), and the operations whose kernels can do a part of its work."""

    n_in: int
    n_out: int
    bias: bool
    source: Neighbour
    """What writes x, and in the backward pass reads dx."""
    sink: Neighbour
    """What reads y, and in the backward pass writes dy. The activation can be fused into this matmul."""
    tied: bool = False
    """The weight is another part's parameter."""

    @property
    def weights(self) -> int:
        """Elements of the weight matrices in all layers: what each token is multiplied by."""
        return self.count * self.n_in * self.n_out

    def parameters(self) -> Shapes:
        if self.tied:
            return {}
        return {"weight": (self.n_out, self.n_in), **({"bias": (self.n_out,)} if self.bias else {})}


@dataclass(frozen=True)
class Heads:
    """Causal self-attention between its linears: it has no parameters."""

    count: int
    """Blocks that have it."""
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = ()
    """Keys that a query sees at most, block by block; () is all of them in every block."""
    prepared: bool = False
    """Whether a pass over the packed projection precedes it: rotary positions, QK-norm, value embeddings."""
    normed: bool = False
    """Whether that has QK-norm."""

    @property
    def reach(self) -> dict[int, int]:
        """{keys that a query sees at most, 0 for all: number of blocks}."""
        return Counter(self.windows) if self.windows else {0: self.count}

    @property
    def width(self) -> int:
        """Columns of the queries, and of the output."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Anatomy:
    """A model: its parts in the order of its state_dict, and its attention."""

    parts: tuple[Part, ...]
    attention: Heads
    activation: str = "GELU"
    """As a profile calls it."""
    mixes: bool = False
    """Whether the norm before attention also scales the residual stream and adds the embedded tokens, scaled."""

    @property
    def embeddings(self) -> list[Embedding]:
        return [part for part in self.parts if isinstance(part, Embedding)]

    @property
    def norms(self) -> list[Norm]:
        return [part for part in self.parts if isinstance(part, Norm)]

    @property
    def linears(self) -> list[Linear]:
        return [part for part in self.parts if isinstance(part, Linear)]

    @property
    def block_linears(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.in_blocks]

    @property
    def head(self) -> Linear:
        """The linear that makes the logits."""
        (head,) = [linear for linear in self.linears if linear.sink == "loss"]
        return head

    @property
    def hidden(self) -> int:
        """Columns of the activation (GPT-2's GELU) in one block."""
        return sum(linear.n_out for linear in self.block_linears if linear.sink == "activation")

    @property
    def block_weights(self) -> int:
        """Elements of the weight matrices of all blocks."""
        return sum(linear.weights for linear in self.block_linears)

    @property
    def lookups(self) -> list[Embedding]:
        """Embeddings that nothing is multiplied with: all but one that is also the head."""
        return [table for table in self.embeddings if table.module != self.head.module]

    @property
    def n_tensors(self) -> int:
        """Parameter tensors."""
        return sum(part.count * len(part.parameters()) for part in self.parts)


# ---------------------------------------------------------------- families


@lru_cache(maxsize=1024)
def gpt2(shape: Shape) -> Anatomy:
    """GPT-2 under nanoGPT's names: learned positions, pre-norm blocks, GELU, and a head tied to the token embedding."""
    C, V, bias = shape.n_embd, shape.vocab_size, shape.bias
    every, block = tuple(range(shape.n_layer)), "transformer.h.{layer}."
    return Anatomy(
        parts=(
            Embedding("token embedding", "transformer.wte", (), V, C),
            Embedding("position embedding", "transformer.wpe", (), shape.block_size, C, positions=True),
            Norm("norm before attention", block + "ln_1", every, C, bias),
            Linear("qkv", block + "attn.c_attn", every, C, 3 * C, bias, "norms", "attention"),
            Linear("attention projection", block + "attn.c_proj", every, C, C, bias, "attention", "norms"),
            Norm("norm before the MLP", block + "ln_2", every, C, bias),
            Linear("mlp up", block + "mlp.c_fc", every, C, 4 * C, bias, "norms", "activation"),
            Linear("mlp down", block + "mlp.c_proj", every, 4 * C, C, bias, "activation", "norms"),
            Norm("final norm", "transformer.ln_f", (), C, bias),
            Linear("head", "transformer.wte", (), C, V, False, "norms", "loss", tied=True),
        ),
        attention=Heads(shape.n_layer, shape.n_head, shape.n_head, C // shape.n_head),
    )


GATE_COLUMNS = 12
"""Columns of a block's input that the gate of its value embedding is told from, as in nanochat."""

SMEAR_COLUMNS = 24
"""Columns of a token's embedding that the gate of smear is told from, as in nanochat."""


def has_value_embedding(shape: Any, layer: int) -> bool:
    """Every other block of a modern model, and the last."""
    return shape.value_embeddings and layer % 2 == (shape.n_layer - 1) % 2


def window(shape: Any, layer: int) -> int:
    """Tokens that a token of this block attends to at most, itself among them; 0 is all before it. S in the pattern: the
    quarter of the context before it."""
    letter = shape.window_pattern[layer % len(shape.window_pattern)]
    return 0 if letter == "L" or layer == shape.n_layer - 1 else shape.block_size // 4 + 1


@lru_cache(maxsize=1024)
def modern(shape: Shape) -> Anatomy:
    """fastgpt/modern.py, under nanochat's names: RMS norms without weights, and each part that the shape says it has."""
    C, V, L = shape.n_embd, shape.vocab_size, shape.n_layer
    every, block = tuple(range(L)), "transformer.h.{layer}."
    D, kv_heads = C // shape.n_head, shape.n_kv_head or shape.n_head
    valued = tuple(layer for layer in every if has_value_embedding(shape, layer))
    parts: list[Part] = [
        Embedding("token embedding", "transformer.wte", (), V, C),
        *([Norm("embedding norm", "transformer.ln_e", (), C, False, weight=False)] if shape.embedding_norm else []),
        Norm("norm before attention", block + "ln_1", every, C, False, weight=False),
        Linear("qkv", block + "attn.c_attn", every, C, C + 2 * kv_heads * D, False, "norms", "attention"),
        Linear("attention projection", block + "attn.c_proj", every, C, C, False, "attention", "norms"),
        Norm("norm before the MLP", block + "ln_2", every, C, False, weight=False),
        Linear("mlp up", block + "mlp.c_fc", every, C, 4 * C, False, "norms", "activation"),
        Linear("mlp down", block + "mlp.c_proj", every, 4 * C, C, False, "activation", "norms"),
    ]
    if shape.smear:
        parts.insert(0, Gate("smear gate", "transformer.smear_gate", (), min(SMEAR_COLUMNS, C), 1))
    for name, there in (("backout", shape.backout), ("smear", shape.smear)):
        if there:
            parts.insert(0, Scalars(name, "transformer", (), (f"{name}_lambda",), 1))
    if shape.residual_scalars:
        parts.insert(0, Scalars("residual scalars", "transformer", (), ("resid_lambdas", "x0_lambdas"), L))
    if valued:
        gate = Gate("value gate", block + "attn.ve_gate", valued, min(GATE_COLUMNS, C), kv_heads)
        parts.insert(next(i for i, part in enumerate(parts) if part.name == "attention projection") + 1, gate)
        parts.append(Embedding("value embeddings", "transformer.value_embeds.{layer}", valued, V, kv_heads * D))
    parts.append(Norm("final norm", "transformer.ln_f", (), C, False, weight=False))
    head = "transformer.wte" if shape.tied_head else "lm_head"
    parts.append(Linear("head", head, (), C, V, False, "norms", "loss", tied=shape.tied_head))
    windows = tuple(window(shape, layer) for layer in every)
    prepared = bool(shape.rotary_base) or shape.qk_norm or bool(valued)
    heads = Heads(L, shape.n_head, kv_heads, D, windows, prepared, shape.qk_norm)
    activation = {"gelu": "GELU", "relu2": "ReLU2"}[shape.activation]
    return Anatomy(tuple(parts), heads, activation, shape.residual_scalars)


def of(config: Any) -> Anatomy:
    """The model that a config describes: a ModelConfig, a Shape, or anything else with a Shape's names."""
    shape = config if isinstance(config, Shape) else Shape.of(config)
    return modern(shape) if shape.family == "modern" else gpt2(shape)


# ---------------------------------------------------------------- parameters


def parameters(config: Any) -> Shapes:
    """{name: shape} of every parameter, in the order of the model's state_dict."""
    return {
        f"{module}.{name}": size for module, part in _modules(of(config)) for name, size in part.parameters().items()
    }


def _modules(model: Anatomy) -> Iterator[tuple[str, Part]]:
    """(name, part) of every module. Parts that follow each other in one list of blocks come block by block."""
    for _, group in itertools.groupby(model.parts, key=lambda part: part.in_blocks and part.module.split("{layer}")[0]):
        stack = list(group)
        layers = sorted({layer for part in stack for layer in part.layers})
        if not layers:
            yield from ((part.module, part) for part in stack)
        for layer in layers:
            yield from ((part.module.format(layer=layer), part) for part in stack if layer in part.layers)


def n_params(config: Any, *, positions: bool = True) -> int:
    """Every parameter once (the head shares the token embedding). ``positions=False`` is nanoGPT's N.

    GPT-2: L (12 C^2 + 2C) + C + VC [+ TC]; with bias also L (11C) + C.
    """
    return sum(
        part.n_params for part in of(config).parts if positions or not (isinstance(part, Embedding) and part.positions)
    )


def multiplied_params(config: Any) -> int:
    """Every parameter but those of tables that are only looked up: the N that FLOPs are counted from. GPT-2: nanoGPT's N."""
    model = of(config)
    return n_params(config) - sum(table.n_params for table in model.lookups)


def matmul_params(config: Any) -> int:
    """Weights that each token is multiplied by; lookups are free. GPT-2: 12LC^2 + VC, the embedding once, as the head."""
    return sum(linear.weights for linear in of(config).linears)


def shape_told_by(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensors of a GPT-2's state_dict tell of its Shape: all but the number of heads."""
    found: dict[str, Any] = {}
    wte, wpe = tensors.get("transformer.wte.weight", ()), tensors.get("transformer.wpe.weight", ())
    if len(wte) == 2:
        found.update(vocab_size=wte[0], n_embd=wte[1])
    if len(wpe) == 2:
        found["block_size"] = wpe[0]
    layers = {int(m[1]) for name in tensors if (m := re.match(r"transformer\.h\.(\d{1,6})\.", name))}
    if layers:
        found["n_layer"] = max(layers) + 1
    if "transformer.ln_f.weight" in tensors:
        found["bias"] = "transformer.ln_f.bias" in tensors
    return found
