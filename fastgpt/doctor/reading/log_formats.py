"""What the lines of a log look like: nanoGPT, nanochat, llm.c and fastgpt. Regular expressions, and nothing else.

A number counts only when what follows it shows where it ends: lines are cut, wrapped and glued together.
"""

from __future__ import annotations

import re

from fastgpt.doctor.evidence import LogKind

_N = r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|NaN|inf)"
_NA = rf"(?:{_N}|n/a)"
_STEP = r"(?P<step>\d{1,12})"
_LOSS = rf"(?P<loss>{_N})"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.ASCII | re.MULTILINE)


_D = r"(?:\d+\.\d{2,12}|nan|inf)(?!\d)"
_D4 = r"(?:\d+\.\d{4,12}|nan|inf)(?!\d)"  # fewer decimals: shortened by a cut or a wrap
_RECORDS: tuple[tuple[LogKind, str], ...] = (
    # iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%, 134,060 tok/s, lr 6.00e-04, ...
    (
        "fastgpt",
        rf"iter\s+{_STEP}:\s*loss\s+{_LOSS},\s*time\s+(?P<ms>{_NA})(?:ms)?,\s*mfu\s+(?P<mfu>{_NA})%?,"
        rf"\s*(?P<rate>{_NA})\s*tok/s,\s*lr\s+(?P<lr>{_N}),",
    ),
    # iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%
    ("nanogpt", rf"iter\s+{_STEP}:\s*loss\s+{_LOSS},\s*time\s+(?P<ms>{_N})ms,\s*mfu\s+(?P<mfu>{_N})%"),
    # step 00010/21400 (0.05%) | loss: 9.1 | lrm: 1.00 | dt: 412.08ms | tok/sec: 1,272,310 | bf16_mfu: 48.20 | ...
    (
        "nanochat",
        rf"step\s+{_STEP}/\d+\s+\([\d.]+%\)\s*\|\s*loss:\s*{_LOSS}\s*\|(?:[^|\n]{{0,40}}\|){{0,4}}?"
        rf"\s*dt:\s*(?P<ms>{_N})ms\s*\|\s*tok/sec:\s*(?P<rate>{_N})\s*\|"
        rf"\s*\w{{0,8}}mfu:\s*(?P<mfu>{_N})(?=\s*(?:\||$))",
    ),
    # step    1/19560 | loss 11.009 (+nanz)| norm 15.4 (+nanz)| lr 8.57e-07 | 3056.36 ms | 42.6% bf16 MFU | 171535 tok/s
    (
        "llm.c",
        rf"step\s+{_STEP}/\d+\s*\|\s*(?:train\s+)?loss\s+{_LOSS}[^|\n]{{0,20}}\|\s*norm\s[^|\n]{{0,40}}"
        rf"\|\s*lr\s+(?P<lr>{_N})\s*\|\s*\(?(?P<ms>{_N})\s*ms\s*\|"
        rf"(?:\s*(?P<mfu>{_N})%[^|\n]{{0,30}}\|)?\s*(?P<rate>{_N})\s*tok/s",
    ),
    # llm.c's main.log: s:0 trl:10.9851 lr:0.000001 norm:15.32
    ("llm.c", rf"\bs:{_STEP} trl:{_LOSS} lr:(?P<lr>{_N})\s"),
    # step 500: train loss 5.4383, val loss 5.5055
    ("nanogpt", rf"step\s+{_STEP}:\s*train\s+loss\s+(?P<train>{_D}),\s*val\s+loss\s+(?P<val>{_D})"),
    # step 500: val loss 5.5055
    ("fastgpt", rf"step\s+{_STEP}(?:/\d+)?:?\s+val\s+loss\s+(?P<val>{_D4})"),
    # s:250 tel:6.4731
    ("llm.c", rf"\bs:{_STEP} tel:(?P<val>{_D4})"),
    # val loss 11.009360: of the step last seen
    ("llm.c", r"^[ \t]*val loss[ \t]+(?P<val>(?:\d+\.\d+|nan|inf))[ \t]*$"),
)
RECORDS = [(kind, _pattern(pattern)) for kind, pattern in _RECORDS]
"""Every form of a step or evaluation. Groups of a step: step, loss and, where the form has them, ms, mfu (percent), rate
(tokens per second), lr; of an evaluation: val and, where the form has them, step, train."""

