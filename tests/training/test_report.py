"""What the banner says on a GPU, simulated: how long the run takes, who waits for whom, what is compiled first."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from triton import knobs

from fastgpt.config import load_preset
from fastgpt.hardware import cards
from fastgpt.training import report
from fastgpt.training.distributed import World

CUDA = torch.device("cuda")


def run_on(device=CUDA, kernels="triton", graphs=None, preset="demo", **data):
    """A run as the banner sees it."""
    config = load_preset(preset, device.type)
    config = replace(config, train=replace(config.train, kernels=kernels), data=replace(config.data, **data))
    return SimpleNamespace(
        config=config,
        device=device,
        world=World(),
        stepper=SimpleNamespace(precision="bf16", graphs=graphs),
        micro_batch=config.data.batch_size,
        grad_accum=config.data.grad_accum,
        step=0,
        refused=None,
        train_loader=SimpleNamespace(tokens=32_768_000),
        val_loader=SimpleNamespace(tokens=5000),
        corpus=SimpleNamespace(skipped="1 files that are not UTF-8 (a.txt)"),
    )


@pytest.fixture
def rtx4070(monkeypatch):
    """A machine with this card, or with the one that the test asks for."""
    return present(monkeypatch, "rtx4070")


def present(monkeypatch, name):
    card = cards.lookup(name)
    monkeypatch.setattr(cards, "present", lambda device=None: card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=12 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(report, "device_name", lambda device: card.name)


def printed(run):
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        report.banner(console, run)
    return captured.get()


def test_the_demo_on_a_gpu_has_a_duration_in_minutes_and_says_what_is_compiled(rtx4070):
    text = printed(run_on())
    assert "1,000 steps, 16.4M tokens; projected 1 min, " in text
    assert "\ncompile  Triton compiles about 25 kernels until the first step is done, 10 s to 1 min" in text


def test_the_corpus_its_epochs_and_what_was_left_out_are_said(rtx4070):
    said = "data     stdlib (gpt2): 32.8M tokens, of which the run reads 50%; 5k to validate; left out: 1 files that are not"
    assert said in printed(run_on())
    assert "the run reads 2.5 epochs; 5k" in printed(run_on(grad_accum=10))


def test_a_run_of_days_has_a_duration_in_hours(rtx4070):
    run = run_on(preset="gpt2-124m")
    assert " h " in printed(run).split("; projected ")[1].split(" tok/s")[0]


def test_the_banner_says_when_the_gpu_waits_for_the_host_unless_graphs_launch(rtx4070, monkeypatch):
    present(monkeypatch, "h200")
    tiny = dict(batch_size=1, grad_accum=1)
    assert "\nhost     projected: the GPU waits " in printed(run_on(**tiny))
    assert "\nhost " not in printed(run_on(**tiny, graphs=object()))
    assert "\nhost " not in printed(run_on(preset="gpt2-124m"))


def test_eager_kernels_compile_nothing(rtx4070):
    assert "\ncompile" not in printed(run_on(kernels="eager"))


@pytest.mark.parametrize(
    "device, hidden, said",
    [
        (torch.device("cpu"), True, "triton is not installed: the model trains in plain PyTorch, --kernels eager"),
        (torch.device("cpu"), False, None),
        (CUDA, False, "the Tesla T4 has compute capability 7.5, and the kernels need 8.0 for bf16"),
    ],
)
def test_plain_pytorch_is_said_where_triton_cannot_run(rtx4070, monkeypatch, device, hidden, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    if hidden:
        monkeypatch.setattr("fastgpt.hardware.requirements.find_spec", lambda name: None)
    text = printed(run_on(device, "eager"))
    assert (said in text) if said else ("plain PyTorch" not in text)


def test_compiling_is_shown_kernel_by_kernel_and_the_hooks_are_put_back(monkeypatch):
    monkeypatch.setattr(report, "SAY_SECONDS", 0.0)
    console = Console(width=100, force_terminal=False)
    bar, fn = report.progress_bar(console, 0, 10), SimpleNamespace(name="forward_kernel")
    before = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    with console.capture() as captured, report.compiling_shown(run_on(), console, bar):
        # As triton calls them.
        assert not knobs.runtime.jit_cache_hook(key="", repr="", fn=fn, compile={}, is_manual_warmup=False)
        assert bar.tasks[0].description == "compiling forward_kernel"
        knobs.runtime.jit_post_compile_hook(key="", repr="", fn=fn, compile={}, is_manual_warmup=False)
        assert bar.tasks[0].description == "training"
    assert captured.get() == "compiled 1 kernels in 0 s, forward_kernel last\n"
    assert before == (knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook)


def test_a_machine_without_psutil_leaves_its_memory_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert report._resident() is None
    record = {"step": 1, "interval_loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "memory_gb": None}
    assert report.log_line(record).endswith("mem n/a")


def test_the_log_line_of_a_run_without_an_end_has_no_eta():
    record = {"step": 1, "interval_loss": 1.0, "lr": 1e-3, "grad_norm": 1.0}
    assert report.log_line(record | {"eta_s": 0.0}).endswith(", eta 0:00:00")
    assert "eta" not in report.log_line(record | {"eta_s": 0.1 * 2**63})  # of --max-iters 9223372036854775807
