"""What a machine lacks for its GPU or for Triton's kernels is said in one sentence with its remedy, before anything runs."""

from __future__ import annotations

import sys

import pytest
import torch
from triton.backends.nvidia import driver

from fastgpt.common import UserError
from fastgpt.config import parse
from fastgpt.hardware import device, requirements
from fastgpt.hardware.__main__ import main as hardware

CARD = "NVIDIA GeForce RTX 4070, 535.104.05"


@pytest.fixture
def seen(monkeypatch):
    """``seen(listed, cuda, available)``: what nvidia-smi lists, which CUDA torch is built for, and whether it sees a GPU."""

    def see(listed="", cuda=None, available=False, capability=(8, 9)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(requirements, "output", lambda *command, cwd=None: listed)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
        monkeypatch.setattr(driver, "CudaUtils", lambda: None)

    return see


def refused(where="auto", kernels="triton"):
    with pytest.raises(UserError) as error:
        device.pick(where, kernels)
    return str(error.value)


@pytest.mark.parametrize("kernels", ["triton", "eager"])
@pytest.mark.parametrize("where", ["auto", "cuda"])
def test_a_cpu_build_of_torch_beside_a_card_is_no_machine_without_a_gpu(seen, where, kernels):
    seen(CARD)
    said = refused(where, kernels)
    assert said.startswith("this machine has an NVIDIA GeForce RTX 4070, but torch 2.")
    assert "is built without CUDA: install the build for CUDA" in said and said.endswith(
        "--device cpu does without the card"
    )


def test_a_driver_that_is_too_old_is_named_with_torchs_own_reason(seen, monkeypatch):
    seen(CARD, cuda="13.0")

    def init():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your driver."
        )

    monkeypatch.setattr(torch.cuda, "init", init)
    said = refused()
    assert (
        "built for CUDA 13.0, cannot use it with driver 535.104.05 (The NVIDIA driver on your system is too old" in said
    )
    assert "(found version 12020)): update the driver" in said


def test_a_variable_that_hides_the_card_is_named(seen, monkeypatch):
    seen(CARD, cuda="13.0")

    def init():
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    said = "this machine has an NVIDIA GeForce RTX 4070, but CUDA_VISIBLE_DEVICES is '1', which hides it: unset it, or name"
    assert refused().startswith(said)


@pytest.mark.parametrize("hide", ["", "-1", "NoDevFiles"])
def test_a_card_that_is_hidden_and_a_device_that_is_chosen_are_obeyed(seen, monkeypatch, hide):
    seen(CARD)
    assert device.pick("cpu", "eager").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hide)
    assert device.pick("auto", "eager").type == "cpu"


def test_every_command_that_wants_a_gpu_names_the_cause(seen):
    seen(CARD)
    with pytest.raises(UserError, match=r"gpu is not given and this machine has an NVIDIA .* built without CUDA"):
        hardware([])
    assert requirements.no_gpu().startswith("this machine has an")
    seen()
    assert requirements.no_gpu() == f"torch {torch.__version__} sees no CUDA GPU"


