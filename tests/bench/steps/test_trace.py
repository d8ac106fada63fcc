"""Attribution of a step's time: on made-up traces (a GPU's too, with gaps and overlaps) and on real steps of this CPU."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from bench.steps.profile import record
from bench.steps.trace import (
    COPY,
    DATA,
    HOST,
    IS,
    KERNEL,
    LAUNCH,
    OPTIMIZER,
    STEP,
    UNTOLD_GEMM,
    Event,
    Namer,
    attribute,
    read_trace,
)
from bench.steps.turns import Runner, Setup, random_tokens
from bench.steps.variants import BACKENDS
from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.performance.operations import GAPS, LINEARS

SHAPE = Shape(n_layer=2, n_head=6, n_embd=192, block_size=128, vocab_size=1024)
ROWS = 512
ENGINE = "autograd::engine::evaluate_function: "


def host(name, start, end, dims=(), thread=1):
    return Event(name, start, end, HOST, thread, None, tuple(dims))


def launched(name, start, end, *, at, correlation, kind=KERNEL, thread=1, api="cudaLaunchKernel"):
    """A kernel and the call that launched it, at host time ``at``."""
    return [Event(api, at, at + 1, LAUNCH, thread, correlation), Event(name, start, end, kind, 7, correlation)]


def times(profile):
    return {op.name: round(1e3 * op.ms, 6) for op in profile.operations}


def named(*frames, shape=SHAPE, rows=ROWS):
    """The operation of a stack of frames; a frame is a name, or a name with shapes."""
    stack = [host(STEP, 0, 9), *(host(f, 0, 1) if isinstance(f, str) else host(f[0], 0, 1, f[1]) for f in frames)]
    return Namer(shape, rows)(stack)[0]


# ---------------------------------------------------------------- a CPU's trace


def test_self_times_of_the_host_add_up_to_the_wall_time():
    profile = attribute(
        [
            host(STEP, 0, 100),
            host("aten::gelu", 10, 40),
            host("aten::empty", 12, 15),  # inside: bookkeeping of the operation around it
            host(ENGINE + "NativeLayerNormBackward0", 50, 90),
            host("NativeLayerNormBackward0", 52, 85),
            host("aten::native_layer_norm_backward", 55, 80),
        ],
        SHAPE,
        ROWS,
    )
    assert times(profile) == {"GELU forward": 30, "norms backward": 33, GAPS: 10 + 10 + 10 + 7}
    assert (
        profile.wall_ms == 0.1
        and profile.accounted == pytest.approx(1)
        and profile.launches is profile.device_ms is None
    )
    assert {op.name: op.calls for op in profile.operations} == {"GELU forward": 1, "norms backward": 1, GAPS: 0}


def test_a_call_counts_once_however_many_frames_it_has():
    events = [host(STEP, 0, 100)]
    for start in (10, 40):
        events += [
            host("aten::linear", start, start + 20, [(4, 128, 192), (576, 192)]),
            host("aten::matmul", start + 2, start + 18, [(4, 128, 192), (192, 576)]),
            host("aten::mm", start + 4, start + 16, [(512, 192), (192, 576)]),
        ]
    (qkv,) = (op for op in attribute(events, SHAPE, ROWS).operations if op.name == "qkv forward")
    assert (qkv.calls, qkv.ms) == (2, 0.04) and list(qkv.kernels) == ["aten::mm", "aten::linear", "aten::matmul"]


def test_what_no_rule_knows_is_unaccounted_and_not_hidden_in_another_row():
    profile = attribute([host(STEP, 0, 100), host("aten::cholesky", 0, 10), host("aten::gelu", 10, 90)], SHAPE, ROWS)
    assert profile.unaccounted == {"aten::cholesky": 0.01} and profile.accounted == pytest.approx(0.9)


def test_the_other_threads_of_a_cpu_do_not_count():
    profile = attribute([host(STEP, 0, 10), host("aten::gelu", 0, 4), host("aten::gelu", 0, 9, thread=2)], SHAPE, ROWS)
    assert times(profile) == {"GELU forward": 4, GAPS: 6}


def test_of_several_steps_the_one_of_median_length_is_read():
    events = [host(STEP, 0, 100), host(STEP, 200, 210), host(STEP, 300, 330), host("aten::gelu", 301, 311)]
    profile = attribute(events, SHAPE, ROWS)
    assert (profile.wall_ms, profile.ms("GELU forward"), profile.ms("loss")) == (0.03, 0.01, 0)


def test_a_trace_without_a_step_is_refused():
    with pytest.raises(ValueError, match=f"no range named {STEP}"):
        attribute([host("aten::gelu", 0, 1)], SHAPE, ROWS)


# ---------------------------------------------------------------- a GPU's trace


def gpu_step():
    """A step of 100 us: two kernels that overlap, a gap, a kernel of the autograd thread, a gap while data is loaded."""
    return [
        host(STEP, 0, 100),
        host("aten::gelu", 1, 5),
        *launched("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernel>", 10, 40, at=2, correlation=1),
        host("aten::scaled_dot_product_attention", 6, 9),
        *launched("pytorch_flash::flash_fwd_kernel", 30, 50, at=7, correlation=2),
        host(ENGINE + "MmBackward0", 10, 20, thread=2),
        host("aten::mm", 11, 19, [(768, 512), (512, 192)], thread=2),
        *launched(
            "ampere_bf16_s16816gemm_bf16_128x128", 60, 75, at=12, correlation=3, thread=2, api="cuLaunchKernelEx"
        ),
        host(DATA, 78, 88),
        *launched("Memcpy HtoD (Pinned -> Device)", 88, 90, at=80, correlation=4, kind=COPY, api="cudaMemcpyAsync"),
    ]


def test_kernels_gaps_and_overlaps_of_a_gpu_add_up_to_the_wall_time():
    profile = attribute(gpu_step(), SHAPE, ROWS)
    assert times(profile) == {
        "GELU forward": 30,
        "attention forward": 10,  # 20 us, of which 10 beside the kernel before
        "mlp up dW": 15,
        "data": 10 + 2,  # the device waited for the loader, and the copy itself
        GAPS: 10 + 10 + 3 + 10,
    }
    assert profile.device_ms == pytest.approx((30 + 10 + 15 + 2) / 1e3)
    assert profile.accounted == pytest.approx(1) and profile.overlap_ms == 0.01 and profile.launches == 3


def test_a_kernel_within_another_counts_nothing_twice():
    events = [
        host(STEP, 0, 100),
        host("aten::gelu", 0, 5),
        *launched("gelu_kernel", 10, 90, at=1, correlation=1),
        *launched("gelu_kernel", 20, 30, at=2, correlation=2),
    ]
    profile = attribute(events, SHAPE, ROWS)
    assert times(profile) == {"GELU forward": 80, GAPS: 20} and profile.overlap_ms == 0.01


def test_a_kernel_whose_launch_is_not_in_the_trace_is_told_by_its_own_name():
    def alone(name, start, end):
        return Event(name, start, end, KERNEL, 7, 99)

    profile = attribute(
        [
            host(STEP, 0, 60),
            alone("pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel", 0, 10),
            alone("sm80_xmma_gemm_bf16bf16_bf16f32", 10, 20),
            alone("triton_per_fused_add_native_layer_norm_4", 20, 30),
            alone("triton_red_fused__log_softmax_nll_loss_forward_3", 30, 40),
            alone("void somebody::secret_kernel<float>", 40, 50),
        ],
        SHAPE,
        ROWS,
    )
    expected = {"attention forward": 10, UNTOLD_GEMM: 10, "norms forward": 10, "loss": 10, GAPS: 10}
    assert times(profile) == expected and profile.unaccounted == {"void somebody::secret_kernel<float>": 0.01}


def test_a_launch_on_a_thread_of_another_number_is_found_by_the_operations_id():
    events = [
        host(STEP, 0, 30),
        Event("aten::native_layer_norm", 1, 9, HOST, 1, external=42),
        Event("cudaLaunchKernel", 3, 4, LAUNCH, 140_000, 5),
        Event("vectorized_kernel", 10, 20, KERNEL, 7, 5, external=42),
    ]
    assert times(attribute(events, SHAPE, ROWS)) == {"norms forward": 10, GAPS: 20}


def test_a_kernel_is_never_a_gap_whatever_its_name():
    events = [host(STEP, 0, 20), *launched("CompiledFunctionBackward", 5, 15, at=1, correlation=1)]
    profile = attribute(events, SHAPE, ROWS)
    assert profile.unaccounted == {"CompiledFunctionBackward": 0.01} and times(profile) == {GAPS: 10}


def test_kernels_of_a_cuda_graph_have_the_phase_that_their_name_says():
    events = [
        host(STEP, 0, 40),
        *launched("triton_per_fused_native_layer_norm_0", 5, 10, at=1, correlation=1, api="cudaGraphLaunch"),
        Event("triton_per_fused_native_layer_norm_backward_1", 10, 20, KERNEL, 7, 1),
    ]
    assert times(attribute(events, SHAPE, ROWS)) == {"norms forward": 5, "norms backward": 10, GAPS: 25}


def test_a_range_says_what_frames_cannot():
    """fp8's MLP launches the same kernel twice, from the same frame."""
    events = [
        host(STEP, 0, 90),
        host("fastgpt::linear_fp8_mlp_fwd", 1, 30, [(2, 256, C), (2, 256, C), (2, ROWS), (4 * C, C), (C, 4 * C)]),
        host("GeneratedBackwardFor_fastgpt_linear_fp8_mlp_fwd_default", 2, 29),
        host(IS + "mlp up forward", 3, 9),
        *launched("fp8_linear_kernel", 20, 40, at=5, correlation=1),
        host(IS + "mlp down forward", 10, 20),
        host(IS + "mlp down forward", 11, 19),
        host("aten::amax", 12, 14),
        *launched("void at::native::reduce_kernel<512>", 40, 45, at=13, correlation=2),
        *launched("fp8_linear_kernel", 45, 80, at=15, correlation=3),
    ]
    profile = attribute(events, SHAPE, ROWS)
    assert times(profile) == {"mlp up forward": 20, "mlp down forward": 40, GAPS: 30}
    assert {op.name: op.calls for op in profile.operations if op.name != GAPS} == dict.fromkeys(
        ("mlp up forward", "mlp down forward"), 1
    )


