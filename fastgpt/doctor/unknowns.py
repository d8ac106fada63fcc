"""What the doctor could not look at, and which file or flag would let it."""

from __future__ import annotations

from fastgpt.doctor.evidence import Evidence, Seen
from fastgpt.doctor.figures import Figures
from fastgpt.hardware.cards import Gpu


def not_checked(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> list[str]:
    """One sentence for each group of findings that the evidence leaves open."""
    log, settings = evidence.log, figures.config.settings
    out = []
    if not settings:
        out.append(
            "Size, schedule and optimizer: give the run's config (or its log from the first line, which repeats it)."
        )
    elif figures.shape is None and (log is None or not log.all("parameters")):
        out.append("Size: n_layer, n_head, n_embd and block_size could not all be read from the config.")
    if log is None:
        out.append(
            "Speed, MFU, val against train and the curve: give the run's log (python train.py ... | tee run.log)."
        )
    else:
        if figures.steady_ms_per_iter is None:
            out.append("Speed and MFU: the log has no times of iterations without an evaluation.")
        elif figures.mfu_nanogpt is None:
            out.append("MFU: the model's shape and tokens per step are not in the log: give the config.")
        if figures.val_minus_train is None:
            out.append(
                "val against train: the log has fewer than three evaluations of both (step N: train loss A, val loss "
                "B)."
            )
    if gpu is None:
        out.append("MFU of the card's own peak, and memory: say which card it is for, --gpu rtx4070.")
    if evidence.checkpoint is None and (figures.config.get("init_from") == "resume" or (log and log.all("resume"))):
        out.append("Resuming: give the checkpoint (ckpt.pt); its shape and schedule are held against the config.")
    if figures.corpus_tokens is None and figures.seen():
        out.append("Epochs: the corpus' size is not known: --corpus-tokens N (for nanoGPT: bytes of train.bin / 2).")
    return out


def unread(evidence: Evidence) -> Seen:
    """Everything that was given and could not be read."""
    parts = (evidence.config, evidence.log, evidence.checkpoint, evidence)
    return [
        (item.place, f"{item.text.strip()[:100]}: {item.why}" if item.text.strip() else item.why)
        for part in parts
        if part is not None
        for item in part.unread
    ]
