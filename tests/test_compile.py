"""A GPT on the Triton kernels inside PyTorch's own machinery: torch.compile, torch.export, activation checkpointing,
functional_call, autocast, deterministic mode. The kernels are opaque operators there; what is computed must not change."""

from __future__ import annotations

import io
import shutil
import sysconfig
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fastgpt import kernels, ops
from fastgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from fastgpt.model import GPT
from fastgpt.optim.adamw import FusedAdamW

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=64)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def gpt(device, table="triton", **changes):
    torch.manual_seed(7)
    return GPT(replace(TINY, **changes), ops.get(table)).to(device)


def batch(device, T=16, B=2):
    idx = torch.randint(0, TINY.vocab_size, (B, T), device=device)
    return idx, idx.roll(-1, 1)


def loss_and_gradients(model, run, idx, targets):
    """Of one step through ``run``, which calls ``model``: the loss and every parameter's gradient, by name."""
    model.zero_grad()
    loss = run(idx, targets)[1]
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_same(got, expected, **bounds):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **bounds)


# ---- torch.compile


def compiled(model, **options):
    """The model under torch.compile, where a graph break is an error, and the counter of its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


def test_one_graph_holds_the_whole_step(device):
    found = torch._dynamo.explain(gpt(device))(*batch(device))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    called = " ".join(str(node.target) for graph in found.graphs for node in graph.graph.nodes)
    for operator in ("layer_norm_fwd", "qkv_attention", "linear_cross_entropy"):
        assert operator in called


def test_another_sequence_length_recompiles_once_and_never_again(device):
    model = gpt(device, dropout=0.1)
    run, counter = compiled(model)
    graphs = []
    for T in (16, 24, 33, 10):  # the second length makes T symbolic
        idx, targets = batch(device, T)
        results = []
        for call in (run, model):
            torch.manual_seed(T)
            with torch.autocast(device.type, torch.bfloat16):
                results.append(loss_and_gradients(model, call, idx, targets))
        assert_same(*results, rtol=1e-5, atol=1e-6)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]


def test_a_length_marked_dynamic_compiles_once(device):
    run, counter = compiled(gpt(device))
    for T, B in ((16, 2), (40, 3), (5, 7)):
        idx, targets = batch(device, T, B)
        for tensor in (idx, targets):
            torch._dynamo.mark_dynamic(tensor, (0, 1))
        run(idx, targets)[1].backward()
    assert counter.frame_count == 1


def test_evaluations_in_between_compile_once(device):
    model = gpt(device, dropout=0.1)
    run, counter = compiled(model)
    idx, targets = batch(device)
    for _ in range(2):
        loss_and_gradients(model.train(), run, idx, targets)
        with torch.no_grad():
            losses = [call(idx, targets)[1] for call in (run, model.eval())]
        torch.testing.assert_close(*losses)
    assert counter.frame_count == 2  # one with dropout and gradients, one without either


def test_documents_are_traced_too(device):
    model = gpt(device)
    run, _ = compiled(model)
    idx, targets = batch(device)
    doc_ids = (torch.arange(16, device=device) >= 7).int().expand(2, 16).contiguous()
    torch.testing.assert_close(run(idx, targets, doc_ids)[1], model(idx, targets, doc_ids)[1])
    assert not torch.equal(run(idx, targets, doc_ids)[1], run(idx, targets)[1])


def test_dropout_is_drawn_anew_at_every_call_of_a_compiled_model(device):
    model = gpt(device, dropout=0.5)
    run, _ = compiled(model)
    idx, targets = batch(device)
    torch.manual_seed(3)
    first, second = run(idx, targets)[1], run(idx, targets)[1]
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(model(idx, targets)[1], first)  # the very masks that eager draws


def test_what_a_compiled_model_learns_the_plain_one_knows(device):
    """FusedAdamW writes working copies behind a compiled graph's back; neither side may see stale weights."""
    model = gpt(device)
    run, counter = compiled(model)
    optimizer = FusedAdamW(model.parameters(), lr=1e-2)
    idx, targets = batch(device)
    with torch.autocast(device.type, torch.bfloat16):
        model(idx, targets)  # makes the working copies
        for _ in range(2):
            loss_and_gradients(model, run, idx, targets)
            optimizer.step()
        fresh = gpt(device)
        fresh.load_state_dict(model.state_dict())
        losses = [call(idx, targets)[1] for call in (run, model, fresh)]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(losses[1], losses[2])
    assert counter.frame_count == 1


