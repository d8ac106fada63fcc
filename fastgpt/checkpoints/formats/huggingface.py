"""A Hugging Face GPT-2: a folder with config.json, model.safetensors (or its shards, or pytorch_model.bin) and tokenizer
files, or a name on the hub. transformers itself is not needed.

Its Conv1D weights are (in, out), fastgpt's (out, in). It always has biases; a model without them is written with zeros, and
config.json says so under "fastgpt", which transformers ignores and the way back reads.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import __version__, anatomy
from fastgpt.checkpoints.formats.nanogpt import load_file
from fastgpt.checkpoints.formats.portable import Portable, check, in_fp32, loss, model_config, steps, tied
from fastgpt.common import (
    UserError,
    atomic_folder,
    first_line,
    millions,
    open_file,
    read_json,
    rounded,
    shortened,
    write_json,
    write_whole,
)
from fastgpt.config import SECTIONS, Config, DataConfig, ModelConfig, typed_fields
from fastgpt.data.corpora import STDLIB
from fastgpt.data.hub import HUB
from fastgpt.data.manifest import MANIFEST
from fastgpt.data.tokenizer import END_OF_TEXT, byte_letters, gpt2_merges, gpt2_vocabulary

SHORT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_DEFAULTS = dict(n_layer=12, n_head=12, n_embd=768, n_ctx=1024, vocab_size=50257, activation_function="gelu_new")
_DEFAULTS |= dict.fromkeys(_DROPOUTS, 0.1)
"""GPT2Config's, where a config.json leaves them out."""
_CONV1D = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")


def looks_like_hub_name(source: str) -> bool:
    return source in SHORT_NAMES or bool(
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not source.endswith(".pt")
    )


def download(name: str) -> Path:
    """The folder of a model of the hub, in its cache. Raises UserError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name} is not a file or folder here; for a model of the Hugging Face hub run `pip install huggingface_hub`"
        ) from None
    wanted = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"{name} is not a file or folder here, and the Hugging Face hub does not give it "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


class Upload:
    """A model of the hub that this machine may write: ``Upload("you/my-gpt2").send(folder)``."""

    def __init__(self, name: str) -> None:
        """Raises UserError without huggingface_hub, where nobody is logged in, and where the hub does not answer."""
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
            raise UserError(f"push is {shortened(name)!r}: it must be a name on the hub, such as you/my-gpt2")
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise UserError(
                f"push is {name!r}, for which a package is missing: run `pip install huggingface_hub`"
            ) from None
        self.name, self._hub = name, HfApi()
        try:
            self._hub.whoami()
        except Exception as error:
            raise UserError(
                f"push is {name!r}, but the Hugging Face hub knows no user here ({first_line(error)}): run `hf auth login`"
            ) from error

    def send(self, folder: Path) -> str:
        """Upload what ``folder`` holds, to a model that is made if there is none, private then. Returns its address. Raises
        UserError, which says how to try again."""
        try:
            made = self._hub.create_repo(self.name, private=True, exist_ok=True)
            self._hub.upload_folder(repo_id=made.repo_id, folder_path=folder)
        except Exception as error:
            raise UserError(
                f"{folder} is written, but was not uploaded ({first_line(error)}): run `hf upload {self.name} {folder}`"
            ) from error
        return str(made)


def read(folder: Path) -> Portable:
    """Raises UserError."""
    source = str(folder)
    values = {**_DEFAULTS, **_json(folder / "config.json")}
    if values.get("model_type") != "gpt2":
        raise UserError(
            f"{folder} is a {values.get('model_type', 'model of unknown type')!r}: only 'gpt2' is converted"
        )
    _refuse_variants(source, values)
    own = values.get("fastgpt")
    own = own if isinstance(own, dict) else {}
    pdrops = [values[name] for name in _DROPOUTS]
    notes: list[str] = []
    if any(pdrop != pdrops[0] for pdrop in pdrops):
        notes.append(f"the three dropouts {pdrops} become one, {pdrops[0]}")
    block_size = values.get("n_positions", values["n_ctx"])
    shape = {**values, "block_size": block_size, "bias": own.get("bias", True), "dropout": pdrops[0]}
    config = model_config(source, shape)
    found = {}
    for name, tensor in _tensors(folder).items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not _BUFFERS.search(name):
            found[name] = tensor.t().contiguous() if _CONV1D.search(name) and tensor.dim() == 2 else tensor
    found = tied(source, found)
    if not config.bias:
        names = anatomy.parameters(config)
        found = {n: t for n, t in found.items() if n in names or not n.endswith(".bias") or t.any()}
    weights = in_fp32(check(source, found, config), notes)
    portable = Portable(config, weights, step=steps(own.get("step")), letters=own.get("letters"), notes=notes)
    portable.exact_gelu = values["activation_function"] == "gelu"
    if own.get("tokenizer") == "bytes":
        run = replace(Config(), model=config, data=DataConfig(tokenizer="bytes"))
        portable.extras["fastgpt"] = {"config": run.to_dict()}
    return portable


def write(folder: Path, portable: Portable, called: str | None = None) -> None:
    """Write the folder, whole or not at all; ``called``: the name in its card, if not the folder's. Raises OSError."""
    from safetensors.torch import save_file

    config = portable.config
    with_bias = anatomy.parameters(ModelConfig(**{**vars(config), "bias": True}))
    tensors = {}
    for name, shape in with_bias.items():
        tensor = portable.weights.get(name)
        if tensor is None:
            tensor = torch.zeros(shape)
        tensors[name] = (tensor.t() if _CONV1D.search(name) else tensor).contiguous()
    if portable.optimizer is not None:
        portable.notes.append("a Hugging Face folder has no place for the optimizer's state: it stays behind")
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        # Of the run's configuration only this: people publish these folders, and the rest holds their paths.
        own = {"bias": config.bias, "step": portable.step, "tokenizer": portable.tokenizer}
        if portable.letters is not None:
            own["letters"] = portable.letters
        write_json(partial / "config.json", {**_config(portable), "fastgpt": own})
        end = _end_of_text(portable)
        generation = {} if end is None else {"bos_token_id": end, "eos_token_id": end}
        write_json(partial / "generation_config.json", generation)
        write_whole(partial / "README.md", _card(called or folder.name, portable))
        if (note := _write_tokenizer(partial, portable)) is not None:
            portable.notes.append(note)
        mode = (partial / "config.json").stat().st_mode
        (partial / "model.safetensors").chmod(mode)  # safetensors makes it readable for its owner alone


