"""fastgpt.patch on nanochat's module structure: its versions, and forks that must not be trained as nanochat."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench.parity import assert_parity
from fastgpt.ops import TRITON, Ops
from fastgpt.patching import patch, unpatch
from tests.patching import nanochat_first, nanochat_model
from tests.patching.nanochat_model import GPT, MLP, Attention, Block, Linear, V, make, norm

ALL = {"attention": 3, "MLP": 3, "norms with the residual add": 3, "loss": 1}


def batch(device, B=2, T=17):
    idx, targets = torch.randint(0, V, (2, B, T), device=device)
    targets[0, : T - 1 : 3] = -1
    return idx, targets


def measure(model, idx, targets):
    """{name: tensor}: the loss and every gradient that there is."""
    model.zero_grad(set_to_none=True)
    loss = model(idx, targets)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_trains_alike(model, device):
    """Patch the model, and hold it against itself unpatched. Returns the report."""
    own, (idx, targets) = copy.deepcopy(model), batch(device)
    report = patch(model, quiet=True)
    got, want = measure(model, idx, targets), measure(own, idx, targets)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= 3e-5 * tensor.abs().max(), name
    return report


class AttentionWithoutValueEmbedding(Attention):
    """January 2026."""

    sharpness = 1.0

    def forward(self, x, cos_sin, window_size, kv_cache):
        return super().forward(x, None, cos_sin, window_size, kv_cache)


class BlockWithoutValueEmbedding(Block):
    def forward(self, x, cos_sin, window_size, kv_cache):
        x = x + self.attn(norm(x), cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))


class GPTWithoutValueEmbedding(GPT):
    def arguments(self, idx):
        of = super().arguments(idx)
        return lambda layer: of(layer)[1:]


VERSIONS = {
    "July 2026": {},
    "March 2026": {"attention": type("CausalSelfAttention", (Attention,), {"sharpness": 1.15, "most": 2.0})},
    "January 2026": {
        "model": GPTWithoutValueEmbedding,
        "attention": AttentionWithoutValueEmbedding,
        "block": BlockWithoutValueEmbedding,
    },
    "October 2025": {
        "model": nanochat_first.GPT,
        "attention": nanochat_first.Attention,
        "block": nanochat_first.Block,
    },
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_replaced_whole_and_trains_as_it_did(device, version):
    report = assert_trains_alike(make(device, **VERSIONS[version]), device)
    assert report.replaced == ALL
    assert report.kept == {"norms and sums outside the blocks": "the model's own forward, which stays, computes them"}


def test_parity_in_bf16_with_fp32_weights(device, monkeypatch):
    """As nanochat trains: embeddings and tables in bf16, weights fp32 and cast by its Linear; no autocast."""
    model, (idx, targets) = make(device, n_kv_head=2), batch(device)
    wide = copy.deepcopy(model).double()
    monkeypatch.setattr(nanochat_model, "COMPUTE_DTYPE", torch.float64)
    want = measure(wide, idx, targets)
    monkeypatch.setattr(nanochat_model, "COMPUTE_DTYPE", torch.bfloat16)
    model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    same_dtype = measure(model, idx, targets)
    assert patch(model, quiet=True).replaced == ALL
    assert nanochat_model.COMPUTE_DTYPE == torch.bfloat16
    got = measure(model, idx, targets)
    for name, tensor in got.items():
        if tensor.numel() > 1 or name == "loss":  # of a single number the model's own error may be 0 by chance
            assert_parity(name, tensor, want[name], same_dtype[name], torch.bfloat16)


def test_verify_checks_it_on_the_models_own_device(device):
    report = patch(make(device), verify=batch(device), quiet=True)
    assert report.replaced == ALL and {"loss", "resid_lambdas"} <= report.verified.keys()


def test_flash_attention_3_does_not_keep_it_from_being_tried_out(device, monkeypatch):
    model = make(device)
    monkeypatch.setattr(nanochat_model, "USE_FA3", True)
    assert patch(model, quiet=True).replaced == ALL
    assert nanochat_model.USE_FA3


def test_evaluation_and_inference(device):
    """With targets the loss needs no logits in eval mode either; without, and with a KV cache, the model's own forward runs."""
    model, (idx, targets) = make(device).eval(), batch(device)
    own = copy.deepcopy(model)
    patch(model, quiet=True)

    class Cache:
        """Attends without a window, unlike the model without a cache."""

        def attend(self, layer, q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    with torch.no_grad():
        for options in ({}, {"kv_cache": Cache()}, {"targets": targets, "loss_reduction": "none"}):
            torch.testing.assert_close(model(idx, **options), own(idx, **options), rtol=1e-4, atol=1e-5)
    shapes = []
    with _Watching(shapes), torch.no_grad():
        model(idx, targets)
    assert (2, 17, 128) not in shapes


class _Watching(TorchFunctionMode):
    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.shapes.append(tuple(out.shape))
        return out


def test_it_costs_the_host_less_than_before(device, monkeypatch):
    """Calls of torch functions in the blocks, each of them a launch or more on a GPU, with an operation of ours as one call."""
    monkeypatch.setattr("fastgpt.kernels.runtime.INTERPRET", False)
    model, (idx, _) = make(device, n_layer=2), batch(device)
    calls = []

    def counted(operation):
        def call(*args, **kwargs):
            calls.append(operation)
            with torch._C.DisableTorchFunction():
                return operation(*args, **kwargs)

        return call

    def count():
        calls.clear()
        with _Watching(calls):
            model.trunk(idx, model.arguments(idx), None)
        return len(calls)

    before = count()
    patch(model, quiet=True)
    operations = {field.name: counted(getattr(TRITON, field.name)) for field in fields(Ops) if field.name != "name"}
    for block in model.transformer.h:
        for part in (block, block.attn, block.mlp):
            monkeypatch.setattr(type(part), "ops", Ops("counted", **operations))
    after = count()
    assert after < 0.75 * before


def test_unpatched_it_is_what_it_was_and_patched_it_can_be_copied(device):
    model, (idx, targets) = make(device), batch(device)
    patch(model, quiet=True)
    loss = model(idx, targets)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(idx, targets).equal(loss)
    unpatch(model)
    assert not any(name.startswith("_fastgpt") for part in model.modules() for name in vars(part))
    assert type(model) is GPT and type(model.transformer.h[0].attn) is Attention


def test_torch_compile_traces_it_without_a_break(device):
    model, (idx, targets) = make(device, n_layer=1), batch(device)
    patch(model, quiet=True)
    want = measure(model, idx, targets)
    torch._dynamo.reset()
    got = measure(torch.compile(model, backend="eager", fullgraph=True), idx, targets)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)