@pytest.mark.parametrize(
    "gcc, header, sentence",
    [
        (True, True, None),
        (False, True, "Triton finds no C compiler to build its kernels' launcher with: sudo apt install gcc, or"),
        (
            True,
            False,
            "Triton finds no Python.h to build its kernels' launcher with: sudo apt install python3.{}-dev, or",
        ),
        (
            False,
            False,
            "Triton finds no C compiler and no Python.h to build .* with: sudo apt install gcc python3.{}-dev, or",
        ),
    ],
)
def test_a_machine_without_compiler_or_headers_is_refused_before_the_first_launch(
    seen, monkeypatch, tmp_path, gcc, header, sentence
):
    seen(available=True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.setattr(requirements.shutil, "which", lambda name: f"/usr/bin/{name}" if gcc else None)
    monkeypatch.setattr(requirements.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if header:
        (tmp_path / "Python.h").touch()
    if sentence is None:
        assert device.pick("auto", "triton").type == "cuda"
        return
    with pytest.raises(UserError, match=sentence.format(sys.version_info.minor)):
        device.pick("auto", "triton")
    assert device.pick("auto", "eager").type == "cuda"
    with pytest.raises(UserError, match=r"^compile is on but Triton finds .*, or leave out --compile$"):
        device.pick("auto", "eager", compiled=True)
    monkeypatch.setattr(sys, "platform", "win32")  # triton-windows brings a compiler
    assert requirements.no_compiler() is None


def test_a_compiler_of_the_users_own_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(requirements.shutil, "which", {"/opt/cc": "/opt/cc"}.get)
    monkeypatch.setattr(requirements.sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setenv("CPATH", str(tmp_path))
    assert requirements.no_compiler() is None
    monkeypatch.setenv("CC", "ccache gcc")
    said = "Triton finds no C compiler 'ccache gcc', which CC names, to build its kernels' launcher with: sudo apt install gcc"
    assert requirements.no_compiler("") == f"{said} and unset CC"


def test_a_launcher_that_triton_cannot_build_is_told_before_the_first_launch(monkeypatch, tmp_path):
    """By letting triton try: a compiler that is there may fail all the same, and so may what it has built."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(driver, "library_dirs", lambda: [])
    compiler, cache = tmp_path / "cc", tmp_path / "cache"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho no program > "$2"\nexit $FAILS\n')
    compiler.chmod(0o700)
    for name, value in {"CC": compiler, "TRITON_CACHE_DIR": cache, "FAILS": 1}.items():
        monkeypatch.setenv(name, str(value))
    said = "Triton cannot build or load its kernels' launcher ("
    assert requirements.no_launcher().startswith(f"{said}{compiler} failed, as it says above): see to the compiler, ")
    monkeypatch.setenv("FAILS", "0")
    why = requirements.no_launcher("")
    assert why.startswith(f"{said}{cache}/") and why.endswith("a folder that programs run from with TRITON_CACHE_DIR")


@pytest.mark.parametrize("capability, fits", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_card_older_than_ampere_trains_eagerly_in_fp16(seen, capability, fits):
    from fastgpt.ops import precision_for

    seen(available=True, capability=capability)
    why = requirements.no_triton("cuda")
    assert parse([], "cuda", "eager" if why else "triton").train.kernels == ("triton" if fits else "eager")
    assert precision_for("auto", torch.device("cuda")) == ("bf16" if fits else "fp16")
    if not fits:
        assert "use --kernels eager --precision fp16" in refused()
        assert device.pick("auto", "eager").type == "cuda"


def test_an_amd_card_trains_eagerly(seen, monkeypatch):
    """Its torch calls it a CUDA device, and Triton compiles for it: kernels that nobody has tried there."""
    seen(available=True, capability=(11, 0))
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert parse([], "cuda", "eager" if requirements.no_triton("cuda") else "triton").train.kernels == "eager"
    assert refused().endswith("is an AMD GPU, and the kernels are written for NVIDIA's: use --kernels eager")
    assert device.pick("auto", "eager").type == "cuda"


@pytest.mark.parametrize("system", ["darwin", "win32", "linux"])
def test_without_triton_plain_pytorch_is_the_default_and_triton_an_error(seen, monkeypatch, tmp_path, system):
    seen()
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    default = "eager" if requirements.no_triton("cpu") else "triton"
    assert parse([], "cpu", default).train.kernels == "eager"
    assert parse(["--kernels", "triton"], "cpu", default).train.kernels == "triton"
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nkernels = "triton"\n')
    assert parse([str(file)], "cpu", default).train.kernels == "triton"
    assert refused().startswith("kernels is 'triton' but triton is not installed: use --kernels eager")


@pytest.mark.parametrize(
    "system, variable, usual, remedy",
    [
        ("linux", None, "g++", "sudo apt install g++"),
        ("darwin", None, "clang++", "xcode-select --install"),
        ("win32", None, "cl", "install Microsoft's C++ build tools"),
        ("linux", "/opt/gone", "/opt/gone", "set CXX to one"),
    ],
)
def test_torch_compile_on_a_cpu_without_a_cpp_compiler_is_refused(seen, monkeypatch, system, variable, usual, remedy):
    seen()
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delenv("CXX", raising=False)
    if variable:
        monkeypatch.setenv("CXX", variable)
    monkeypatch.setattr(requirements.shutil, "which", lambda name: None)
    with pytest.raises(UserError) as error:
        device.pick("cpu", "eager", compiled=True)
    assert str(error.value) == (
        f"compile is on but torch.compile finds no C++ compiler {usual!r} to compile for the CPU with: {remedy}, or leave "
        "out --compile"
    )
    assert device.pick("cpu", "eager").type == "cpu"
    monkeypatch.setattr(requirements.shutil, "which", {usual: usual}.get)
    assert device.pick("cpu", "eager", compiled=True).type == "cpu"
