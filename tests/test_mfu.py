"""StepMeter on a fake machine: a host clock, and a device that works off its queue while the host goes on."""

from __future__ import annotations

import time

import pytest
import torch

from fastgpt.anatomy import GPT2_40M, GPT2_124M
from fastgpt.hardware import cards
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
    """A training loop as ours is; its first step compiles. Returns the machine and the reports it logged."""
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
    return machine, reports


def test_the_clock_stops_after_the_device():
    # bug 18: launching takes 1 ms of the host's time, the step 100 ms of the device's
    _, (report,) = train(steps=10, log_every=10)
    assert report.ms_per_step == pytest.approx(1e3 * DEVICE, rel=0.03)
    assert report.tokens_per_second == pytest.approx(TOKENS / DEVICE, rel=0.03)


@pytest.mark.parametrize("evaluate_every", [0, 5])
def test_the_mean_does_not_depend_on_the_logging_interval(evaluate_every):
    totals = []
    for log_every in (1, 3, 12):
        _, reports = train(steps=12, log_every=log_every, evaluate_every=evaluate_every)
        assert sum(report.steps for report in reports) == 12
        for report in reports:
            assert report.ms_per_step == pytest.approx(1e3 * DEVICE, rel=0.04)
        totals.append(sum(report.seconds for report in reports))
    assert max(totals) - min(totals) < 0.04 * min(totals)


def test_waits_for_the_device_only_to_report():
    machine, _ = train(steps=100, log_every=50)
    assert machine.synchronized == 1 + 2  # the end of the warm-up, two reports
    assert machine.now == pytest.approx(COMPILE + 100 * DEVICE, rel=0.03)  # the queue never ran dry


def test_evaluation_and_checkpoints_are_left_out():
    # nanoGPT's printed MFU sags after each evaluation; ours must not move
    _, (quiet,) = train(steps=12, log_every=12)
    _, (noisy,) = train(steps=12, log_every=12, evaluate_every=2)
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
        _, (report,) = train(steps=5, log_every=5, warmup=warmup)
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
    with pytest.raises(RuntimeError, match=r"inside excluded\(\)"), meter.excluded(), meter.step(TOKENS):
        pass


# Figures


def one_step(seconds, tokens, **options):
    machine = Machine()
    meter = machine.meter(warmup_steps=0, **options)
    with meter.step(tokens):
        machine.launch(seconds)
    return meter.report()


@pytest.mark.parametrize(("shape", "seconds", "nominal"), [(GPT2_40M, 3.911, 0.69), (GPT2_124M, 9.350, 0.82)])
def test_two_logged_rtx_4070_runs(shape, seconds, nominal):
    peak = cards.lookup("rtx4070").peak_flops("bf16")
    report = one_step(seconds, 524_288, flops_per_token=flops.palm(shape), peak_flops=peak)
    assert report.mfu == pytest.approx(nominal, abs=0.006)


def test_a_meter_for_a_shape_has_its_flops_and_the_cards_peak(monkeypatch):
    monkeypatch.setattr(cards, "present", lambda device: cards.lookup("rtx4070"))
    meter = StepMeter.for_shape(GPT2_124M, "cpu", "fp16-fast")
    assert (meter.flops_per_token, meter.peak_flops) == (
        flops.palm(GPT2_124M),
        cards.lookup("rtx4070").peak_flops("fp16_fp16acc"),
    )


def test_a_card_without_a_known_peak_has_no_mfu():
    report = one_step(0.1, 1000)
    assert report.mfu is None and report.tokens_per_second == pytest.approx(1e4)


def test_nothing_measured_yet():
    report = Machine().meter().report()
    assert (report.steps, report.ms_per_step, report.tokens_per_second, report.data_wait) == (0, None, None, None)


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