def test_the_frame_that_autograd_puts_inside_an_operation_is_that_operation():
    """A kernel of ours with the GELU in its epilogue is the matmul; PyTorch's GELU behind cuBLAS is the GELU."""
    events = [
        host(STEP, 0, 60),
        host("fastgpt::linear_gelu_fwd", 1, 30, [(4, 128, C), (4 * C, C)]),
        host("GeneratedBackwardFor_fastgpt_linear_gelu_fwd_default", 2, 29),
        *launched("linear_kernel", 20, 40, at=5, correlation=1),
        host("aten::gelu", 10, 12),
        *launched("vectorized_elementwise_kernel", 40, 45, at=11, correlation=2),
    ]
    assert times(attribute(events, SHAPE, ROWS)) == {"mlp up forward": 20, "GELU forward": 5, GAPS: 35}


def test_the_optimizer_is_what_was_launched_in_its_range():
    events = [
        host(STEP, 0, 50),
        host(OPTIMIZER, 1, 20),
        host("aten::_foreach_norm", 2, 6),
        *launched("multi_tensor_apply_kernel<L2Norm>", 10, 20, at=3, correlation=1),
        host("Optimizer.step#AdamW.step", 7, 15),
        *launched("multi_tensor_apply_kernel<FusedAdam>", 20, 45, at=8, correlation=2),
    ]
    assert times(attribute(events, SHAPE, ROWS)) == {"optimizer": 35, GAPS: 15}