def test_a_hook_and_an_adapter_put_in_later_are_heard(device):
    """Linear layers that are no longer plain are called themselves."""
    model, (idx, targets), seen = make(device), batch(device), []
    own = copy.deepcopy(model)
    patch(model, quiet=True)

    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for each in (model, own):
        attn, mlp = each.transformer.h[0].attn, each.transformer.h[1].mlp
        attn.c_q.register_forward_hook(lambda *_: seen.append("c_q"))
        attn.c_v.__class__ = mlp.c_proj.__class__ = Doubled
    got, want = measure(model, idx, targets), measure(own, idx, targets)
    assert seen == ["c_q"] * 2
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-5)


# ---- forks -------------------------------------------------------------------------------------------------------------


def attention_of(**members):
    return {"attention": type("Fork", (Attention,), members)}


def queries(change):
    """Attention with other queries, keys and values."""
    return attention_of(qkv=lambda self, *args: change(self, *Attention.qkv(self, *args)))


def _no_positions(self, x, ve, cos_sin):
    """In one layer of two, as some models do."""
    cos, sin = cos_sin
    still = self.layer_idx == 1
    return Attention.qkv(self, x, ve, (torch.ones_like(cos), torch.zeros_like(sin)) if still else (cos, sin))


def _parallel(self, x, *rest):
    return x + self.attn(norm(x), *rest) + self.mlp(norm(x))