@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which(sysconfig.get_config_var("CXX") or "g++")),
    reason="Inductor needs a C++ compiler on a CPU, and this machine has none",
)
def test_inductor_computes_the_same(device):
    model = gpt(device)
    idx, targets = batch(device)
    expected = loss_and_gradients(model, model, idx, targets)
    assert_same(
        loss_and_gradients(model, torch.compile(model, fullgraph=True), idx, targets), expected, rtol=1e-4, atol=1e-6
    )


def test_train_with_kernels_triton_and_compile(device, tmp_path, monkeypatch):
    """What ``train.py --kernels triton --compile`` does, with a backend that needs no C++ compiler."""
    from fastgpt.training.loop import train

    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    losses = {}
    for compiles in (False, True):
        counter = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(GPT, "compile", lambda self, c=counter: torch.nn.Module.compile(self, backend=c))
        config = Config(
            model=replace(TINY, block_size=16, vocab_size=256),
            data=DataConfig(data=str(text), tokenizer="bytes", batch_size=2),
            train=TrainConfig(
                kernels="triton", compile=compiles, max_iters=2, eval_iters=1, eval_interval=0, checkpoint_interval=0,
                precision="fp32", doctor=False, tensorboard=False, out=tmp_path / str(compiles),
            ),
        )  # fmt: skip
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        run, code = train(config, device)
        assert (code, run.step, bool(counter.frame_count)) == (0, 2, compiles)
        losses[compiles] = run.best_val_loss
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


# ---- torch.export