# ---------------------------------------------------------------- names

C, V = SHAPE.n_embd, SHAPE.vocab_size


@pytest.mark.parametrize(
    ("a", "b", "forward", "backward"),
    [
        ((ROWS, C), (C, 3 * C), "qkv forward", None),
        ((ROWS, 3 * C), (3 * C, C), None, "qkv dX"),
        ((3 * C, ROWS), (ROWS, C), None, "qkv dW"),
        ((ROWS, C), (C, C), "attention projection forward", "attention projection dX"),
        ((C, ROWS), (ROWS, C), None, "attention projection dW"),
        ((ROWS, C), (C, 4 * C), "mlp up forward", "mlp down dX"),
        ((ROWS, 4 * C), (4 * C, C), "mlp down forward", "mlp up dX"),
        ((4 * C, ROWS), (ROWS, C), None, "mlp up dW"),
        ((C, ROWS), (ROWS, 4 * C), None, "mlp down dW"),
        ((ROWS, C), (C, V), "head forward", None),
        ((ROWS, V), (V, C), None, "head dX"),
        ((V, ROWS), (ROWS, C), None, "head dW"),
    ],
)
def test_a_matmul_is_told_by_its_shape_and_by_the_pass_that_is_running(a, b, forward, backward):
    if forward:
        assert named(("aten::mm", [a, b])) == forward
        assert named(("aten::mm", [a, b, (a[0], b[1])])) == forward, "torch.compile names the output too"
        assert named("Torch-Compiled Region: 0/0", "CompiledFunction", ("aten::addmm", [(b[1],), a, b])) == forward
    if backward:
        assert named(ENGINE + "MmBackward0", "MmBackward0", ("aten::mm", [a, b])) == backward
        assert named(ENGINE + "CompiledFunctionBackward", "CompiledFunctionBackward", ("aten::mm", [a, b])) == backward


