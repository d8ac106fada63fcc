"""fastgpt.patch on nanoGPT's module structure, in parity with the unpatched model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.steps import nanogpt as nanogpt_model
from bench.steps.nanogpt import GPT
from fastgpt.optim.adamw import FusedAdamW
from fastgpt.patching import patch, unpatch
from tests.patching.parity import assert_same, batch, loss_of
from tests.patching.parity import make_nanogpt as make


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("B, T, heads, bias", [(2, 17, 2, True), (1, 1, 3, False), (2, 32, 1, False)])
def test_logits_loss_and_every_gradient_are_the_models_own(device, train, B, T, heads, bias):
    assert_same(make(device, bias=bias, n_head=heads), loss_of(*batch(device, B, T)), train)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_under_autocast(device, dtype):
    assert_same(make(device, n_layer=1), loss_of(*batch(device)), train=True, autocast=dtype)


def test_parity_without_flash(device):
    assert_same(make(device, flash=False, n_layer=1), loss_of(*batch(device)), train=True)


def test_the_fp32_residual_stream_keeps_its_dtype_under_autocast(device):
    model = make(device)
    patch(model, quiet=True)
    seen = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
        block.attn.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    model.transformer.ln_f.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast(device.type, torch.bfloat16):
        model(*batch(device))
    wide, narrow = (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)
    assert seen == [narrow, wide, narrow, wide, wide]


def test_training_returns_no_logits_and_keep_logits_gives_them_back(device):
    model, (idx, targets) = make(device), batch(device)
    want, loss = model(idx, targets)
    patch(model, quiet=True)
    assert model(idx, targets)[0] is None
    assert model.eval()(idx, targets)[0].shape == want.shape
    model.train()
    report = patch(model, keep_logits=True, quiet=True)
    logits, kept_loss = model(idx, targets)
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(kept_loss, loss)
    assert report.kept["loss"] == "keep_logits=True"


def test_parity_with_keep_logits(device):
    assert_same(make(device, n_layer=1), loss_of(*batch(device)), train=True, keep_logits=True)


def test_greedy_generation_gives_the_same_tokens(device):
    model = make(device).eval()
    prompt = torch.randint(0, 67, (2, 3), device=device)
    want = model.generate(prompt, 5, top_k=1)
    patch(model, quiet=True)
    assert model.generate(prompt, 5, top_k=1).equal(want)


def test_weights_loaded_and_block_size_cropped_after_patch(device):
    source, model = make(device), make(device)
    patch(model, quiet=True)
    model.load_state_dict(source.state_dict())
    for each in (source, model):
        each.crop_block_size(16)
    idx, targets = batch(device, T=16)
    torch.testing.assert_close(model(idx, targets)[1], source(idx, targets)[1])
    with pytest.raises(ValueError, match="longer than block_size 16"):
        model(*batch(device, T=17))


def test_patched_before_it_moves_to_the_device(device):
    model = make("cpu")
    patch(model, quiet=True)
    model.to(device, torch.bfloat16)
    _, loss = model(*batch(device))
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_torch_compile_traces_it_without_a_break(device):
    model, (idx, targets) = make(device, n_layer=1), batch(device)
    patch(model, quiet=True)
    _, want = model(idx, targets)
    want.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    _, loss = torch.compile(model, backend="aot_eager", fullgraph=True)(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, want)
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient)


def test_activation_checkpointing_repeats_dropout(device):
    model, (idx, targets) = make(device, dropout=0.3, n_layer=1), batch(device)
    patch(model, quiet=True)

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(idx, targets)[1].backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    for block in model.transformer.h:
        own = block.forward
        block.forward = lambda x, own=own: checkpoint(own, x, use_reentrant=False)
    for got, expected in zip(gradients(), want):
        torch.testing.assert_close(got, expected)


def test_gradients_reach_every_parameter_and_fused_adamw_moves_it(device):
    model, (idx, targets) = make(device, dropout=0.1, n_layer=1), batch(device)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device.type)
    patch(model, quiet=True)
    optimizer = FusedAdamW.from_optimizer(optimizer)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(2):
        _, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not tensor.equal(before[name]) for name, tensor in model.state_dict().items())


class TestDropout:
    def test_mean_and_spread_of_the_output_are_dropouts(self, device):
        """With one linear path (attention and MLP project to ones) the outcome is dropout's alone."""
        model = make(device, dropout=0.25, n_layer=1, bias=True)
        patch(model, quiet=True)
        block = model.transformer.h[0]
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.zero_()
            block.attn.c_proj.bias.fill_(1.0)
        x = torch.zeros(8, 32, 24, device=device)
        added = block(x)
        values = added.unique().tolist()
        torch.testing.assert_close(values, [0.0, 1 / 0.75])
        kept = (added != 0).float().mean().item()
        n = added.numel()
        assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5
        assert not block(x).equal(added)

    def test_attention_drops_weights_in_training_only(self, device):
        model = make(device, dropout=0.5, n_layer=1)
        patch(model, quiet=True)
        attention = model.transformer.h[0].attn
        attention.resid_dropout.p = 0.0
        x = torch.randn(2, 16, 24, device=device)
        assert not attention(x).equal(attention(x))
        model.eval()
        assert attention(x).equal(attention(x))

    def test_attentions_output_keeps_its_mean(self, device):
        model = make(device, dropout=0.5, n_layer=1)
        patch(model, quiet=True)
        attention = model.transformer.h[0].attn
        attention.resid_dropout.p = 0.0
        x = torch.randn(1, 8, 24, device=device)
        with torch.no_grad():
            many = attention(x.expand(64, -1, -1))
            model.eval()
            error = (many.mean(0) - attention(x)[0]).abs() / (many.std(0) / 8 + 1e-7)
        assert error.mean() < 1.3  # of |N(0, 1)|: 0.8