def _end_of_text(portable: Portable) -> int | None:
    """The id that separates documents: a model of letters has none."""
    if portable.tokenizer == "gpt2":
        return 50256 if portable.config.vocab_size > 50256 else None
    return 0 if portable.tokenizer == "bytes" else None


def _card(name: str, portable: Portable) -> str:
    """The model card: what the model is, and what the run said. Nothing of the machine that it was trained on."""
    config, run = portable.config, portable.extras.get("fastgpt", {})
    theirs = portable.extras.get("nanogpt", {})
    data, optim = {}, {}
    if "loader" in run:  # one that was converted has our defaults
        with suppress(UserError):  # a file may say anything
            data, optim = (typed_fields(SECTIONS[name], portable.settings(name), name) for name in ("data", "optim"))
    bias = "" if config.bias else ", without biases (they are zero here)"
    figures = {
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.n_embd}{bias}",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} ({_TOKENS[portable.tokenizer]})",
    }
    if portable.step:
        figures["optimizer steps"] = f"{portable.step:,}"
    if portable.step and {"batch_size", "grad_accum"} <= data.keys():
        per_step = data["batch_size"] * data["grad_accum"] * config.block_size
        figures["tokens trained on"] = f"{rounded(portable.step * per_step)}, {per_step:,} per step"
    if {"lr", "schedule"} <= optim.keys():
        figures["learning rate"] = f"{optim['lr']:g} at its peak, {optim['schedule']}"
    best = loss(run.get("best_val_loss", theirs.get("best_val_loss")))
    if best is not None and best < 1e9:
        figures["best validation loss"] = f"{best:.4f} nats per token"
    corpus, hub = _corpus(data.get("data"))
    figures |= {"trained on": corpus, "licence of the model": "not stated"}
    datasets = f"datasets:\n- {hub}\n" if hub else ""
    rows = "\n".join(f"| {what} | {value} |" for what, value in figures.items())
    prompt = "Once" if portable.letters is None else next(filter(str.isalpha, portable.letters), portable.letters[0])
    trained = f"trained with fastgpt {__version__}" if data else f"converted by fastgpt {__version__}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{datasets}---
