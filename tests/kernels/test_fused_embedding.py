"""The embedding against its fp64 reference. Small tiles and pieces, unless a test says otherwise, so that a few tokens have
several tiles, runs within a piece, runs across pieces, and ragged edges."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import parity
from fastgpt.config import ModelConfig
from fastgpt.kernels import fused_embedding as module
from fastgpt.kernels import reference, runtime
from fastgpt.kernels.fused_embedding import embedding
from fastgpt.kernels.working_copy import gradients_in_place
from fastgpt.model import GPT
from fastgpt.ops import EAGER, TRITON

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
stock_config = module.config


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(module, "config", lambda C: module.EmbeddingLaunch(rows=8, block=16, piece=4, pieces=4))


def make(device, shape=(3, 7), V=37, C=20, P=16, wte=FP32, wpe=FP32) -> dict[str, Tensor]:
    return {
        "idx": torch.randint(V, shape, device=device),
        "wte": torch.randn(V, C, device=device).to(wte),
        "wpe": torch.randn(P, C, device=device).to(wpe),
    }


def check(inputs, **options):
    parity.check(partial(embedding, **options), partial(reference.embedding, **options), inputs)


def gradients(inputs, upstream=None, **options):
    """x, dwte and dwpe of fresh leaves, by name."""
    return parity.run(partial(embedding, **options), inputs, upstream)


def grads_of(op, inputs, dx) -> tuple[Tensor, Tensor]:
    """dwte, dwpe for the upstream gradient ``dx``."""
    tables = [inputs[name].detach().requires_grad_() for name in ("wte", "wpe")]
    return torch.autograd.grad(op(inputs["idx"], *tables), tables, dx)


# ---------------------------------------------------------------- parity


@pytest.mark.adversarial
@pytest.mark.parametrize("wte, wpe", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)], ids=str)
def test_parity_for_dtypes(device, wte, wpe):
    check(make(device, wte=wte, wpe=wpe))


def test_a_16_bit_stream_from_fp32_tables(device):
    # No fp64 stream here: the sum in fp32, rounded once, and gradients in the tables' dtype.
    inputs = make(device, (4, 16))
    results, (dx,) = gradients(inputs, out_dtype=BF16)
    assert torch.equal(results["out0"], reference.embedding(**inputs).to(BF16))
    for got, expected in zip(("dwte", "dwpe"), grads_of(reference.embedding, inputs, dx.float())):
        assert results[got].dtype == FP32
        torch.testing.assert_close(results[got], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (9,), (1, 1), (5, 1), (1, 16), (2, 3, 5)], ids=str)
def test_any_rank(device, shape):
    check(make(device, shape))


@pytest.mark.parametrize("V, C", [(1, 1), (2, 3), (50, 16), (63, 17), (65, 100)])
def test_odd_sizes(device, V, C):
    check(make(device, (3, 16), V=V, C=C))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)], ids=str)
def test_no_tokens_have_gradients_of_zero(device, shape):
    results, _ = gradients(make(device, shape))
    assert results["out0"].shape == (*shape, 20)
    assert not results["dwte"].any() and not results["dwpe"].any()


def test_parity_with_the_shipped_geometry(device, monkeypatch):
    monkeypatch.setattr(module, "config", stock_config)
    check(make(device, (5, 70), V=33, C=130, P=70))


# ---------------------------------------------------------------- runs of equal ids


@pytest.mark.parametrize(
    "lengths",
    {
        "one token for all, 16 pieces": [64],
        "one token for all, ragged": [61],
        "all distinct": [1] * 37,
        "runs that are pieces": [4, 4, 4],
        "across one edge": [3, 2, 3, 4, 1],
        "across several, from the middle": [1, 11, 1],
        "two at one edge": [5, 9, 4, 2, 8, 1, 3],
        "up to an edge": [4, 5, 3],
        "ids left out": [0, 2, 0, 6, 0, 0, 8],
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_runs(device, lengths, pieces, monkeypatch):
    monkeypatch.setattr(module, "config", lambda C: module.EmbeddingLaunch(rows=8, block=32, piece=4, pieces=pieces))
    ids = torch.tensor([id for id, length in enumerate(lengths[1]) for _ in range(length)])
    check({**make(device, P=64), "idx": ids[torch.randperm(len(ids))].to(device)})


def test_more_partial_sums_than_are_added_at_a_time(device):
    check({**make(device, P=300), "idx": torch.full((300,), 5, device=device)})


def test_a_token_is_summed_in_fp32_and_in_a_fixed_order(device):
    # bug 11: 16-bit sums lose what is small beside them; 256 + 1 + 1 ... in bf16 stays 256
    inputs = make(device, P=257)
    dx = torch.ones(257, 20, device=device, dtype=BF16)
    dx[0] = 256
    tables = [inputs[name].requires_grad_() for name in ("wte", "wpe")]
    x = embedding(torch.zeros(257, dtype=torch.int64, device=device), *tables, out_dtype=BF16)
    dwte, _ = torch.autograd.grad(x, tables, dx)
    assert (dwte[0] == 512).all() and not dwte[1:].any()


def test_repeats_are_bit_equal(device):
    inputs = make(device, (8, 16), V=5)
    first, upstream = gradients(inputs)
    second, _ = gradients(inputs, upstream)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_that_pad_the_vocabulary_get_zeros(device):
    inputs = make(device, (3, 16), V=64)
    inputs["idx"] %= 50
    results, _ = gradients(inputs)
    assert not results["dwte"][50:].any()


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("position", [0, 1, 5])
def test_a_start_position(device, position):
    check(make(device, (3, 7)), position=position)


def test_decoding_one_by_one_is_encoding_at_once(device):
    inputs = make(device, (2, 9))
    tables = inputs["wte"], inputs["wpe"]
    whole = embedding(inputs["idx"], *tables)
    with torch.no_grad():
        steps = [embedding(inputs["idx"][:, t : t + 1], *tables, position=t) for t in range(9)]
    assert torch.equal(torch.cat(steps, 1), whole)


def test_a_later_token_changes_no_earlier_row(device):
    inputs = make(device, (2, 9))
    before = embedding(**inputs)
    inputs["idx"][:, 5:] = 0
    assert torch.equal(embedding(**inputs)[:, :5], before[:, :5])


@pytest.mark.parametrize("dtype, out_dtype", [(FP32, FP32), (FP32, BF16), (BF16, BF16)], ids=str)
def test_without_positions_it_is_a_lookup(device, dtype, out_dtype):
    inputs = make(device, (4, 7), wte=dtype)
    del inputs["wpe"]

    def lookup(idx, wte):
        return reference.embedding(idx, wte, out_dtype=None if wte.dtype == torch.float64 else out_dtype)

    parity.check(partial(embedding, out_dtype=out_dtype), lookup, inputs)


# ---------------------------------------------------------------- strides


def test_any_strides_of_the_ids(device):
    inputs, wide = make(device, C=5), torch.randint(37, (9, 40), device=device)
    for idx in (wide[:, 1:8], wide[::2, 3::5], wide[:3, :7].t(), wide[:, 4:5].expand(9, 6), wide[0, 3::4]):
        check({**inputs, "idx": idx})
        check({**inputs, "idx": idx.int()})


@pytest.mark.parametrize("layout", ["rows apart", "every other column", "transposed", "expanded", "unaligned"])
def test_any_strides_of_the_tables(device, layout):
    def strided(rows: int) -> Tensor:
        wide = torch.randn(rows, 50, device=device)
        return {
            "rows apart": wide[:, 3:23],
            "every other column": wide[:, :40:2],
            "transposed": torch.randn(20, rows, device=device).t(),
            "expanded": wide[:1, :20].expand(rows, 20),
            "unaligned": torch.randn(rows * 20 + 1, device=device)[1:].view(rows, 20),
        }[layout]

    check({**make(device), "wte": strided(37), "wpe": strided(16)})


def test_any_strides_of_the_upstream_gradient(device):
    # bug 5: dx from .sum() has stride 0
    wide = torch.randn(3, 7, 50, device=device)
    for dx in (torch.ones(1, device=device).expand(3, 7, 20), wide[..., 5:25], wide[..., :40:2], wide[:1, :, :20]):
        check_upstream = dx.expand(3, 7, 20)
        parity.check(embedding, reference.embedding, make(device), upstream=(check_upstream,))


@pytest.mark.xdist_group("large")
def test_offsets_past_2_to_the_31(device, needs_memory):
    # bug 1: a table whose last row lies past int32; memory that is never touched otherwise
    rows, stride = 3, 2**30 + 8
    needs_memory(4 * stride)
    buffer = torch.empty((rows - 1) * stride + 16, dtype=FP16, device=device)
    table = buffer.as_strided((rows, 16), (stride, 1))
    table.copy_(torch.randn(rows, 16))
    idx, wpe = torch.tensor([2, 0, 1], device=device), torch.zeros(3, 16, dtype=FP16, device=device)
    assert torch.equal(embedding(idx, table, wpe), table[idx])
    assert torch.equal(embedding(idx, table.clone(), table), table[idx] + table)
    dx = torch.randn(3, 16, device=device, dtype=FP16)
    grad = table.zero_()  # one buffer of 4 GB is enough
    module._launch_grads(grad, None, dx, idx.int(), None, 0.0, 0, add=False)
    assert torch.equal(grad, dx[[1, 2, 0]])


def test_nothing_is_written_outside_and_scratch_starts_as_nan(device, monkeypatch):
    # bugs 2 and 17: guard bands of 77 around each gradient; every torch.empty filled with NaN
    stock = torch.empty

    def poisoned(*size, **options):
        return stock(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    C, V, P = 19, 11, 9
    buffers = [torch.full((rows + 2, C), 77.0, device=device) for rows in (V, P)]
    wte_grad, wpe_grad = (buffer[1:-1] for buffer in buffers)
    idx, dx = torch.randint(V - 1, (4, 8), device=device, dtype=torch.int32), torch.randn(4, 8, C, device=device)
    idx[0] = 3  # a run across pieces
    module._launch_grads(wte_grad, wpe_grad, dx, idx.view(-1), None, 0.0, 1, add=True)
    assert all((buffer[0] == 77).all() and (buffer[-1] == 77).all() for buffer in buffers)
    assert (wte_grad[V - 1] == 77).all() and (wpe_grad[0] == 77).all(), "rows that do not occur are left alone"
    expected = torch.zeros(V, C, device=device).index_add_(0, idx.view(-1), dx.view(-1, C))
    torch.testing.assert_close(wte_grad - 77, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wpe_grad[1:] - 77, dx.sum(0), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- ids that do not exist


@pytest.mark.parametrize("wrong", [-1, 37, 2**40])
def test_an_id_outside_the_table_is_refused_on_a_cpu(device, wrong):
    if device.type != "cpu":
        pytest.skip("a GPU is not asked")
    inputs = make(device)
    inputs["idx"][1, 2] = wrong
    with pytest.raises(ValueError, match=f"idx holds {wrong}: wte has the rows 0 to 36"):
        embedding(**inputs)


def test_where_nobody_looks_an_id_outside_is_nan_and_reads_and_adds_nothing(device, monkeypatch):
    monkeypatch.setattr(module, "_check_ids", lambda idx, V: None)
    inputs = make(device)
    dx = torch.randn(3, 7, 20, device=device)
    expected = dx.clone()
    expected[:, 2] = 0
    dwte, _ = grads_of(reference.embedding, inputs, expected)
    inputs["idx"][:, 2] = torch.tensor([-1, 37, 2**40 + 1], device=device)
    x = embedding(**inputs)
    assert x[:, 2].isnan().all() and x[:, :2].isfinite().all() and x[:, 3:].isfinite().all()
    torch.testing.assert_close(grads_of(embedding, inputs, dx)[0], dwte, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- dropout


def keep_mask(shape, p, device, C=40) -> Tensor:
    wte, wpe = torch.ones(1, C, device=device), torch.zeros(shape[-1], C, device=device)
    return embedding(torch.zeros(shape, dtype=torch.int64, device=device), wte, wpe, dropout_p=p) != 0


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keep_rate(device, p, monkeypatch):
    monkeypatch.setattr(module, "config", stock_config)
    keep = keep_mask((8, 64), p, device, C=128).double()
    for rate, count in ((keep.mean(), keep.numel()), (keep.mean((0, 1)), 512), (keep.mean((0, 2)), 1024)):
        assert ((rate - (1 - p)).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()
    assert abs((keep[1:] * keep[:-1]).mean() - (1 - p) ** 2) < 0.02  # sequences are independent


def test_every_call_drops_others_and_a_seed_repeats_them(device):
    # bug 19: a constant seed
    torch.manual_seed(3)
    first, second = keep_mask((2, 8), 0.5, device), keep_mask((2, 8), 0.5, device)
    torch.manual_seed(3)
    assert not torch.equal(first, second) and torch.equal(keep_mask((2, 8), 0.5, device), first)


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=str)
def test_parity_under_the_same_mask(device, out_dtype):
    p, inputs = 0.3, make(device, (4, 16), V=6)
    torch.manual_seed(5)
    keep = keep_mask((4, 16), p, device, C=20)

    def op(**tensors):
        torch.manual_seed(5)
        return embedding(**tensors, dropout_p=p, out_dtype=out_dtype)

    def masked(idx, wte, wpe):
        x = reference.embedding(idx, wte, wpe) * keep.to(wte.dtype) / (1 - p)
        return x.to(out_dtype) if wte.dtype == FP32 else x

    parity.check(op, masked, inputs)


def test_dropping_everything(device):
    results, _ = gradients(make(device), dropout_p=1.0)
    assert not any(value.any() for value in results.values())


def test_checkpointing_repeats_the_mask(device):
    inputs = make(device)
    tables = [inputs[name].requires_grad_() for name in ("wte", "wpe")]
    x = checkpoint(lambda idx: embedding(idx, *tables, dropout_p=0.5), inputs["idx"], use_reentrant=False)
    torch.rand(7, device=device)  # the generator has moved on when backward recomputes
    x.sum().backward()
    torch.testing.assert_close(tables[1].grad[:7], 2.0 * (x != 0).sum(0))


# ---------------------------------------------------------------- gradients in place


def tied(device, ops, dropout=0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(1, 2, 16, 12, 40, dropout=dropout), ops).to(device)


def accumulated(model, device, micro_batches=2, in_place=False) -> dict[str, Tensor]:
    """Gradients by name after some micro-batches of different tokens, with different seeds."""
    generator = torch.Generator().manual_seed(1)
    for seed in range(micro_batches):
        idx = torch.randint(model.config.vocab_size, (2, 12), generator=generator).to(device)
        torch.manual_seed(seed)
        if in_place:
            with gradients_in_place():
                loss = model(idx, idx.roll(1, 1))[1]
        else:
            loss = model(idx, idx.roll(1, 1))[1]
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def adds(monkeypatch) -> list[tuple[bool, bool]]:
    """Which of (wte, wpe) each call of the in-place op from now on adds to."""
    calls, stock = [], module._bwd_add

    def counted(wte_grad, wpe_grad, *rest):
        calls.append((wte_grad is not None, wpe_grad is not None))
        stock(wte_grad, wpe_grad, *rest)

    monkeypatch.setattr(module, "_bwd_add", counted)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_tied_table_gets_the_same_gradient_in_place(device, dropout, monkeypatch):
    ordinary, calls = accumulated(tied(device, TRITON, dropout), device), adds(monkeypatch)
    in_place = accumulated(tied(device, TRITON, dropout), device, in_place=True)
    assert calls == [(True, True)], "the first micro-batch has no .grad to add to"
    for name, grad in ordinary.items():
        torch.testing.assert_close(in_place[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_model_with_fused_embedding_has_plain_pytorchs_gradients(device):
    plain = accumulated(tied(device, EAGER), device)
    for name, grad in accumulated(tied(device, TRITON), device, in_place=True).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_lookup_adds_in_place_to_the_rows_that_occur(device, monkeypatch):
    inputs, calls = make(device, (2, 7)), adds(monkeypatch)
    table = nn.Parameter(inputs["wte"])
    for micro_batch in range(2):
        with gradients_in_place():
            x = embedding(inputs["idx"], table, out_dtype=BF16)
        (x * (micro_batch + 1)).sum().backward()
    assert calls == [(True, False)]
    rows = torch.bincount(inputs["idx"].flatten(), minlength=37).to(table.grad)
    torch.testing.assert_close(table.grad, 3 * rows[:, None].expand(-1, 20))


@pytest.mark.parametrize("first", [True, False])
def test_whichever_use_of_the_table_comes_first_in_backward(device, first):
    """The table is looked up twice, read as a whole, and multiplied: before and after the embedding's own backward."""
    inputs = make(device, (2, 16), V=9)
    other = inputs["idx"].flip(1)
    results = []
    for in_place in (False, True):
        wte, wpe = nn.Parameter(inputs["wte"].clone()), nn.Parameter(inputs["wpe"].clone())
        wte.grad, wpe.grad = torch.ones_like(wte), torch.ones_like(wpe)
        with gradients_in_place() if in_place else torch.enable_grad():
            x = embedding(inputs["idx"], wte, wpe)
            looked_up = wte[other] if first else embedding(other, wte, wpe)
        h = torch.tanh(x) @ wte.t() + (looked_up if first else torch.tanh(looked_up)).sum()
        (h.square().mean() + wte.sum()).backward()
        results.append((wte.grad, wpe.grad))
    for ordinary, in_place in zip(*results):
        torch.testing.assert_close(in_place, ordinary, rtol=1e-5, atol=1e-5)