def test_the_loss_takes_the_head_in_chunks_within_forward():
    loss = "fastgpt::linear_cross_entropy_fwd_bwd"
    assert named(loss, ("aten::mm", [(96, C), (C, V)])) == "head forward"
    assert named(loss, ("aten::addmm", [(96, C), (96, V), (V, C)])) == "head dX"
    assert named(loss, ("aten::addmm", [(V, C), (V, 96), (96, C)])) == "head dW"
    assert named(loss) == "loss"


def test_inductors_own_gemms_are_told_by_their_arguments():
    assert named(("triton_tem_fused_mm_3", [(4, 128, C), (C, 3 * C), (ROWS, 3 * C)])) == "qkv forward"


def test_fused_linears_of_ours_are_told_by_their_weight():
    assert named(("fastgpt::linear_gelu_fwd", [(4, 128, C), (4 * C, C)])) == "mlp up forward"
    backward = ENGINE + "GeneratedBackwardFor_fastgpt_linear"
    assert named(backward, ("fastgpt::linear_bwd", [(ROWS, C), (C, 4 * C)])) == "mlp down dX + dW"


def test_a_matmul_that_could_be_several_is_not_guessed():
    square = Shape(n_layer=1, n_head=2, n_embd=64, block_size=32, vocab_size=256)  # V = 4C, and rows = C
    assert named(("aten::mm", [(64, 64), (64, 256)]), shape=square, rows=64) == "mlp up forward"
    assert named(ENGINE + "MmBackward0", ("aten::mm", [(64, 64), (64, 64)]), shape=square, rows=64) == UNTOLD_GEMM
    assert named(("aten::mm", [(3, 5), (5, 7)])) == UNTOLD_GEMM


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (["aten::_scaled_dot_product_flash_attention"], "attention forward"),
        (["fastgpt::qkv_attention_fwd", "aten::empty"], "attention forward"),
        (
            [ENGINE + "GeneratedBackwardFor_fastgpt_qkv_attention_fwd", "fastgpt::qkv_attention_bwd"],
            "attention backward",
        ),
        (["fastgpt::layer_norm_fwd", "aten::copy_"], "norms forward"),
        (["CompiledFunction", "graph_0_cpp_fused_add_native_layer_norm_native_layer_norm_backward_4"], "norms forward"),
        ([ENGINE + "CompiledFunctionBackward", "triton_red_fused_native_layer_norm_backward_3"], "norms backward"),
        (["triton_poi_fused_gelu_2"], "GELU forward"),
        ([ENGINE + "GeluBackward0", "GeluBackward0", "aten::gelu_backward"], "GELU backward"),
        (["aten::embedding", "aten::index_select"], "embedding"),
        ([ENGINE + "EmbeddingBackward0", "aten::embedding_dense_backward"], "embedding"),
        (["fastgpt::embedding_fwd", "aten::empty"], "embedding"),
        (
            [ENGINE + "GeneratedBackwardFor_fastgpt_embedding_fwd", "fastgpt::embedding_bwd_add", "aten::sort"],
            "embedding",
        ),
        (["aten::_log_softmax"], "loss"),
        (["triton_red_fused__log_softmax_native_layer_norm_nll_loss_forward_6"], "loss"),
        ([("aten::_to_copy", [(ROWS, V)])], "loss"),
        ([("aten::add", [(4, 128, C), (4, 128, C)])], "pointwise"),
        # What the engine itself runs is the sum of two branches' gradients, not the node that it is about to call.
        ([ENGINE + "NativeLayerNormBackward0", "aten::add_"], "pointwise"),
        (["torch::autograd::AccumulateGrad", "aten::add_"], "gradient accumulation"),
        ([OPTIMIZER, "Optimizer.step#FusedAdamW.step", "fastgpt::adamw_"], "optimizer"),
        ([OPTIMIZER, "aten::linalg_vector_norm"], "optimizer"),
        ([OPTIMIZER], GAPS),
        ([DATA], "data"),
        (["aten::view"], GAPS),
        (["## Call CompiledFxGraph f3gelu6layernormattentionloss ##"], GAPS),
        ([], GAPS),
        (["aten::cholesky"], None),
    ],
)
def test_operations_are_named_by_the_frames_around_them(frames, expected):
    assert named(*frames) == expected


