"""Rotary positions, QK-norm and value embeddings against their fp64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import parity
from fastgpt.kernels import qk_norm_rope, reference, tuning

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def tables(positions, D, device, base=10_000.0):
    angles = torch.outer(torch.arange(positions), base ** (-torch.arange(0, D, 2) / D)).to(device)
    return angles.cos(), angles.sin()


def inputs(device, *, B=2, T=7, H=2, KV=2, D=16, dtype=FP32, ve=None, gate=None):
    """Keyword arguments of qk_norm_rope that have gradients; each dtype says what the tensor is, None leaves it out."""
    made = {"qkv": torch.randn(B, T, (H + 2 * KV) * D, device=device).to(dtype)}
    if ve is not None:
        made |= {
            "ve": torch.randn(B, T, KV * D, device=device).to(ve),
            "gate": torch.rand(B, T, KV, device=device).to(gate or ve),
        }
    return made


def check(device, made, H=2, KV=2, *, positions=32, upstream=None, **options):
    D = made["qkv"].shape[-1] // (H + 2 * KV)
    cos, sin = tables(positions, D, device)
    given = {"n_head": H, "n_kv_head": KV, "cos": cos, "sin": sin, **options}
    parity.check(partial(qk_norm_rope, **given), partial(reference.qk_norm_rope, **given), made, upstream=upstream)


def run(device, made, H=2, KV=2, *, positions=32, **options):
    D = made["qkv"].shape[-1] // (H + 2 * KV)
    given = {"n_head": H, "n_kv_head": KV, **dict(zip(("cos", "sin"), tables(positions, D, device))), **options}
    return parity.run(partial(qk_norm_rope, **given), made, None)[0]


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.adversarial
@pytest.mark.parametrize(
    "options", [{}, {"norm": False}, {"interleaved": True}, {"scale": 1.2}, {"scale": -0.5}], ids=str
)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_parity(device, dtype, options):
    check(device, inputs(device, dtype=dtype, ve=dtype), **options)
    check(device, inputs(device, dtype=dtype), **options)


@pytest.mark.parametrize("D", [2, 6, 64, 80, 96, 250, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_head_sizes(device, D, interleaved):
    check(device, inputs(device, T=3, D=D, ve=FP32), interleaved=interleaved)


@pytest.mark.parametrize("H, KV", [(1, 1), (6, 2), (5, 1)])
def test_grouped_queries(device, H, KV):
    check(device, inputs(device, H=H, KV=KV, dtype=BF16, ve=BF16), H, KV, scale=1.2)


@pytest.mark.parametrize(
    "dtypes", [{"dtype": BF16, "ve": FP32, "gate": FP32}, {"dtype": FP32, "ve": BF16, "gate": FP16}], ids=str
)
def test_each_gradient_has_the_dtype_of_its_input(device, dtypes):
    check(device, inputs(device, **dtypes))


def test_strides(device):
    """A slice of wider rows, an expanded embedding, a gate whose columns lie apart, an expanded upstream gradient."""
    made = inputs(device, ve=FP32)
    wide = torch.randn(2, 7, 200, device=device)
    made |= {"qkv": wide[:, :, 10 : 10 + 6 * 16], "ve": made["ve"][:1].expand(2, 7, 32)}
    made["gate"] = torch.rand(2, 2, 7, device=device).mT
    check(device, made, upstream=(torch.randn(1, device=device).expand(2, 7, 96),))
    check(device, made | {"qkv": wide.mT[:, : 6 * 16].mT[:, ::2].repeat_interleave(2, 1)[:, :7]})


def test_many_rows_in_several_programs(device):
    small = {"elements": 1024, "num_warps": 4}
    with tuning.forced({f"qk_norm_rope.{kernel}": small for kernel in ("forward", "backward")}):
        check(device, inputs(device, T=17, D=24, ve=FP32))  # 32 rows a program, which no token's 6 divide


@pytest.mark.parametrize("size", [(0, 7), (2, 0)])
def test_nothing(device, size):
    made = inputs(device, B=size[0], T=size[1], ve=FP32)
    assert all(found.shape[:2] == size for found in run(device, made).values())


# --- positions ------------------------------------------------------------------------------------------------------


def test_positions_go_on_where_a_cache_ends(device):
    """Pieces of a sequence, each from its own position, are the sequence; and each sequence may be at another place."""
    made = inputs(device, T=12)
    whole = run(device, made)["out0"]
    for first, last in ((0, 5), (5, 6), (6, 12)):
        piece = {"qkv": made["qkv"][:, first:last]}
        assert torch.equal(run(device, piece, position=first)["out0"], whole[:, first:last])
    start = torch.tensor([3, 20], dtype=torch.int32, device=device)
    found = run(device, made, position=start)["out0"]
    for b, position in enumerate((3, 20)):
        assert torch.equal(found[b : b + 1], run(device, {"qkv": made["qkv"][b : b + 1]}, position=position)["out0"])
    check(device, made, position=start)


def test_scores_depend_on_the_distance_alone(device):
    made = inputs(device, B=1, T=2, H=1, KV=1, D=32)

    def score(position):
        q, k, _ = run(device, made, 1, 1, position=position)["out0"].double().split(32, -1)
        return (q[0, 1] * k[0, 0]).sum()

    torch.testing.assert_close(score(0), score(25), rtol=1e-5, atol=1e-5)


def test_a_position_without_a_row_is_nan_and_reads_nothing_else(device):
    made = inputs(device, B=3, T=4)
    position = torch.tensor([30, -2, 2**32], device=device)  # of 32
    found = run(device, made, position=position)
    lost = torch.tensor([[False, False, True, True], [True, True, False, False], [True] * 4], device=device)
    for result in (found["out0"], found["dqkv"]):
        assert torch.equal(result[..., : 4 * 16].isnan().all(-1), lost)
        assert not result[..., 4 * 16 :].isnan().any(), "values have no position"


# --- what else has to hold ------------------------------------------------------------------------------------------


def test_a_scale_of_zero_has_a_gradient_of_zero(device):
    found = run(device, inputs(device), scale=0.0)
    assert found["out0"][..., : 4 * 16].eq(0).all() and found["dqkv"][..., : 4 * 16].eq(0).all()


def test_values_pass_through_untouched(device):
    made = inputs(device, dtype=BF16)
    assert torch.equal(run(device, made)["out0"][..., 4 * 16 :], made["qkv"][..., 4 * 16 :])


def test_saves_what_attention_keeps_anyway(device):
    """The output, not qkv: no second packed tensor lives until backward."""
    cos, sin = tables(32, 16, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = qk_norm_rope(inputs(device)["qkv"].requires_grad_(), 2, 2, cos, sin)
    packed = [x for x in saved if x.shape == y.shape]
    assert [x.data_ptr() for x in packed] == [y.data_ptr()]
    assert sum(x.numel() for x in saved) == y.numel() + 2 * 7 * 4 + cos.numel() + sin.numel()


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"ve": True}, {"position": True}], ids=str)
def test_is_an_operator_that_torch_can_trust(device, options):
    made = {name: x.requires_grad_() for name, x in inputs(device, ve=FP32).items()}
    cos, sin = tables(32, 16, device)
    start = torch.tensor([3, 20], dtype=torch.int32, device=device) if options.get("position") else None
    values = (made["ve"], made["gate"]) if options.get("ve") else (None, None)
    given = made["qkv"], cos, sin, start, *values, 2, 2, options.get("norm", True), 1.2, 1, False, 1e-6
    torch.library.opcheck(torch.ops.fastgpt.qk_norm_rope_fwd, given)


def test_autocast_changes_nothing(device):
    made = inputs(device, ve=FP32)
    with torch.autocast(device.type, BF16):
        found = run(device, made)
    assert found["out0"].dtype == FP32 and torch.equal(found["out0"], run(device, made)["out0"])


@pytest.mark.parametrize("function", [qk_norm_rope, reference.qk_norm_rope])
def test_an_odd_head_size_is_refused_in_one_sentence(device, function):
    with pytest.raises(ValueError, match=r"the head size is 15: .* use an even one"):
        function(torch.randn(1, 3, 6 * 15, device=device), 2, 2, *tables(8, 14, device))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n_kv_head": 3}, "n_head a multiple of n_kv_head"),
        ({"n_kv_head": 0}, "n_head a multiple of n_kv_head"),
        ({"qkv": torch.randn(2, 7, 97)}, r"qkv is \(2, 7, 97\)"),
        ({"cos": torch.randn(32, 7)}, r"cos is \(32, 7\): a head size of 16 needs \(positions, 8\)"),
        ({"sin": torch.randn(31, 8)}, r"sin is \(31, 8\)"),
        ({"position": 26}, "position is 26: for 7 tokens use 0 to 25, as cos has 32 rows"),
        ({"position": -1}, "position is -1"),
        ({"position": torch.zeros(3, dtype=torch.int32)}, r"position is torch.int32 \(3,\)"),
        ({"ve": torch.randn(2, 7, 32)}, "ve is given without gate"),
        ({"ve": torch.randn(2, 7, 16), "gate": torch.randn(2, 7, 2)}, r"ve is \(2, 7, 16\)"),
        ({"qkv": torch.ones(2, 7, 96, dtype=torch.int64)}, "qkv is torch.int64"),
    ],
    ids=lambda given: given if isinstance(given, str) else None,
)
def test_what_does_not_fit_is_refused(device, changed, message):
    cos, sin = tables(32, 16, device)
    given = {"qkv": inputs(device)["qkv"], "n_head": 2, "n_kv_head": 2, "cos": cos, "sin": sin}
    changed = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in changed.items()}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**given | changed)