def _post_norm(self, x, *rest):
    x = x + norm(self.attn(x, *rest))
    return x + norm(self.mlp(x))


def _layer_norm(self, x, *rest):
    x = x + self.attn(F.layer_norm(x, x.shape[-1:]), *rest)
    return x + self.mlp(norm(x))


def _another_eps(self, x, *rest):
    x = x + self.attn(F.rms_norm(x, x.shape[-1:], eps=1e-5), *rest)
    return x + self.mlp(norm(x))


def block_of(change):
    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        return change(self, x, ve, cos_sin, window_size, kv_cache)

    return {"block": type("Fork", (Block,), {"forward": forward})}


class Gated(MLP):
    def __init__(self, config):
        super().__init__(config)
        self.gate = Linear(config.n_embd, 4 * config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.gate(x)) * self.c_fc(x))


class Skipping(Block):
    """Takes what the attention does not."""

    def forward(self, x, ve, cos_sin, window_size, kv_cache, skip=None):
        x = x if skip is None else x + skip
        return super().forward(x, ve, cos_sin, window_size, kv_cache)


class SkippingGPT(GPT):
    def trunk(self, idx, arguments, kv_cache):
        x = norm(self.transformer.wte(idx))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, *arguments(layer), kv_cache, skip=x if layer else None)
        return norm(x)


class Quantised(Linear):
    def forward(self, x):
        return F.linear(x, (self.weight * 8).round() / 8)


def mlp_of(forward):
    return {"mlp": type("Fork", (MLP,), {"forward": lambda self, x: forward(self, x)})}


ELSE = "its forward computes something else"
FORKS = {
    "GELU": (mlp_of(lambda self, x: self.c_proj(F.gelu(self.c_fc(x)))), {"MLP": ELSE}),
    "ReLU": (mlp_of(lambda self, x: self.c_proj(F.relu(self.c_fc(x)))), {"MLP": ELSE}),
    "clamped": (mlp_of(lambda self, x: MLP.forward(self, x).clamp(-50, 50)), {"MLP": ELSE}),
    "SwiGLU": ({"mlp": Gated}, {"MLP": "it has a part that the fused forward does not know (gate)"}),
    "no QK norm": (attention_of(qkv=lambda self, x, ve, cs: _without_qk_norm(self, x, ve, cs)), {"attention": ELSE}),
    "queries twice as sharp": (queries(lambda self, q, k, v: (2 * q, k, v)), {}),
    "detached values": (queries(lambda self, q, k, v: (q, k, v.detach())), {"attention": ELSE}),
    "learned sharpness": (queries(lambda self, q, k, v: (q * self.c_proj.weight.mean(), k, v)), {"attention": ELSE}),
    "no positions in one layer": (
        {"attention": type("Fork", (Attention,), {"qkv": _no_positions})},
        {"attention of transformer.h.1": ELSE},
    ),
    "parallel": (block_of(_parallel), {"norms with the residual add": ELSE}),
    "post-norm": (block_of(_post_norm), {"norms with the residual add": ELSE}),
    "layer norm": (block_of(_layer_norm), {"norms with the residual add": ELSE}),
    "another eps": (block_of(_another_eps), {"norms with the residual add": ELSE}),
    "a skip connection": (
        {"model": SkippingGPT, "block": Skipping},
        {"norms with the residual add": "its forward takes other arguments than Attention's"},
    ),
    "cap 30": ({"model": type("GPT", (GPT,), {"cap": lambda self, z: 30 * torch.tanh(z / 30)})}, {}),
    "no cap": ({"model": type("GPT", (GPT,), {"cap": lambda self, z: z})}, {}),
    "sigmoid cap": (
        {"model": type("GPT", (GPT,), {"cap": lambda self, z: 30 * torch.sigmoid(z / 7.5)})},
        {"loss": "it is not the cross-entropy of what lm_head returns"},
    ),
    "cap of another slope": (
        {"model": type("GPT", (GPT,), {"cap": lambda self, z: 15 * torch.tanh(z / 30)})},
        {"loss": "it is not the cross-entropy of what lm_head returns"},
    ),
}