# ---------------------------------------------------------------- reading traces


def raw(category, name, ts, dur, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def test_a_chrome_trace_is_read_with_shapes_and_correlations(tmp_path):
    events = [
        raw("user_annotation", STEP, 0, 20),
        raw("cpu_op", "aten::mm", 1, 5, **{"Input Dims": [[512, 192], [192, 576], [], [[1], [2]]]}),
        raw("cuda_runtime", "cudaLaunchKernel", 2, 1, correlation=5),
        raw("kernel", "gemm", 8, 4, correlation=5),
        raw("python_function", "train.py(3): step", 0, 20),
        {"ph": "M", "name": "process_name"},
    ]
    text = json.dumps({"traceEvents": events})
    (tmp_path / "trace.json").write_text(text)
    (tmp_path / "trace.json.gz").write_bytes(gzip.compress(text.encode()))
    found = read_trace(tmp_path / "trace.json")
    assert found == read_trace(tmp_path / "trace.json.gz") and len(found) == 4
    assert found[1].dims == ((512, 192), (192, 576), ()) and found[3].correlation == 5
    assert times(attribute(found, SHAPE, ROWS)) == {"qkv forward": 4, GAPS: 16}


@pytest.mark.parametrize("content", [b"", b"{", b'{"events": []}', b"[1, 2]", b'{"traceEvents": [3]}', b"\xff\xfe"])
def test_a_file_that_is_no_trace_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"trace .* is not a Chrome trace of torch.profiler: record it anew"):
        read_trace(path)


def test_a_trace_that_is_not_there_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_trace(tmp_path / "trace.json")


# ---------------------------------------------------------------- real steps


def real_profile(backend, config, batch_size, grad_accum, precision, tmp_path):
    setup = Setup("test", config, batch_size, grad_accum, precision)
    with random_tokens(setup) as tokens:
        runner = Runner(BACKENDS[backend], setup, torch.device("cpu"), tokens)
        runner()
        record(runner, tmp_path / "trace.json", repeats=1)
    events = read_trace(tmp_path / "trace.json")
    return attribute(events, setup.shape, batch_size * config.block_size), [event.name for event in events]


@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="the CPU's self times are what is tested")
@pytest.mark.parametrize(
    ("backend", "config", "batch_size", "grad_accum", "precision"),
    [
        ("eager", ModelConfig(n_layer=2, n_head=2, n_embd=96, block_size=64, vocab_size=320, bias=True), 4, 2, "fp32"),
        ("triton", ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=160), 2, 1, "fp32"),
        ("triton", ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=160), 2, 1, "fp16-fast"),
        ("triton", ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=24, vocab_size=80), 2, 2, "fp8"),
    ],
    ids=["eager", "triton", "fp16-fast", "fp8"],
)
def test_every_operation_of_a_real_step_is_found_and_97_percent_accounted(
    backend, config, batch_size, grad_accum, precision, tmp_path
):
    profile, events = real_profile(backend, config, batch_size, grad_accum, precision, tmp_path)
    assert profile.accounted >= 0.97, profile.unaccounted
    assert sum(op.ms for op in profile.operations) <= profile.wall_ms * (1 + 1e-9)
    calls = {op.name: op.calls for op in profile.operations}
    blocks = config.n_layer * grad_accum
    for linear in LINEARS:
        times_a_step = grad_accum if linear == "head" else blocks
        assert [calls.get(f"{linear} {way}") for way in ("forward", "dX", "dW")] == [times_a_step] * 3, (linear, calls)
    assert calls["attention forward"] == calls["attention backward"] == blocks
    assert calls["norms forward"] == calls["norms backward"] == 2 * blocks + grad_accum
    apart = [calls.get("GELU forward"), calls.get("GELU backward")]
    assert apart == ([blocks] * 2 if precision == "fp32" else [None] * 2), (
        "with products of ours it is in their epilogues"
    )
    assert calls["optimizer"] == 1 and calls["data"] == grad_accum
    assert {"loss", "embedding", "pointwise", "gradient accumulation", GAPS} <= set(calls)
    assert UNTOLD_GEMM not in calls
    # As in training: the loss scale is kept, and weights are quantised once per optimizer step, whatever is accumulated.
    assert ("aten::_amp_update_scale_" in events) == (precision == "fp16-fast")
    assert events.count("fastgpt::fp8_quantise_weight") == (4 * config.n_layer if precision == "fp8" else 0)
