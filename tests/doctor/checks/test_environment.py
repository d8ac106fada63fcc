"""The machine: what it lacks, what the log says of it, and what its card cannot do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastgpt.config import ModelConfig
from fastgpt.doctor.evidence import Machine, Place
from fastgpt.doctor.reading.surroundings import this_machine
from fastgpt.hardware import cards
from fastgpt.performance import fitting, memory
from tests.doctor.runs import RTX4070, curve, examine, log, names, note, only, real_report

T4, V100 = cards.lookup("t4"), cards.lookup("v100")
SOUND = Machine("linux", "2.11.0", cuda=True, triton=True, nvidia_driver=True)


def lacks(it, cuda=True):
    return examine("device = 'cuda'" if cuda else "", machine=it)


def test_a_sound_machine_and_one_of_which_nothing_is_wanted_are_clean():
    assert lacks(SOUND) == []
    assert lacks(Machine("linux", "2.11.0+cpu"), cuda=False) == []


def test_a_cpu_build_of_torch_beside_a_driver():
    (finding,) = lacks(Machine("linux", "2.11.0+cpu", triton=True, nvidia_driver=True), cuda=False)
    assert (finding.id, finding.check, finding.severity) == ("environment", "no_cuda", "critical")
    assert "2.11.0+cpu" in finding.title and "driver" in finding.evidence[0][1]


@pytest.mark.parametrize("device, found", [("cpu", []), ("cuda", ["no_cuda"]), ("auto", ["no_cuda"])])
def test_a_cpu_that_was_chosen_beside_a_card_is_no_fault(device, found):
    unused = Machine("linux", "2.11.0+cpu", triton=True, nvidia_driver=True)
    assert [f.check for f in examine(f"device = '{device}'", machine=unused)] == found


def test_cuda_asked_for_and_absent():
    assert [f.check for f in lacks(Machine("linux", "2.11.0", triton=True))] == ["no_cuda"]


@pytest.mark.parametrize(
    "platform, package", [("win32", "pip install triton-windows"), ("linux", "pip install triton")]
)
def test_torch_without_triton(platform, package):
    (finding,) = lacks(Machine(platform, "2.11.0", cuda=True, nvidia_driver=True))
    assert finding.check == "no_triton" and finding.advice == package


def test_here_looks_at_this_machine():
    import torch

    it = this_machine()
    assert it.torch == torch.__version__ and it.cuda == torch.cuda.is_available() and it.triton


# --- the log -----------------------------------------------------------------------------------------------------------


def test_errors_in_the_log():
    for kind, text, check in [
        ("no_cuda", "AssertionError: Torch not compiled with CUDA enabled", "no_cuda"),
        ("no_triton", "RuntimeError: Cannot find a working triton installation", "no_triton"),
        ("no_bf16", "RuntimeError: bfloat16 is not supported on this GPU", "no_bf16"),
        ("no_compiler", "fatal error: Python.h: No such file or directory", "no_compiler"),
        ("oom", "torch.OutOfMemoryError: CUDA out of memory.", "out_of_memory"),
    ]:
        finding = only(examine(log=log(notes=(note(kind, text),))), check)
        assert finding.evidence[0][1] == text


def test_a_demo_in_the_interpreter_is_no_broken_machine():
    text = "No GPU: the Triton kernels run in Triton's interpreter, one program at a time in NumPy."
    (finding,) = [f for f in examine(log=log(notes=(note("no_cuda", text),))) if f.id == "environment"]
    assert (finding.check, finding.severity) == ("interpreted", "info")


def test_a_log_from_windows_names_triton_windows():
    path = note("traceback", r'  File "C:\Users\me\nanoGPT\train.py", line 263')
    text = note("no_triton", "ModuleNotFoundError: No module named 'triton'")
    assert only(examine(log=log(notes=(path, text))), "no_triton").advice == "pip install triton-windows"


def test_out_of_memory_is_answered_with_half_the_micro_batch_at_the_same_tokens():
    text = note("oom", "CUDA out of memory")
    finding = only(
        examine("batch_size = 12\ngradient_accumulation_steps = 40", log=log(notes=(text,))), "out_of_memory"
    )
    assert finding.advice == "batch_size = 6\ngradient_accumulation_steps = 80"
    finding = only(examine("batch_size = 1", log=log(notes=(text,))), "out_of_memory")
    assert "block_size" in finding.advice


@pytest.mark.parametrize(
    ("text", "line", "sure"),
    [
        ("warning: retry after OutOfMemoryError", 1, ("warning", "possible")),
        (
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory.",
            1,
            ("critical", "likely"),
        ),  # stdout, buffered, came later
        ("torch.OutOfMemoryError: CUDA out of memory.", 999, ("critical", "certain")),
    ],
)
def test_out_of_memory_that_steps_follow_is_not_certain(text, line, sure):
    said = replace(note("oom", text), place=Place("run.log", line))
    finding = only(examine(log=log(curve(600), notes=(said,))), "out_of_memory")
    assert (finding.severity, finding.confidence) == sure


# --- the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [T4, V100])
def test_a_card_without_bf16(gpu):
    finding = only(examine("n_layer = 2\nn_embd = 192\nn_head = 3", gpu=gpu), "no_bf16")
    assert gpu.arch in finding.title and finding.advice.startswith("dtype = 'float16'")


def test_bf16_on_a_card_that_has_it_and_fp16_on_one_that_has_not_stay_silent():
    assert "no_bf16" not in names(examine(gpu=RTX4070))
    assert "no_bf16" not in names(examine("dtype = 'float16'", gpu=T4))


def test_too_little_memory_is_answered_with_what_fits_at_the_same_tokens():
    finding = only(examine("batch_size = 64\ngradient_accumulation_steps = 8", gpu=RTX4070), "too_little_vram")
    lines = dict(line.split(" = ") for line in finding.advice.split("\n")[:2])
    batch, accumulate = int(lines["batch_size"]), int(lines["gradient_accumulation_steps"])
    assert batch * accumulate == 512 and batch < 64
    usable = fitting.usable_vram(RTX4070)
    assert memory.memory(ModelConfig(), micro_batch=batch, kernels="nanogpt-compile").total <= usable
    assert memory.memory(ModelConfig(), micro_batch=2 * batch, kernels="nanogpt-compile").total > usable


def test_what_fits_or_has_run_stays_silent():
    assert "too_little_vram" not in names(examine(gpu=RTX4070))
    assert "too_little_vram" not in names(examine("batch_size = 64", gpu=None))
    assert "too_little_vram" not in names(examine("batch_size = 64", gpu=RTX4070, log=log(curve(100))))
    assert "too_little_vram" not in names(real_report("40m").findings)


def test_a_model_that_does_not_fit_at_all():
    finding = only(examine("n_layer = 48\nn_head = 25\nn_embd = 1600", gpu=RTX4070), "too_little_vram")
    assert "one sequence does not fit" in finding.advice
