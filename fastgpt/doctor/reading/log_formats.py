"""What the lines of a log look like: nanoGPT, nanochat, llm.c and fastgpt. Regular expressions over bytes, and nothing else.

Each kind of step line has a strict form, the whole line, and a loose one: as much as a line that was cut short still says
for certain. A number counts only when what follows it shows where it ends.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastgpt.doctor.evidence import LogKind

_N = r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|NaN|inf)"
_NA = rf"(?:{_N}|n/a)"
_STEP = r"(?P<step>\d{1,12})"
_LOSS = rf"(?P<loss>{_N})"


class StepForm(NamedTuple):
    """A step line. Groups: step, loss and, where the form has them, ms, mfu (percent), rate (tokens per second), lr."""

    kind: LogKind
    mark: bytes
    """Bytes that every line of this form contains: cheap to look for."""
    strict: re.Pattern[bytes]
    loose: re.Pattern[bytes]


def _form(kind: LogKind, mark: bytes, start: str, rest: str, certain: str = "") -> StepForm:
    """The strict form is ``start`` and ``rest``; the loose one ``start`` and as much as ``certain`` matches."""
    return StepForm(kind, mark, re.compile((start + rest).encode()), re.compile((start + certain).encode()))


STEPS = (
    # iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%, 134,060 tok/s, lr 6.00e-04, ...
    _form(
        "fastgpt",
        b"tok/s",
        rf"iter\s+{_STEP}:\s*loss\s+{_LOSS},\s*time\s+(?P<ms>{_NA})(?:ms)?,\s*mfu\s+(?P<mfu>{_NA})%?,"
        rf"\s*(?P<rate>{_NA})\s*tok/s",
        rf",\s*lr\s+(?P<lr>{_N}),",
    ),
    # iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%
    _form(
        "nanogpt",
        b"iter",
        rf"iter\s+{_STEP}:\s*loss\s+{_LOSS},",
        rf"\s*time\s+(?P<ms>{_N})ms,\s*mfu\s+(?P<mfu>{_N})%",
        rf"(?:\s*time\s+(?P<ms>{_N})ms)?",
    ),
    # step 00010/21400 (0.05%) | loss: 9.1 | lrm: 1.00 | dt: 412.08ms | tok/sec: 1,272,310 | bf16_mfu: 48.20 | ...
    _form(
        "nanochat",
        b"tok/sec",
        rf"step\s+{_STEP}/\d+\s+\([\d.]+%\)\s*\|\s*loss:\s*{_LOSS}\s*\|",
        rf"(?:[^|\n]{{0,40}}\|){{0,4}}?\s*dt:\s*(?P<ms>{_N})ms\s*\|\s*tok/sec:\s*(?P<rate>{_N})\s*\|"
        rf"\s*\w{{0,8}}mfu:\s*(?P<mfu>{_N})(?=\s*(?:\||$))",
    ),
    # step    1/19560 | loss 11.009 (+nanz)| norm 15.4 (+nanz)| lr 8.57e-07 | 3056.36 ms | 42.6% bf16 MFU | 171535 tok/s
    _form(
        "llm.c",
        b"tok/s",
        rf"step\s+{_STEP}/\d+\s*\|\s*(?:train\s+)?loss\s+{_LOSS}",
        rf"[^|\n]{{0,20}}\|\s*norm\s[^|\n]{{0,40}}\|\s*lr\s+(?P<lr>{_N})\s*\|\s*\(?(?P<ms>{_N})\s*ms\s*\|"
        rf"(?:\s*(?P<mfu>{_N})%[^|\n]{{0,30}}\|)?\s*(?P<rate>{_N})\s*tok/s",
        r"\s*[(|]",
    ),
    # llm.c's main.log: s:0 trl:10.9851 lr:0.000001 norm:15.32
    _form("llm.c", b"trl:", rf"\bs:{_STEP} trl:{_LOSS}", rf" lr:(?P<lr>{_N})\s", r"\s"),
)

_D = r"(?:\d+\.\d{2,12}|nan|inf)(?!\d)"
_D4 = r"(?:\d+\.\d{4,12}|nan|inf)(?!\d)"  # fewer decimals: shortened by a cut or a wrap
_EVALS: tuple[tuple[LogKind, str], ...] = (
    # step 500: train loss 5.4383, val loss 5.5055
    ("nanogpt", rf"step\s+{_STEP}:\s*train\s+loss\s+(?P<train>{_D}),\s*val\s+loss\s+(?P<val>{_D})"),
    # step 500: val loss 5.5055
    ("fastgpt", rf"step\s+{_STEP}(?:/\d+)?:?\s+val\s+loss\s+(?P<val>{_D4})"),
    # s:250 tel:6.4731
    ("llm.c", rf"\bs:{_STEP} tel:(?P<val>{_D4})"),
    # val loss 11.009360: of the step last seen
    ("llm.c", r"^\s*val loss\s+(?P<val>(?:\d+\.\d+|nan|inf))\s*$"),
)
EVALS = [(kind, re.compile(pattern.encode())) for kind, pattern in _EVALS]

START = re.compile(rb"(?:iter|step)\s+\d{1,12}\s*[:/]")
"""Where a step or evaluation line begins."""
VAL_LOSS = re.compile(rb"val\s+loss")
"""What an evaluation line contains."""

_NOTES: tuple[tuple[str, LogKind | None, bytes], ...] = (
    ("parameters", "nanogpt", rb"number of parameters: ([\d.]{1,12}M)"),
    ("no_decay", "nanogpt", rb"num non-decayed parameter tensors: (\d{1,6})"),
    ("parameters", "fastgpt", rb"([\d.]{1,12}M) parameters \((?:excluding position embeddings|positions apart)\)"),
    ("parameters", "nanochat", rb"Number of parameters: ([\d,]{1,20})"),
    ("parameters", "nanochat", rb"^total {1,30}: ([\d,]{1,20})"),
    ("parameters", "llm.c", rb"\| num_parameters {1,60}\| (\d{1,15})"),
    ("tokens_per_step", "nanogpt", rb"tokens per iteration will be: ([\d,]{1,20})"),
    ("tokens_per_step", "fastgpt", rb"([\d,]{1,20}) tokens: micro-batches of"),
    ("tokens_per_step", "nanochat", rb"[Tt]otal batch size ([\d,]{1,20})"),
    ("tokens_per_step", "llm.c", rb"\| total batch size {1,60}\| (\d{1,15})"),
    ("tokens_per_step", "llm.c", rb"total desired batch size: (\d{1,15})"),
    ("vocab", "nanogpt", rb"vocab_size of GPT-2 to (\d{1,9})"),
    ("vocab", "nanogpt", rb"found vocab_size = (\d{1,9})"),
    ("vocab", "nanochat", rb"Vocab size: ([\d,]{1,12})"),
    ("vocab", "llm.c", rb"\| padded_vocab_size Vp {1,60}\| (\d{1,9})"),
    ("device", "llm.c", rb"\| device {1,60}\| (\S[^|\n]{0,80}?) *\|"),
    ("device", "llm.c", rb"^Device \d+: (\S.{0,80})"),
    ("device", "nanochat", rb"GPU: (\S[^|\n]{0,80}?) \| Peak FLOPS"),
    ("device", "fastgpt", rb"^device {2,}(\S.{0,80})"),
    ("precision", "fastgpt", rb"^kernels {2,}[^,\n]{1,60}, (fp32|bf16|fp16-fast|fp16|fp8)(?![\w-])"),
    ("override", "nanogpt", rb"Overriding: (\w{1,60} = .{0,200})"),
    ("sm_gate", None, rb"(Not enough SMs to use max_autotune_gemm)"),
    ("oom", None, rb"(CUDA out of memory|OutOfMemoryError|\bout of memory)"),
    (
        "no_cuda",
        None,
        rb"(Torch not compiled with CUDA|[Nn]o CUDA GPUs are avail|Found no NVIDIA driver|No GPU: the Triton)",
    ),
    ("no_triton", None, rb"(No module named '?triton|Cannot find a working triton|TritonMissing|[Tt]riton not found)"),
    ("no_bf16", None, rb"((?:bfloat16|BFloat16|bf16) (?:is )?(?:not supported|only supported))"),
    ("no_bf16", None, rb"(does not support (?:bfloat16|bf16))"),
    ("nan", "fastgpt", rb"(step \d{1,12}: loss [^:\n]{1,80}: the step changed nothing)"),
    ("resume", None, rb"(Resuming training from|Resuming optimization from step \d{1,12}|resumed at step \d{1,12})"),
    ("checkpoint", None, rb"(saving checkpoint to|Writing checkpoint at step \d{1,12}|^saved \S+)"),
    ("traceback", None, rb"(Traceback \(most recent call last\))"),
)
NOTES = [(kind, program, re.compile(pattern)) for kind, program, pattern in _NOTES]
"""Lines that say something else: kind, whose log it shows, pattern with the value in its first group."""

RECORD_WORDS = (b"iter ", b"step ", b'"step"', b"val loss", b"trl:", b"tel:")
NOTE_WORDS = tuple(b"enough SMs|emory|Traceback|esum|checkpoint|saved |Overriding|changed nothing".split(b"|"))
START_WORDS = tuple(
    b'arameters|tokens|batch size|ocab|evice|GPU|CUDA|NVIDIA|riton|loat16|bf16|total |kernels  |"config"'.split(b"|")
)
"""Every record contains one of RECORD_WORDS, every note one of NOTE_WORDS or, of what a program says when it starts, of
START_WORDS: looking for words, in a block and then in its lines, is what most of a long log costs."""

ECHO_START = re.compile(rb"Overriding config with .{1,300}:?\s?$")
ECHO_END = re.compile(
    rb"\s*(?:tokens per iteration|Overriding|found vocab_size|Initializing |Resuming |defaulting to |number of param|Traceback"
    rb"|iter \d|step \d)"
)
"""What nanoGPT prints before and after it repeats a config file."""
