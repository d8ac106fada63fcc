"""What the banner says on a GPU, simulated: how long the run takes, who waits for whom, what is compiled first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from triton import knobs

from fastgpt.common import as_typed
from fastgpt.config import load_preset
from fastgpt.doctor.reading.logs import LogReader
from fastgpt.hardware import cards
from fastgpt.training import report
from fastgpt.training.distributed import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
        tokens=lambda steps: steps * config.tokens_per_step,
        train_loader=SimpleNamespace(tokens=32_768_000),
        val_loader=SimpleNamespace(tokens=5000),
        corpus=SimpleNamespace(skipped="1 files that are not UTF-8 (a.txt)", tokenizer=SimpleNamespace(vocab_size=22)),
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


def printed(run, width=200):
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        report.banner(console, run)
    return captured.get()


def test_the_demo_on_a_gpu_has_a_duration_in_minutes_and_says_what_is_compiled(rtx4070):
    text = printed(run_on())
    assert "\nrun      1,000 steps, 16.4M tokens: 50% of the data\ntime     projected 1 min, " in text
    assert "\ncompile  about 25 kernels in the first step: 10 s to 1 min" in text
    assert "\nmemory   1.64 GB predicted, of the GPU's 12.9 GB\n" in text
    assert "\nmfu      of 58.3 TFLOP/s, its dense bf16 peak, by PaLM's 6N + 12LCT\n" in text and "\nranks" not in text


def test_the_corpus_its_epochs_and_what_was_left_out_are_said(rtx4070):
    said = "data     stdlib (gpt2): 32.8M tokens, and 5k to validate; left out: 1 files that are not"
    assert said in printed(run_on())
    assert "81.9M tokens: 2.5 epochs\n" in printed(run_on(grad_accum=10))
    assert "205k tokens: 0.62% of the data\n" in printed(run_on(CPU, batch_size=64))


def test_the_letters_are_the_datas_whatever_vocabulary_the_model_has(rtx4070):
    assert "stdlib (chars, 22 letters): " in printed(run_on(tokenizer="chars"))


def test_a_run_of_days_has_a_duration_in_hours(rtx4070):
    run = run_on(preset="gpt2-124m")
    assert " h " in printed(run).split("time     projected ")[1].split(" tok/s")[0]


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


@pytest.mark.parametrize("device, preset", [(CPU, "demo"), (CUDA, "gpt2-124m"), (CUDA, "modern-124m")])
def test_the_first_screen_fits_80_columns_and_the_doctor_reads_it(rtx4070, device, preset):
    run = run_on(device, preset=preset)
    run.world = SimpleNamespace(size=2)
    screen = printed(run, width=80)
    assert max(map(len, screen.splitlines())) <= 80
    reader = LogReader("train.log")
    reader.take(screen)
    found = {note.kind: note.value for note in reader.facts().notes}
    assert (found["gpus"], found["tokens_per_step"]) == (2, run.config.tokens_per_step)
    assert {"parameters", "device", "precision"} <= set(found)


FULL = dict(step=600_000, interval_loss=3.28414, lr=6e-4, grad_norm=0.34512, ms=1234.5, mfu=None, memory_gb=9.871)
FULL |= dict(
    tokens_per_second=105_000.4, data_wait=0.012, eta_s=216_400, clock_mhz=2500, power_w=199.6, temperature_c=71
)


@pytest.mark.parametrize(
    "changed, verbose, line",
    [
        ({"mfu": 0.51234}, False, "time 1234ms, mfu 51.2%, 105,000 tok/s, lr 6.00e-04, norm 0.345, eta 60.1 h"),
        ({"ms": 87.654, "eta_s": 61}, False, "time 87.65ms, 105,000 tok/s, lr 6.00e-04, norm 0.345, eta 1 min"),
        (dict.fromkeys(("ms", "tokens_per_second", "eta_s")), False, "lr 6.00e-04, norm 0.345"),
        ({"data_wait": 0.07, "eta_s": 1e17}, False, "time 1234ms, 105,000 tok/s, lr 6.00e-04, norm 0.345, data 7%"),
        (
            {"throttle": "sw_power_cap", "skipped_steps": 2, "eta_s": 0.0},
            True,
            "time 1234ms, 105,000 tok/s, lr 6.00e-04, norm 0.345, eta 0 s, data 1.2%, mem 9.87 GB, 2500 MHz 200 W 71 C, "
            "held back by sw_power_cap, skipped 2",
        ),
    ],
)
def test_a_log_line_says_what_is_known_in_100_columns_and_all_of_it_where_asked(changed, verbose, line):
    said = report.log_line(FULL | changed, verbose)
    assert said == f"iter 600000: loss 3.2841, {line}"
    assert verbose or len(said) <= 100


def test_a_machine_without_psutil_leaves_its_memory_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert report._resident() is None
    assert "mem" not in report.log_line(FULL | {"memory_gb": None}, verbose=True)


def test_the_larger_demo_is_promised_to_the_demo_alone():
    assert "trains the larger demo" in printed(run_on(CPU))
    shown = printed(run_on(CPU, data="mine.txt"))
    assert "the same command compiles them. --kernels eager" in shown and "demo" not in shown.partition("No GPU")[2]


def test_the_commands_at_the_end_can_be_pasted_when_the_folder_has_a_blank_in_its_name():
    run = run_on(CPU)
    run.config = replace(run.config, train=replace(run.config.train, out=Path("my runs") / "a"))
    *_, last = report.ending(run, None, None)
    assert last.strip() == as_typed(f'python -m fastgpt.plot "{Path("my runs") / "a"}"')