def test_the_exported_forward_runs_at_other_shapes(device):
    model = gpt(device).eval()
    B, T = torch.export.Dim("B", min=1, max=64), torch.export.Dim("T", min=2, max=TINY.block_size)
    program = torch.export.export(model, batch(device)[:1], dynamic_shapes=({0: B, 1: T},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows, length in ((2, 16), (1, 2), (3, 33), (1, 64)):
        idx = batch(device, length, rows)[0]
        torch.testing.assert_close(loaded(idx)[0], model(idx)[0])


def test_the_exported_loss_equals_the_models(device):
    model = gpt(device)
    T = torch.export.Dim("T", min=2, max=TINY.block_size)
    program = torch.export.export(model, batch(device), dynamic_shapes=({1: T}, {1: T})).module()
    for length in (16, 41):
        idx, targets = batch(device, length)
        torch.testing.assert_close(program(idx, targets)[1], model(idx, targets)[1])


# ---- activation checkpointing


@pytest.mark.parametrize("table", ["eager", "triton"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_recomputed_blocks_give_the_same_gradients(device, table, use_reentrant, precision):
    model = gpt(device, table, n_layer=2, dropout=0.3)
    idx, targets = batch(device)
    results = []
    for recompute in (False, True):
        for block in model.transformer.h:
            forward = type(block).forward.__get__(block)
            block.forward = (  # the first block's branch is None, its x is what needs a gradient
                (lambda *args, f=forward: checkpoint(f, *args, use_reentrant=use_reentrant)) if recompute else forward
            )
        torch.manual_seed(5)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            results.append(loss_and_gradients(model, model, idx, targets))
    assert_same(*results, rtol=0, atol=0)


# ---- torch.func.functional_call


def test_functional_call_differentiates_the_tensors_that_it_is_given(device):
    model = gpt(device)
    idx, targets = batch(device)
    given = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    loss = functional_call(model, given, (idx, targets))[1]
    gradients = torch.autograd.grad(loss, list(given.values()))
    assert all(p.grad is None for p in model.parameters())

    twice = gpt(device)
    twice.load_state_dict({name: tensor.detach() for name, tensor in given.items()})
    expected = loss_and_gradients(twice, twice, idx, targets)
    assert_same({"loss": loss.detach(), **dict(zip(given, gradients))}, expected, rtol=0, atol=0)


def test_functional_call_and_the_model_do_not_share_working_copies(device):
    model = gpt(device)
    idx, targets = batch(device)
    given = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with torch.autocast(device.type, torch.bfloat16):
        own = model(idx, targets)[1]
        for scale in (1.0, 2.0):  # written in place between two calls
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    given[name].copy_(scale * parameter)
            loss = functional_call(model, given, (idx, targets))[1]
            assert torch.equal(model(idx, targets)[1], own)
            assert torch.equal(loss, own) == (scale == 1.0)


# ---- autocast: docs/precision.md, "Under torch.autocast"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestAutocast:
    def test_attention_takes_its_dtype_as_sdpa_does(self, device, dtype):
        q = torch.randn(2, 16, 2, 16, device=device, requires_grad=True)
        qkv = torch.randn(2, 16, 96, device=device, requires_grad=True)
        with torch.autocast(device.type, dtype):
            sdpa = F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
            outputs = kernels.attention(q, q, q), kernels.qkv_attention(qkv, 2)
        assert all(out.dtype == sdpa.dtype == dtype for out in outputs)
        sum(out.float().sum() for out in outputs).backward()
        assert q.grad.dtype == qkv.grad.dtype == torch.float32

    def test_a_norm_keeps_fp32_statistics_and_the_residual_streams_dtype(self, device, dtype):
        """Values whose mean and variance 16 bits cannot hold."""
        x = torch.randn(4, 64, device=device) * 0.1 + 100
        residual = torch.randn(4, 64, device=device)
        weight, bias = torch.ones(64, device=device), torch.zeros(64, device=device)
        expected = F.layer_norm(x + residual, (64,), weight, bias)
        with torch.autocast(device.type, dtype):
            plain, _ = kernels.layer_norm(x, weight, bias, residual=residual)
            y, total = ops.get("triton").layer_norm(x, weight, bias, residual=residual)
        assert (plain.dtype, y.dtype, total.dtype) == (torch.float32, dtype, torch.float32)
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, expected.to(dtype))
        assert torch.equal(total, x + residual)

    def test_the_loss_is_fp32_with_matmuls_in_autocasts_dtype(self, device, dtype):
        x = torch.randn(8, 32, device=device, requires_grad=True)
        weight = torch.randn(64, 32, device=device, requires_grad=True)
        target = torch.arange(8, device=device)
        with torch.autocast(device.type, dtype):
            loss = kernels.linear_cross_entropy(x, weight, target)
        loss.backward()
        assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
        rounded = kernels.linear_cross_entropy(x.to(dtype), weight, target)
        assert torch.equal(loss, rounded)
        assert not torch.equal(loss, kernels.linear_cross_entropy(x, weight, target))

    def test_backward_under_autocast_changes_nothing(self, device, dtype):
        model = gpt(device)
        idx, targets = batch(device)
        results = []
        for inside in (False, True):
            model.zero_grad()
            with torch.autocast(device.type, dtype):
                loss = model(idx, targets)[1]
            with torch.autocast(device.type, dtype, enabled=inside):
                loss.backward()
            results.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert_same(*results, rtol=0, atol=0)

    def test_a_region_without_it_computes_in_fp32(self, device, dtype):
        model = gpt(device).eval()
        idx, _ = batch(device)
        with torch.autocast(device.type, dtype):
            low = model(idx)[0]
            with torch.autocast(device.type, enabled=False):
                full = model(idx)[0]
        assert (low.dtype, full.dtype) == (dtype, torch.float32)
        assert torch.equal(full, model(idx)[0])

    def test_both_tables_give_the_same_dtypes(self, device, dtype):
        idx, targets = batch(device)
        dtypes = []
        for table in ("eager", "triton"):
            model = gpt(device, table)
            seen = {}
            for name, module in model.named_modules():
                module.register_forward_hook(lambda _, __, out, name=name, seen=seen: seen.update({name: flat(out)}))
            with torch.autocast(device.type, dtype):
                model(idx, targets)
                model(idx)
            dtypes.append(seen)
        # A norm without a residual keeps x's dtype in plain PyTorch; the matmul behind it rounds what it reads.
        first = "transformer.h.0.ln_1"
        assert [seen.pop(first) for seen in dtypes] == [[torch.float32], [dtype]]
        assert dtypes[0] == dtypes[1]


def flat(output):
    return [None if x is None else x.dtype for x in (output if isinstance(output, tuple) else (output,))]


# ---- deterministic mode


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_deterministic_mode_is_honoured(device, precision, monkeypatch):
    """No operator refuses it, and two runs are bit-equal, although PyTorch then fills fresh memory with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    idx, targets = batch(device)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = gpt(device, dropout=0.2)
            torch.manual_seed(3)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                found = loss_and_gradients(model, model, idx, targets)
            FusedAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0).step()
            results.append({**found, **{f"{name} after": p.detach() for name, p in model.named_parameters()}})
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in results[0].values())
    assert_same(*results, rtol=0, atol=0)
