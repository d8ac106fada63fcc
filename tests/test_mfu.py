"""StepMeter on a fake machine: a host clock, and a device that works off its queue while the host goes on."""

from __future__ import annotations

import time

import pytest
import torch

from fastgpt.anatomy import GPT2_40M, GPT2_124M
from fastgpt.hardware import cards
from fastgpt.hardware import ceilings as ceilings_module
from fastgpt.mfu import StepMeter
from fastgpt.performance import flops

TOKENS = 1000
HOST, DEVICE, DATA, EVALUATION, COMPILE = 0.001, 0.100, 0.002, 7.0, 60.0  # seconds; the device is the slower side


class Machine:
    """``launch`` queues device work and returns; ``synchronize`` waits until the queue is empty."""

    def __init__(self):
        self.now = self.device_free = 0.0
        self.synchronized = 0

    def clock(self):
        return self.now

    def host(self, seconds):
        self.now += seconds

    def launch(self, seconds):
        self.device_free = max(self.device_free, self.now) + seconds
        self.host(HOST)

    def synchronize(self):
        self.now = max(self.now, self.device_free)
        self.synchronized += 1

    def meter(self, flops_per_token=1e9, peak_flops=None, **options):
        return StepMeter("cpu", flops_per_token, peak_flops, synchronize=self.synchronize, clock=self.clock, **options)


def train(steps, log_every, *, evaluate_every=0, warmup=1):
    """A training loop as ours is; its first step compiles. Returns machine, meter and the reports it logged."""
    machine = Machine()
    meter = machine.meter(warmup_steps=warmup)
    reports = []
    for step in range(steps + warmup):
        with meter.data_wait():
            machine.host(DATA)
        with meter.step(TOKENS):
            machine.launch(DEVICE)
            machine.host(COMPILE if step == 0 else 0)
        if evaluate_every and step % evaluate_every == 0:
            with meter.excluded():
                machine.launch(EVALUATION)
                machine.host(EVALUATION / 2)
        if (step + 1 - warmup) % log_every == 0 and step >= warmup:
            reports.append(meter.report())
    return machine, meter, reports


def test_the_clock_stops_after_the_device():
    # bug 18: launching takes 1 ms of the host's time, the step 100 ms of the device's
    _, meter, (report,) = train(steps=10, log_every=10)
    assert report.ms_per_step == pytest.approx(1e3 * DEVICE, rel=0.03)
    assert report.tokens_per_second == pytest.approx(TOKENS / DEVICE, rel=0.03)
    assert meter.total() == report


@pytest.mark.parametrize("evaluate_every", [0, 5])
def test_the_mean_does_not_depend_on_the_logging_interval(evaluate_every):
    totals = []
    for log_every in (1, 3, 12):
        _, meter, reports = train(steps=12, log_every=log_every, evaluate_every=evaluate_every)
        assert sum(report.steps for report in reports) == meter.total().steps == 12
        assert sum(report.seconds for report in reports) == pytest.approx(meter.total().seconds)
        for report in reports:
            assert report.ms_per_step == pytest.approx(1e3 * DEVICE, rel=0.04)
        totals.append(meter.total().ms_per_step)
    assert max(totals) - min(totals) < 0.04 * min(totals)


def test_waits_for_the_device_only_to_report():
    machine, _, _ = train(steps=100, log_every=50)
    assert machine.synchronized == 1 + 2  # the end of the warm-up, two reports
    assert machine.now == pytest.approx(COMPILE + 100 * DEVICE, rel=0.03)  # the queue never ran dry


def test_evaluation_and_checkpoints_are_left_out():
    # nanoGPT's printed MFU sags after each evaluation; ours must not move
    quiet = train(steps=12, log_every=12)[1].total()
    noisy = train(steps=12, log_every=12, evaluate_every=2)[1].total()
    assert noisy.ms_per_step == pytest.approx(quiet.ms_per_step, rel=0.03)


def test_work_queued_before_an_exclusion_counts_and_work_queued_in_it_does_not():
    machine = Machine()
    meter = machine.meter(warmup_steps=0)
    with meter.step(TOKENS):
        machine.launch(DEVICE)
    with meter.excluded():
        machine.launch(EVALUATION)  # still running when the block ends
    report = meter.report()
    assert report.seconds == pytest.approx(DEVICE)