def _without_qk_norm(self, x, ve, cos_sin):
    q, k, v = (c(x).unflatten(-1, (-1, self.head_dim)) for c in (self.c_q, self.c_k, self.c_v))
    if ve is not None:
        v = v + (3 * self.ve_gate(x[..., :12]).sigmoid())[..., None] * ve.view_as(v)
    return nanochat_model.rotate(q, *cos_sin), nanochat_model.rotate(k, *cos_sin), v


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_is_trained_as_what_it_is(device, fork, monkeypatch):
    monkeypatch.setattr("fastgpt.kernels.runtime.INTERPRET", False)  # what the kernels compute is tested elsewhere
    parts, kept = FORKS[fork]
    report = assert_trains_alike(make(device, **parts), device)
    assert {name: why for name, why in report.kept.items() if "outside" not in name} == kept


@pytest.mark.parametrize("name", ["c_fc", "lm_head", "c_q"])
def test_a_linear_layer_of_another_class_is_called_itself(device, name, monkeypatch):
    monkeypatch.setattr("fastgpt.kernels.runtime.INTERPRET", False)
    model = make(device)
    for where, module in model.named_modules():
        if where.endswith(name):
            module.__class__ = Quantised
    report = assert_trains_alike(model, device)
    what = {"c_fc": "MLP", "lm_head": "loss"}.get(name)
    assert what is None or "Quantised, not a plain linear" in report.kept[what]


def test_value_embeddings_without_a_gate_take_the_models_own_attention(device):
    """patch cannot see them in the modules, and finds them in the call."""

    class Ungated(Attention):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            del self.ve_gate

        def qkv(self, x, ve, cos_sin):
            q, k, v = super().qkv(x, None, cos_sin)
            return q, k, v if ve is None else v + ve.view_as(v)

    assert_trains_alike(make(device, attention=Ungated), device)


class Packed(GPT):
    """Positions begin again where a sequence's next document does, if a call says so."""

    packed = False

    def arguments(self, idx):
        of, at = super().arguments(idx), torch.arange(idx.shape[1], device=idx.device)
        at = torch.stack([at % (5 + 3 * b) for b in range(len(idx))])
        packed = self.cos[0][at], self.sin[0][at]
        return (lambda layer: (of(layer)[0], packed, of(layer)[2])) if self.packed else of


class TwoSided(Attention):
    """Sees the tokens after its own that the window says."""

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        at = torch.arange(x.shape[1], device=x.device)
        distance, (before, after) = at[:, None] - at[None, :], window_size
        mask = (distance >= -after) & (distance <= (before if before >= 0 else len(at)))
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x, ve, cos_sin))
        return self.c_proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
        )


@pytest.mark.parametrize(
    ("parts", "later"),
    [({"model": Packed}, {"packed": True}), ({"attention": TwoSided}, {"window_sizes": [(5, 3)] * 3})],
    ids=["positions of each sequence", "a window with tokens after"],
)
def test_a_call_that_the_fused_attention_does_not_know_takes_the_models_own(device, parts, later, monkeypatch):
    monkeypatch.setattr("fastgpt.kernels.runtime.INTERPRET", False)
    model, (idx, targets) = make(device, **parts), batch(device)
    own = copy.deepcopy(model)
    assert patch(model, quiet=True).replaced == ALL
    for each in (model, own):
        vars(each).update(later)
    got, want = measure(model, idx, targets), measure(own, idx, targets)
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= 3e-5 * tensor.abs().max(), name


def test_what_a_near_relative_lacks_is_named(device):
    model = make(device)
    del model.transformer.h[1].attn.c_k
    with pytest.raises(Exception, match=r"as nanochat's it lacks transformer\.h\.1\.attn\.c_k$"):
        patch(model, quiet=True)
