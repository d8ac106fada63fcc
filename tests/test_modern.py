"""The modern recipe's model: against the same equations in plain PyTorch, part by part, and how it generates."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, ModelConfig
from fastgpt.model import GPT

FULL = ModelConfig(
    n_layer=4, n_head=4, n_embd=32, block_size=16, vocab_size=64, family="modern", n_kv_head=2, rotary_base=100.0,
    qk_norm=True, activation="relu2", tied_head=False, zero_init=True, embedding_norm=True, residual_scalars=True,
    value_embeddings=True, softcap=5.0, window_pattern="SSSL", smear=True, backout=True,
)  # fmt: skip
OFF = {
    "n_kv_head": 0, "rotary_base": 0.0, "qk_norm": False, "activation": "gelu", "tied_head": True, "zero_init": False,
    "embedding_norm": False, "residual_scalars": False, "value_embeddings": False, "softcap": 0.0, "window_pattern": "L",
    "smear": False, "backout": False,
}  # fmt: skip
CONFIGS = (
    {"full": FULL, "bare": replace(FULL, **OFF)}
    | {f"no {name}": replace(FULL, **{name: OFF[name]}) for name in OFF}
    | {"two layers": replace(FULL, n_layer=2, residual_scalars=False)}
)


def made(config, table="eager", seed=0):
    """A model whose every parameter matters: none of them is zero."""
    torch.manual_seed(seed)
    model = GPT(config, ops.get(table))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def plain(config, w, idx, targets, doc_ids=None):
    """(logits, loss) from weights by name, one equation after another."""
    T, H, D = idx.shape[1], config.n_head, config.n_embd // config.n_head
    H_kv = config.n_kv_head or H

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x):  # (B, T, heads, D) as D/2 complex numbers
        speed = torch.tensor([config.rotary_base ** (-2 * i / D) for i in range(D // 2)]).to(x)
        turn = torch.polar(torch.ones(T, D // 2).to(x), -torch.arange(T)[:, None].to(x) * speed)
        z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn[:, None]
        return torch.cat((z.real, z.imag), -1)

    x = w["transformer.wte.weight"][idx]
    x = norm(x) if config.embedding_norm else x
    if config.smear:
        gate = w["transformer.smear_lambda"] * torch.sigmoid(x[:, 1:, :24] @ w["transformer.smear_gate.weight"].T)
        if doc_ids is not None:
            gate = gate * (doc_ids[:, 1:, None] == doc_ids[:, :-1, None])
        x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), 1)
    x0 = x
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}."
        if config.residual_scalars:
            x = w["transformer.resid_lambdas"][layer] * x + w["transformer.x0_lambdas"][layer] * x0
        h = norm(x)
        packed = (h @ w[block + "attn.c_attn.weight"].T).unflatten(-1, (H + 2 * H_kv, D))
        q, k, v = packed.split((H, H_kv, H_kv), 2)
        if config.rotary_base:
            q, k = turned(q), turned(k)
        if config.qk_norm:
            q, k = 1.2 * norm(q), 1.2 * norm(k)
        if config.value_embeddings and layer % 2 == 1:
            gate = 3 * torch.sigmoid(h[..., :12] @ w[block + "attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"transformer.value_embeds.{layer}.weight"][idx].unflatten(-1, (H_kv, D))
        apart = torch.arange(T)[:, None] - torch.arange(T)
        short = config.window_pattern == "SSSL" and layer < config.n_layer - 1
        sees = (apart >= 0) & (apart <= (config.block_size // 4 if short else T))
        if doc_ids is not None:
            sees = sees & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
        k, v = k.repeat_interleave(H // H_kv, 2), v.repeat_interleave(H // H_kv, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
        y = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v).flatten(2)
        x = x + y @ w[block + "attn.c_proj.weight"].T
        up = norm(x) @ w[block + "mlp.c_fc.weight"].T
        up = up.relu() ** 2 if config.activation == "relu2" else F.gelu(up, approximate="tanh")
        x = x + up @ w[block + "mlp.c_proj.weight"].T
        if layer == config.n_layer // 2:
            middle = x
    x = x - w["transformer.backout_lambda"] * middle if config.backout else x
    logits = norm(x) @ w["transformer.wte.weight" if config.tied_head else "lm_head.weight"].T
    logits = config.softcap * torch.tanh(logits / config.softcap) if config.softcap else logits
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("documents", [False, True])
def test_computes_the_same_equations_in_plain_pytorch(name, documents):
    config = CONFIGS[name]
    model = made(config).double()
    idx, targets = torch.randint(0, 64, (2, 2, 12))
    doc_ids = torch.tensor([[0] * 5 + [1] * 7, [3] * 12], dtype=torch.int32) if documents else None
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits, loss = plain(config, weights, idx, targets, doc_ids)
    loss.backward()
    own = model(idx, targets, doc_ids)[1]
    own.backward()
    # Softcapped logits are fp32, and so are cos and sin.
    torch.testing.assert_close(model(idx, doc_ids=doc_ids)[0].double(), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.double(), loss, rtol=1e-5, atol=1e-5)
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[n].grad, rtol=1e-4, atol=1e-5 * weights[n].grad.abs().max())


@pytest.mark.parametrize("name", ["full", "bare"])
def test_a_later_token_never_changes_an_earlier_one(name):
    model = made(CONFIGS[name]).eval()
    idx = torch.randint(0, 64, (1, 16))
    before = model(idx)[0]
    for at in (1, 7, 15):
        changed = idx.clone()
        changed[0, at] = (idx[0, at] + 1) % 64
        after = model(changed)[0]
        assert torch.equal(after[:, :at], before[:, :at]) and not torch.equal(after[:, at], before[:, at])


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_from_the_cache_is_the_full_forward_pass(name):
    model = made(CONFIGS[name]).eval()
    prompt = torch.randint(0, 64, (2, 3))
    new = list(model.generate(prompt, 20, temperature=0))  # past block_size, too
    sequence = torch.cat((prompt, *new), 1)
    for i in range(3, sequence.shape[1]):
        logits = model(sequence[:, max(0, i - 16) : i])[0]
        assert torch.equal(logits[:, -1].argmax(-1), sequence[:, i])


def gradients(model, idx, targets, doc_ids=None):
    """The loss and every parameter's gradient, by name."""
    loss = model(idx, targets, doc_ids)[1]
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("name", ["full", "bare", "no n_kv_head", "no residual_scalars"])
def test_the_kernels_compute_what_plain_pytorch_does(name, device):
    idx, targets = torch.randint(0, 64, (2, 2, 12), device=device)
    doc_ids = torch.tensor([[0] * 5 + [1] * 7, [3] * 12], dtype=torch.int32, device=device)
    eager, fused = (
        gradients(made(CONFIGS[name], table).to(device), idx, targets, doc_ids) for table in ("eager", "triton")
    )
    for key, expected in eager.items():
        bound = 1e-4 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(fused[key], expected, rtol=1e-3, atol=bound, msg=lambda m, key=key: f"{key}: {m}")