def test_compilation_and_warmup_are_left_out():
    for warmup in (1, 3):
        report = train(steps=5, log_every=5, warmup=warmup)[1].total()
        assert report.steps == 5
        assert report.ms_per_step == pytest.approx(1e3 * DEVICE, rel=0.03)


def test_without_warmup_the_first_step_counts():
    machine = Machine()
    meter = machine.meter(warmup_steps=0)
    machine.host(99)  # building the model
    with meter.step(TOKENS):
        machine.launch(DEVICE)
    assert meter.report().seconds == pytest.approx(DEVICE)


def test_a_recompilation_inside_a_step_can_be_left_out():
    machine = Machine()
    meter = machine.meter(warmup_steps=0)
    with meter.step(TOKENS):
        with meter.excluded(), meter.excluded():  # nested is fine
            machine.host(COMPILE)
        machine.launch(DEVICE)
    assert meter.report().seconds == pytest.approx(DEVICE)


def test_a_step_that_raises_is_not_counted_but_its_time_is():
    machine = Machine()
    meter = machine.meter(warmup_steps=0)
    with pytest.raises(MemoryError), meter.step(TOKENS):
        machine.launch(DEVICE)
        raise MemoryError
    with meter.step(TOKENS):
        machine.launch(DEVICE)
    report = meter.report()
    assert (report.steps, report.tokens) == (1, TOKENS)
    assert report.seconds == pytest.approx(2 * DEVICE)


def test_an_exclusion_that_raises_starts_the_clock_again():
    machine = Machine()
    meter = machine.meter(warmup_steps=0)
    with meter.step(TOKENS):
        machine.launch(DEVICE)
    with pytest.raises(OSError), meter.excluded():
        machine.host(5)
        raise OSError("disk full")
    with meter.step(TOKENS):
        machine.launch(DEVICE)
    assert meter.report().seconds == pytest.approx(2 * DEVICE)


def test_data_wait_is_a_share_of_the_time():
    machine = Machine()
    meter = machine.meter(warmup_steps=0)
    with meter.step(TOKENS):
        machine.launch(DEVICE)
    machine.synchronize()
    for _ in range(3):
        with meter.data_wait():
            machine.host(DEVICE)  # a loader as slow as the device, and the device has nothing to do
            with meter.excluded():
                machine.host(5)  # not waiting for data
        with meter.step(TOKENS):
            machine.launch(DEVICE)
        machine.synchronize()
    assert meter.report().data_wait == pytest.approx(3 / 7)


def test_mistakes_of_the_loop_are_said():
    meter = Machine().meter(warmup_steps=0)
    with pytest.raises(RuntimeError, match="already being measured"), meter.step(TOKENS), meter.step(TOKENS):
        pass
    with pytest.raises(RuntimeError, match=r"report\(\) inside a step"), meter.step(TOKENS):
        meter.report()
    with pytest.raises(RuntimeError, match=r"total\(\) inside a step"), meter.step(TOKENS):
        meter.total()
    with pytest.raises(RuntimeError, match=r"inside excluded\(\)"), meter.excluded(), meter.step(TOKENS):
        pass
    with pytest.raises(ValueError, match="flops_per_token is 0"):
        StepMeter("cpu", 0)
    with pytest.raises(ValueError, match="peak_flops is -1"):
        StepMeter("cpu", 1, -1)
    with pytest.raises(ValueError, match="formula is 'pam'"):
        StepMeter("cpu", 1, formula="pam")
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        StepMeter("cpu", 1, warmup_steps=-1)


# Figures and words


def one_step(seconds, tokens, **options):
    machine = Machine()
    meter = machine.meter(warmup_steps=0, **options)
    with meter.step(tokens):
        machine.launch(seconds)
    return meter.report()