# {name}

A GPT-2 of {millions(anatomy.n_params(config))} parameters, {trained}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained("{name}") for auto in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer({json.dumps(prompt)}, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=True)[0]))
```
"""


_LICENCES = {
    STDLIB: "PSF-2.0",
    f"{HUB}HuggingFaceFW/fineweb": "ODC-By 1.0",
    f"{HUB}HuggingFaceFW/fineweb-edu": "ODC-By 1.0",
    f"{HUB}Skylion007/openwebtext": "CC0-1.0",
    f"{HUB}roneneldan/TinyStories": "CDLA-Sharing-1.0",
}
"""Licences of the corpora that the documentation names, as stated on their pages on the hub."""


def _corpus(data: str | None) -> tuple[str, str | None]:
    """What ``--data`` was, with its licence, and its name on the hub. A folder of tokens says in its manifest where its text is
    from. A path, and a corpus that is not known, stay out."""
    manifest = read_json(Path(data, MANIFEST)) if data else None
    source = str((manifest or {"source": data}).get("source"))
    if source not in _LICENCES:
        return "not stated", None
    hub = source.removeprefix(HUB) if source.startswith(HUB) else None
    name = hub or "the source code of Python's standard library"
    return f"{name} (licence of the text: {_LICENCES[source]})", hub


_TOKENS = {"gpt2": "GPT-2's byte-pair encoding", "bytes": "bytes", "chars": "letters"}


def _config(portable: Portable) -> dict[str, Any]:
    config, end = portable.config, _end_of_text(portable)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu" if portable.exact_gelu else "gelu_new",
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "n_inner": None,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }


def _refuse_variants(source: str, values: dict[str, Any]) -> None:
    """Raise UserError for a GPT-2 that fastgpt does not compute."""
    width = values["n_embd"]
    plain = {
        "n_inner": (None, 4 * width if isinstance(width, int) else None),
        "activation_function": ("gelu", *TANH),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for name, allowed in plain.items():
        if name in values and values[name] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{source} has {name} {values[name]!r}: fastgpt's GPT-2 has {wanted}")


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_safetensors

    whole, index, pickled = (
        folder / name for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    )
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        names = _json(index).get("weight_map")
        shards = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
        files = [folder / Path(name).name for name in shards]
    elif pickled.is_file():
        saved = load_file(pickled)
        if not isinstance(saved, dict):
            raise UserError(f"{pickled} is not a table of tensors")
        return {name: tensor for name, tensor in saved.items() if isinstance(tensor, Tensor)}
    else:
        raise UserError(f"{folder} has a config.json but no weights: model.safetensors is missing")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            open_file(file).close()
            tensors.update(load_safetensors(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)})") from error
    return tensors


def _json(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if values is None:
        raise UserError(f"{path} is missing, or holds no JSON object")
    return values


def _write_tokenizer(folder: Path, portable: Portable) -> str | None:
    """The tokenizer's files. Returns a sentence if there are none."""
    config = portable.config
    if portable.tokenizer != "gpt2":
        _write_letters(folder, portable)
        return None
    if config.vocab_size < 50257:
        return f"a vocabulary of {config.vocab_size} is not GPT-2's: there are no tokenizer files"
    write_whole(folder / "merges.txt", gpt2_merges())
    write_whole(folder / "vocab.json", json.dumps(gpt2_vocabulary()))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": config.block_size,
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        },
    )
    return None


def _write_letters(folder: Path, portable: Portable) -> None:
    """The tokenizer of bytes, which are written as letters as in GPT-2's files, or of a list of letters: a BPE without merges
    takes a text apart into letters."""
    letters = portable.letters
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = byte_letters() if letters is None else {letter: i for i, letter in enumerate(letters)}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": level if letters is None else None,
            "decoder": level if letters is None else {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": portable.config.block_size,
            "clean_up_tokenization_spaces": False,
        },
    )