START = _pattern(r"(?:iter|step)\s+\d{1,12}\s*[:/]")
"""Where a step or evaluation line begins."""
JSON = _pattern(r"^\{.*$")
"""What may be a line of metrics.jsonl."""

_NOTES: tuple[tuple[str, LogKind | None, str], ...] = (
    ("parameters", "nanogpt", r"number of parameters: ([\d.]{1,12}M)"),
    ("no_decay", "nanogpt", r"num non-decayed parameter tensors: (\d{1,6})"),
    ("parameters", "fastgpt", r"([\d.]{1,12}M) parameters \((?:excluding position embeddings|positions apart)\)"),
    ("parameters", "nanochat", r"Number of parameters: ([\d,]{1,20})"),
    ("parameters", "nanochat", r"^total {1,30}: ([\d,]{1,20})"),
    ("parameters", "llm.c", r"\| num_parameters {1,60}\| (\d{1,15})"),
    ("tokens_per_step", "nanogpt", r"tokens per iteration will be: ([\d,]{1,20})"),
    ("tokens_per_step", "fastgpt", r"([\d,]{1,20}) tokens: micro-batches of"),
    ("tokens_per_step", "nanochat", r"[Tt]otal batch size ([\d,]{1,20})"),
    ("tokens_per_step", "llm.c", r"\| total batch size {1,60}\| (\d{1,15})"),
    ("tokens_per_step", "llm.c", r"total desired batch size: (\d{1,15})"),
    ("vocab", "nanogpt", r"vocab_size of GPT-2 to (\d{1,9})"),
    ("vocab", "nanogpt", r"found vocab_size = (\d{1,9})"),
    ("vocab", "nanochat", r"Vocab size: ([\d,]{1,12})"),
    ("vocab", "llm.c", r"\| padded_vocab_size Vp {1,60}\| (\d{1,9})"),
    ("device", "llm.c", r"\| device {1,60}\| (\S[^|\n]{0,80}?) *\|"),
    ("device", "llm.c", r"^Device \d+: (\S.{0,80})"),
    ("device", "nanochat", r"GPU: (\S[^|\n]{0,80}?) \| Peak FLOPS"),
    ("device", "fastgpt", r"^device {2,}(\S.{0,80})"),
    ("precision", "fastgpt", r"^kernels {2,}[^,\n]{1,60}, (fp32|bf16|fp16-fast|fp16|fp8)(?![\w-])"),
    ("override", "nanogpt", r"Overriding: (\w{1,60} = .{0,200})"),
    ("sm_gate", None, r"(Not enough SMs to use max_autotune_gemm)"),
    ("oom", None, r"(CUDA out of memory|OutOfMemoryError|\bout of memory)"),
    (
        "no_cuda",
        None,
        r"(Torch not compiled with CUDA|[Nn]o CUDA GPUs are avail|Found no NVIDIA driver|No GPU: the Triton)",
    ),
    ("no_triton", None, r"(No module named '?triton|Cannot find a working triton|TritonMissing|[Tt]riton not found)"),
    ("no_bf16", None, r"((?:bfloat16|BFloat16|bf16) (?:is )?(?:not supported|only supported))"),
    ("no_bf16", None, r"(does not support (?:bfloat16|bf16))"),
    ("nan", "fastgpt", r"(step \d{1,12}: loss [^:\n]{1,80}: the step changed nothing)"),
    ("resume", None, r"(Resuming training from|Resuming optimization from step \d{1,12}|resumed at step \d{1,12})"),
    ("checkpoint", None, r"(saving checkpoint to|Writing checkpoint at step \d{1,12}|^saved \S+)"),
    ("traceback", None, r"(Traceback \(most recent call last\))"),
)
NOTES = [(kind, program, _pattern(pattern)) for kind, program, pattern in _NOTES]
"""Lines that say something else: kind, whose log it shows, pattern with the value in its first group."""

ECHO = _pattern(
    r"Overriding config with .{1,300}:?\s?\n"
    r"(?P<config>(?:(?![ \t]*(?:tokens per iteration|Overriding|found vocab_size|Initializing |Resuming |defaulting to "
    r"|number of param|Traceback|iter \d|step \d)).*\n){0,2000})"
)
"""The config file that nanoGPT repeats, with the line before it."""

ANSI = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)"  # window titles, links
    r"|[@-Z\\-_])"
)