class TestForks:
    """Whatever a fork computes otherwise stays as it is, and the results are its own."""

    def check(self, device, model, kept, why, idx=None):
        idx, targets = batch(device)
        want = model(idx, targets)[1]
        report = patch(model, quiet=True)
        assert why in report.kept[kept]
        torch.testing.assert_close(model(idx, targets)[1], want)
        return report

    def test_attention_with_another_scale(self, device):
        class Scaled(nanogpt_model.CausalSelfAttention):
            def forward(self, x):
                return 0.5 * super().forward(x)

        model = make(device)
        for block in model.transformer.h:
            block.attn.__class__ = Scaled
        report = self.check(device, model, "attention", "its forward computes something else")
        assert report.replaced["residual add with its norm"] == 2

    def test_attention_that_sees_a_window_only(self, device):
        class Windowed(nanogpt_model.CausalSelfAttention):
            def forward(self, x):
                self.flash = False
                self.bias = torch.ones(32, 32, device=x.device).tril().triu(-30)[None, None]
                return super().forward(x)

        model = make(device)
        for block in model.transformer.h:
            block.attn.__class__ = Windowed
        self.check(device, model, "attention", "its forward computes something else")

    def test_only_the_blocks_that_differ_are_kept(self, device):
        model = make(device, n_layer=3)
        model.transformer.h[1].attn.extra = nn.Linear(2, 2).to(device)
        report = self.check(device, model, "attention of transformer.h.1", "a part that nanoGPT's has not (extra)")
        assert report.replaced["attention"] == 2

    def test_blocks_in_parallel(self, device):
        class Parallel(nanogpt_model.Block):
            def forward(self, x):
                return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))

        model = make(device)
        for block in model.transformer.h:
            block.__class__ = Parallel
        self.check(device, model, "residual add with its norm", "its forward computes something else")

    def test_noise_in_training_only(self, device):
        """Stochastic depth written as a function: no module tells of it, and eval mode does not show it."""

        class Dropping(nanogpt_model.Block):
            def forward(self, x):
                x = x + nn.functional.dropout(self.attn(self.ln_1(x)), 0.1, self.training)
                return x + self.mlp(self.ln_2(x))

        model = make(device)
        for block in model.transformer.h:
            block.__class__ = Dropping
        report = patch(model, quiet=True)
        assert report.kept["residual add with its norm"] == "its forward computes something else"
        assert report.replaced["attention"] == 2

    def test_norms_of_another_kind(self, device):
        class RMSNorm(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(24, device=device))

            bias = None

            def forward(self, x):
                return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight

        model = make(device)
        for block in model.transformer.h:
            block.ln_2 = RMSNorm()
        report = self.check(device, model, "layer norm", "its forward computes something else")
        assert report.kept["residual add with its norm"] == "ln_2 is kept"
        assert report.replaced["layer norm"] == 3

    def test_a_loss_with_capped_logits(self, device):
        class Capped(GPT):
            def forward(self, idx, targets=None):
                logits, loss = super().forward(idx, targets)
                return logits, None if loss is None else loss + 1e-3 * logits.logsumexp(-1).square().mean()

        model = make(device)
        model.__class__ = Capped
        self.check(device, model, "loss", "its forward computes something else")

    def test_a_forward_with_more_arguments(self, device):
        class More(GPT):
            def forward(self, idx, targets=None, weights=None):
                return super().forward(idx, targets)

        model = make(device)
        model.__class__ = More
        self.check(device, model, "loss", "(idx, targets, weights), not (idx, targets)")

    def test_pytorchs_ignore_index(self, device):
        class Ignoring(GPT):
            def forward(self, idx, targets=None):
                if targets is not None:
                    assert (targets != -1).all()
                    targets = targets.masked_fill(targets == -100, -1)
                return super().forward(idx, targets)

        model, (idx, targets) = make(device), batch(device)
        model.__class__ = Ignoring
        targets[targets == -1] = -100
        want = model(idx, targets)[1]
        assert "loss" in patch(model, quiet=True).replaced
        torch.testing.assert_close(model(idx, targets)[1], want)

    def test_a_model_in_fp64_goes_its_own_way(self, device):
        model = make(device).double()
        self.check(device, model, "attention", "parameters are float64")
        assert not patch(model, quiet=True).replaced


def test_another_activation_stays(device):
    model = make(device)
    for block in model.transformer.h:
        block.mlp.gelu = nn.ReLU()
    idx, targets = batch(device)
    want = model(idx, targets)[1]
    report = patch(model, quiet=True)
    assert report.kept["MLP"] == "its activation is a ReLU, not a GELU"
    torch.testing.assert_close(model(idx, targets)[1], want)


def test_unpatch_restores_classes_and_results(device):
    model, (idx, targets) = make(device), batch(device)
    classes = [type(module) for module in model.modules()]
    want, _ = model(idx, targets)
    patch(model, quiet=True)
    assert unpatch(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("_fastgpt") for module in model.modules() for name in vars(module))
    assert model(idx, targets)[0].equal(want)