def test_the_kernels_decode_from_the_cache_what_plain_pytorch_does(device):
    prompt = torch.randint(0, 64, (2, 3), device=device)
    eager, fused = (
        torch.cat(list(made(FULL, table).to(device).eval().generate(prompt, 4, temperature=0)), 1)
        for table in ("eager", "triton")
    )
    assert torch.equal(eager, fused)


@pytest.mark.parametrize("table", ["eager", "triton"])
def test_torch_compile_makes_one_graph_of_it(table, device):
    torch._dynamo.reset()
    model = made(FULL, table).to(device)
    idx, targets = torch.randint(0, 64, (2, 2, 16), device=device)
    expected = gradients(model, idx, targets)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(idx, targets)[1]
    loss.backward()
    got = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)


def test_fp8_is_gpt2s_alone_and_fp16_fast_is_not():
    for precision in EXPERIMENTAL:
        used, why = ops.usable_precision(precision, torch.device("cuda"), "triton", "modern")
        if precision == "fp8":
            assert used == "bf16" and why == "precision is 'fp8', which only GPT-2 has yet: bf16 is used instead"
        else:
            assert why is None or "no faster" in why


def test_begins_with_equal_chances_and_blocks_that_do_nothing():
    model = GPT(FULL)
    idx, targets = torch.randint(0, 64, (2, 2, 16))
    loss = model(idx, targets)[1].item()
    assert abs(loss - torch.tensor(64.0).log().item()) < 0.01
    projections = [p for n, p in model.named_parameters() if n.endswith("c_proj.weight")]
    assert len(projections) == 8 and not any(p.any() for p in projections)


def test_windows_follow_the_pattern_and_the_last_block_sees_all():
    model = GPT(replace(FULL, n_layer=6, window_pattern="SL"))
    assert [block.attn.window for block in model.transformer.h] == [5, None, 5, None, 5, None]
    assert [block.attn.window for block in GPT(replace(FULL, window_pattern="S")).transformer.h] == [5, 5, 5, None]


def test_a_limit_of_windows_holds_in_training_alone():
    model, idx = made(replace(FULL, smear=False)), torch.randint(0, 64, (1, 16))
    changed = idx.clone()
    changed[0, 0] = (idx[0, 0] + 1) % 64
    for limit, reached in ((1, 1), (2, 1 + FULL.n_layer), (None, 16)):
        model.transformer.limit_windows(limit)
        differs = (model(idx)[0] != model(changed)[0]).any(-1)[0]
        assert differs.nonzero().max() == reached - 1
        assert (model.eval()(idx)[0] != model(changed)[0]).any(-1).all()
        model.train()


def test_dropout_falls_everywhere_but_in_eval_mode():
    model = made(replace(FULL, dropout=0.5))
    idx = torch.randint(0, 64, (2, 16))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 32, "n_kv_head": 0}, "rotary_base is 100.0 but heads have 1 columns"),
        ({"n_head": 32, "n_kv_head": 0, "rotary_base": 0.0}, "qk_norm is True but heads have 1 columns"),
        ({"n_kv_head": 3}, "n_kv_head is 3, which does not divide n_head 4: it can be 1, 2, 4"),
        ({"window_pattern": "SXL"}, "window_pattern is 'SXL': it must be made of S and L"),
        ({"window_pattern": ""}, "window_pattern is ''"),
        ({"softcap": -1.0}, "softcap is -1.0: it must not be negative"),
        ({"bias": True}, "bias is True, which a modern model does not have"),
        *(
            ({**OFF, "family": "gpt2", name: getattr(FULL, name)}, f"{name} is .*which a GPT-2 does not have")
            for name in OFF
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(change, words):
    with pytest.raises(UserError, match=words):
        replace(FULL, **change)