@pytest.mark.parametrize(
    ("shape", "seconds", "nanogpt", "nominal"), [(GPT2_40M, 3.911, 0.129, 0.69), (GPT2_124M, 9.350, 0.154, 0.82)]
)
def test_two_logged_rtx_4070_runs(shape, seconds, nanogpt, nominal):
    peak = cards.lookup("rtx4070").peak_flops("bf16")
    report = one_step(seconds, 524_288, flops_per_token=flops.palm(shape), peak_flops=peak, peak_name="RTX 4070 bf16")
    assert report.mfu_nanogpt == pytest.approx(nanogpt, abs=0.0006)
    assert report.mfu_nominal == pytest.approx(nominal, abs=0.006)
    assert f"MFU {100 * report.mfu_nominal:.1f}% of 58.29 TFLOP/s (RTX 4070 bf16)" in report.format()


def test_an_unknown_card_reads_na():
    report = one_step(0.1, 1000)
    assert report.mfu_nominal is None and report.mfu_measured is None
    assert report.mfu_nanogpt == pytest.approx(1e9 * 1e4 / 312e12)
    text = report.format()
    assert f"MFU n/a of nominal dense peak of {ceilings_module.device_name('cpu')}: n/a" in text
    assert "n/a of matmul ceiling measured here: n/a" in text


def test_every_share_names_its_formula_and_its_denominator():
    exact = flops.exact(GPT2_124M)
    options = dict(peak_flops=100e12, measured_flops=80e12, peak_name="card X, bf16")
    report = one_step(1.0, 50_000, flops_per_token=exact, formula="exact", **options)
    assert report.formula == "exact: 6(12LC^2 + VC) + 6LC(T + 1)"
    assert report.mfu_nominal == pytest.approx(50_000 * exact / 100e12)
    assert report.mfu_measured == pytest.approx(50_000 * exact / 80e12)
    assert report.mfu_nanogpt is None  # nanoGPT's figure is by palm, which was not given
    assert report.format() == (
        "1000.0 ms/step | 50,000 tok/s | MFU 39.9% of 100 TFLOP/s (card X, bf16), "
        "49.9% of 80 TFLOP/s (matmul ceiling measured here), n/a in nanoGPT's unit (an A100's 312 TFLOP/s) | "
        "exact: 6(12LC^2 + VC) + 6LC(T + 1) | data wait 0.0%"
    )
    palm = flops.palm(GPT2_124M)
    report = one_step(1.0, 50_000, flops_per_token=exact, formula="exact", palm_flops_per_token=palm)
    assert report.mfu_nanogpt == pytest.approx(50_000 * palm / 312e12)


def test_nothing_measured_yet():
    report = Machine().meter().report()
    assert (report.steps, report.ms_per_step, report.tokens_per_second, report.data_wait) == (0, None, None, None)
    assert report.format().startswith("no step measured yet")


def test_for_shape_fills_in_names_and_numbers(monkeypatch):
    monkeypatch.setattr(cards, "present", lambda device: cards.lookup("rtx4070"))
    monkeypatch.setattr("fastgpt.mfu.device_name", lambda device: "NVIDIA GeForce RTX 4070")
    ceilings = ceilings_module.Ceilings("", "", "", 0, 450.0, {"fp16_fp16acc": 105.0})
    meter = StepMeter.for_shape(GPT2_124M, "cpu", "fp16-fast", formula="exact", ceilings=ceilings)
    assert meter.flops_per_token == flops.exact(GPT2_124M)
    assert meter.palm_flops_per_token == flops.palm(GPT2_124M)
    assert meter.denominator == "116.6 TFLOP/s (nominal dense fp16_fp16acc peak of NVIDIA GeForce RTX 4070)"
    assert meter.measured_flops == 105e12


def test_on_the_real_device(device):
    """A matmul cannot take less time than the fastest of it that was measured with a wait after each."""
    x = torch.randn(1024, 1024, device=device)
    meter = StepMeter(device, 2 * 1024 * 1024)
    for _ in range(4):
        with meter.step(1024):
            x @ x
    report = meter.report()
    best = min(_timed(lambda: x @ x, device) for _ in range(10))
    assert report.steps == 3
    assert report.seconds / 3 > 0.5 * best


def _timed(work, device):
    meter = StepMeter(device, 1, warmup_steps=0)
    start = time.perf_counter()
    work()
    meter._synchronize()
    return time.perf_counter() - start
