"""Checkpoints: nanoGPT's ckpt.pt and fastgpt's: shapes, plain values, and whether the weights are finite. Code is never run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastgpt.anatomy import SHAPE, Shapes, shape_told_by
from fastgpt.common import UserError, first_line
from fastgpt.doctor.evidence import CheckpointFacts, ConfigFacts, Place, Setting, Unread
from fastgpt.doctor.reading import configs, configs_fastgpt
from fastgpt.doctor.reading.values import DEFAULTS, store

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.checkpoints.read import Source

FILE_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_NAME = re.compile(r"step-(\d{8,})(?:\.\d+)?")


def is_checkpoint(path: Path, head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a pickle or a zip (which torch.save writes), or a folder is fastgpt's."""
    if path.is_dir():
        return (path / "manifest.json").is_file() and (path / "state.json").is_file()
    return head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a run's folder: fastgpt's, else nanoGPT's ckpt.pt."""
    numbered = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    if whole := [(step, path) for step, path in numbered if is_checkpoint(path, b"")]:
        return max(whole)[1]
    return folder / "ckpt.pt" if (folder / "ckpt.pt").is_file() else None


def read_checkpoint(path: Path) -> CheckpointFacts:
    """What a checkpoint holds. Raises UserError for one that is damaged, of another program, or that would run code."""
    state: Mapping[str, Any]
    if path.is_dir():  # fastgpt's: {config: {model, data, optim, train}, step, best_val_loss, ...}
        source, shapes, not_finite = _from_folder(path)
        state = source.state
        config = state.get("config")
        sections = config if isinstance(config, Mapping) else {}
        facts = _facts("fastgpt", path, sections.get("model"), shapes)
        facts.step, facts.not_finite = source.step, not_finite
        facts.config = configs_fastgpt.of_sections(sections, Place(str(path)))
    else:  # nanoGPT's: {model, optimizer, model_args, iter_num, best_val_loss, config}, or a bare state dict
        state, shapes = _from_file(path)
        config = state.get("config")
        facts = _facts("nanogpt", path, state.get("model_args"), shapes)
        facts.step = _whole(state.get("iter_num"))
        facts.config = configs.of_values(config, Place(str(path))) if isinstance(config, Mapping) and config else None
        model = state.get("model", state)
        facts.not_finite = _not_finite(model.items() if isinstance(model, Mapping) else ())
    facts.best_val_loss = _number(state.get("best_val_loss"))
    return facts


def _from_file(path: Path) -> tuple[Mapping[str, Any], Shapes]:
    """A checkpoint that is one file: what it holds, and the shapes of its model's tensors."""
    from fastgpt.checkpoints.formats.nanogpt import load_file  # torch: two seconds that only a checkpoint is worth

    state = load_file(path)
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}: it is neither nanoGPT's nor fastgpt's")
    model = state.get("model", state)
    shapes = _shapes(model if isinstance(model, Mapping) else {})
    if not any(name.endswith("wte.weight") for name in shapes):
        raise UserError(
            f"checkpoint {path} holds no GPT-2 (no transformer.wte.weight): it is neither nanoGPT's nor fastgpt's"
        )
    return state, shapes


def _from_folder(path: Path) -> tuple[Source, Shapes, list[str]]:
    """A checkpoint that is a folder: its plain values, the shapes of its model's tensors, and those that are not finite."""
    from safetensors import SafetensorError

    from fastgpt.checkpoints.read import Damaged, open_directory

    try:
        source = open_directory(path, verify_all=False)
        shapes = {name: tuple(found.size) for name, found in source.reader.tensors.items()}
        not_finite = _not_finite(_parts(source))
    except (Damaged, SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged or cannot be read: {first_line(error)}") from error
    weights = {name.removeprefix("model."): shape for name, shape in shapes.items() if name.startswith("model.")}
    return source, weights, list(dict.fromkeys(not_finite))


def _parts(source: Source) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, in the parts in which its ranks saved them."""
    from safetensors import safe_open

    for index, stored in source.reader.chunks.items():
        if index.fqn.startswith("model."):
            with safe_open(source.reader.path / stored["file"], framework="pt") as file:
                yield index.fqn.removeprefix("model."), file.get_tensor(stored["key"])


def _shapes(tensors: Mapping[Any, Any]) -> Shapes:
    """Shapes by name without torch.compile's and DDP's prefixes; of tensors over the same memory, and of a head that is a copy
    of the embedding, the first."""
    import torch

    from fastgpt.checkpoints.formats.portable import tied

    tensors = {re.sub(r"^(?:(?:_orig_mod|module)\.)+", "", str(name)): tensor for name, tensor in tensors.items()}
    with suppress(UserError, RuntimeError, AttributeError):  # another head, or one that cannot be compared
        tensors = tied("", tensors)
    shapes: Shapes = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.device.type == "cpu" and tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        shapes[name] = tuple(tensor.shape)
    return shapes


def _not_finite(tensors: Iterable[tuple[Any, Any]]) -> list[str]:
    """Names of the model's floating-point tensors that hold NaN or infinity; read in parts, from the mapped file."""
    import torch

    part, found = 1 << 24, []
    for name, tensor in tensors:
        dense = isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.layout is torch.strided
        if dense and tensor.is_floating_point() and tensor.itemsize > 1:  # torch cannot say it of fp8
            flat = tensor.reshape(-1)
            if not all(bool(torch.isfinite(flat[at : at + part]).all()) for at in range(0, flat.numel(), part)):
                found.append(str(name))
    return found


def _facts(kind: Literal["nanogpt", "fastgpt"], path: Path, said: Any, shapes: Shapes) -> CheckpointFacts:
    """Shape as the checkpoint says it; where its tensors say otherwise, theirs."""
    place, read = Place(str(path)), ConfigFacts("nanogpt", defaults=DEFAULTS)
    for name in SHAPE if isinstance(said, Mapping) else ():
        if said.get(name) is not None:
            store(read, name, Setting(said[name], place, name))
    facts = CheckpointFacts(kind, str(path), {name: s.value for name, s in read.settings.items()}, unread=read.unread)
    for name, value in shape_told_by(shapes).items():
        if name in facts.shape and facts.shape[name] != value:
            why = f"the checkpoint says {facts.shape[name]}, its tensors {value}: the tensors count"
            facts.unread.append(Unread(place, name, why))
        facts.shape[name] = value
    # without position embeddings, and the causal masks that nanoGPT stores where it has no flash attention
    not_counted = re.compile(r"wpe\.weight$|\.attn\.(?:masked_)?bias$")
    facts.parameters = sum(math.prod(size) for name, size in shapes.items() if not not_counted.search(name)) or None
    return facts


def _number(value: Any) -> float | None:
    """A number, or a tensor of one element (nanoGPT's best_val_loss is one), as a float; None for anything else."""
    try:
        number = float(value)
    except Exception:  # a tensor of many elements, a string, None, a meta tensor
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number < 0 or number > 1e15 else int(number)