def test_in_place_repeats_are_bit_equal(device):
    first, second = (accumulated(tied(device, TRITON), device, in_place=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def in_place_step(inputs, prepare=lambda wte, wpe: None, op=embedding) -> tuple[nn.Parameter, nn.Parameter]:
    """A backward pass of a sum within gradients_in_place, onto gradients of ones."""
    wte, wpe = nn.Parameter(inputs["wte"].clone()), nn.Parameter(inputs["wpe"].clone())
    wte.grad, wpe.grad = torch.ones_like(wte), torch.ones_like(wpe)
    prepare(wte, wpe)
    with gradients_in_place():
        x = op(inputs["idx"], wte, wpe)
    x.sum().backward()
    return wte, wpe


def hooked(wte, wpe):
    wte.register_hook(lambda grad: grad * 2)


def watched(wte, wpe):
    wpe.register_post_accumulate_grad_hook(lambda parameter: None)


def no_grads(wte, wpe):
    wte.grad = wpe.grad = None


def transposed_grads(wte, wpe):
    wte.grad, wpe.grad = (torch.ones(p.shape[::-1], device=p.device).t() for p in (wte, wpe))


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("prepare", [hooked, watched, no_grads, transposed_grads], ids=lambda f: f.__name__)
def test_where_it_cannot_add_it_returns_a_dense_gradient(device, prepare, monkeypatch):
    calls, inputs = adds(monkeypatch), make(device)
    wte, _ = in_place_step(inputs, prepare)
    once = torch.bincount(inputs["idx"].view(-1), minlength=37)[:, None].float()
    before, times = (0 if prepare is no_grads else 1), (2 if prepare is hooked else 1)
    assert calls == [] and torch.equal(wte.grad, (before + times * once).expand(37, 20))


def test_each_table_is_judged_by_itself(device, monkeypatch):
    calls, inputs = adds(monkeypatch), make(device)

    def only_wpe(wte, wpe):
        wte.grad = None

    wte, wpe = in_place_step(inputs, only_wpe)
    assert calls == [(False, True)]
    assert torch.equal(wte.grad[:, 0], torch.bincount(inputs["idx"].view(-1), minlength=37).float())
    assert (wpe.grad[:7] == 4).all() and (wpe.grad[7:] == 1).all()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_a_backward_pass_that_builds_a_graph_adds_nothing_in_place(device, monkeypatch):
    calls, inputs = adds(monkeypatch), make(device)
    wte, wpe = (nn.Parameter(inputs[name], requires_grad=name == "wte") for name in ("wte", "wpe"))
    wte.grad = torch.ones_like(wte)
    with gradients_in_place():
        embedding(inputs["idx"], wte, wpe).square().sum().backward(create_graph=True)
    expected = torch.zeros_like(wte).index_add(0, inputs["idx"].view(-1), 2 * embedding(**inputs).view(-1, 20))
    assert calls == []
    torch.testing.assert_close(wte.grad - 1, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_table_may_be_written_between_forward_and_backward(device):
    inputs = make(device)
    wte = nn.Parameter(inputs["wte"])
    x = embedding(inputs["idx"], wte, inputs["wpe"])
    with torch.no_grad():
        wte.zero_()
    x.sum().backward()
    assert wte.grad.sum() == 3 * 7 * 20


def test_functional_call_gets_its_gradient_from_autograd(device):
    model, idx = tied(device, TRITON), torch.randint(40, (2, 12), device=device)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for p in weights.values():
        p.grad = torch.zeros_like(p)
    with gradients_in_place():
        loss = torch.func.functional_call(model, weights, (idx, idx))[1]
    found = torch.autograd.grad(loss, [weights[f"transformer.{name}.weight"] for name in ("wte", "wpe")])
    assert all(grad.any() for grad in found)
    assert not any(p.grad.any() for p in weights.values())


@pytest.mark.parametrize("frozen", ["wte", "wpe"])
def test_a_frozen_table_gets_no_gradient(device, frozen):
    inputs = make(device)
    for in_place in (False, True):
        tables = {name: nn.Parameter(inputs[name], requires_grad=name != frozen) for name in ("wte", "wpe")}
        other = next(p for name, p in tables.items() if name != frozen)
        other.grad = torch.zeros_like(other)
        with gradients_in_place() if in_place else torch.enable_grad():
            embedding(inputs["idx"], **tables).sum().backward()
        assert tables[frozen].grad is None and other.grad.sum() == 3 * 7 * 20


# ---------------------------------------------------------------- registration


def test_opcheck(device):
    inputs = make(device, (2, 5), C=12)
    idx, wte, wpe = inputs["idx"], inputs["wte"].requires_grad_(), inputs["wpe"].requires_grad_()
    seed = runtime.draw_seed(device)
    torch.library.opcheck(torch.ops.fastgpt.embedding_fwd, (idx, wte, wpe, seed, 0.25, 3, FP32, False))
    rest = (torch.randn(2, 5, 12, device=device), idx.view(-1).int(), seed, 0.25, 3)
    torch.library.opcheck(torch.ops.fastgpt.embedding_bwd, (*rest, 37, 16, FP32, None))
    sums = torch.zeros(37, 12, device=device), torch.zeros(16, 12, device=device)
    torch.library.opcheck(torch.ops.fastgpt.embedding_bwd_add, (*sums, *rest))


@pytest.mark.parametrize("position", [0, 3])
def test_compiled_equals_eager(device, position):
    inputs = make(device)
    eager, upstream = gradients(inputs, position=position)
    compiled = torch.compile(partial(embedding, position=position), fullgraph=True, backend="aot_eager")
    with gradients_in_place():  # without effect there
        results, _ = parity.run(compiled, inputs, upstream)
    assert all(torch.equal(results[name], eager[name]) for name in eager)


def test_compiled_dropout_drops_the_same_in_backward_and_others_in_the_next_call(device):
    torch._dynamo.reset()
    op, inputs = torch.compile(embedding, fullgraph=True, backend="aot_eager"), make(device)
    wpe = inputs["wpe"].requires_grad_()
    first, second = (op(inputs["idx"], inputs["wte"], wpe, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first == 0, second == 0)
    (grad,) = torch.autograd.grad(second.sum(), wpe)
    torch.testing.assert_close(grad[:7], 2.0 * (second != 0).sum(0))


def test_batch_sizes_and_positions_share_one_compilation(device):
    # bug 27: a compilation for every batch size, or for every token that is sampled
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    op = torch.compile(embedding, fullgraph=True, backend=counter)
    inputs = make(device, (9, 8))
    for rows in (3, 4, 9):
        for position in (2, 3, 5):
            arguments = inputs["idx"][:rows], inputs["wte"], inputs["wpe"]
            assert torch.equal(op(*arguments, position=position), embedding(*arguments, position=position))
    assert counter.frame_count <= 3  # the first sizes, then any batch, then any position


def test_autocast_changes_nothing(device):
    inputs = make(device)
    plain, upstream = gradients(inputs)
    with torch.autocast(device.type, BF16):
        cast, _ = gradients(inputs, upstream)
    assert all(cast[name].dtype == FP32 and torch.equal(cast[name], plain[name]) for name in plain)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wte": torch.zeros(4)}, r"wte is \(4,\) and wpe \(16, 20\): they have to be \(V, C\) and \(P, C\)"),
        ({"wpe": torch.zeros(16, 21)}, r"wte is \(37, 20\) and wpe \(16, 21\)"),
        ({"idx": torch.zeros(2, 3)}, "idx is torch.float32: use int64 or int32"),
        ({"idx": torch.tensor(3)}, r"idx is \(\): it has to be \(..., T\)"),
        ({"idx": torch.zeros(1, 17, dtype=torch.int64)}, "position is 0 for sequences of 17 tokens: wpe has 16 positions"),
        ({"position": 10}, "position is 10 for sequences of 7 tokens"),
        ({"position": -1}, "position is -1 for"),
        ({"dropout_p": -0.1}, r"dropout_p is -0.1: it must lie in \[0, 1\]"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32: use float32, float16 or bfloat16"),
        ({"wte": torch.zeros(37, 20, dtype=torch.float64)}, "wte is torch.float64: use float32"),
        ({"wpe": torch.zeros(16, 20, device="meta")}, "wpe is on meta: move it to"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(device, change, message):
    change = {
        name: value.to(device) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        embedding(**make(device) | change)


def test_where_triton_does_not_run_the_reference_computes(device, monkeypatch):
    monkeypatch.setattr(runtime, "runs_in_triton", lambda x: False)
    inputs = make(device)
    inputs |= {name: inputs[name].double() for name in ("wte", "wpe")}
    assert torch.equal(embedding(**inputs, position=2), reference.embedding(**inputs, position=2))
