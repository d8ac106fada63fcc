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
    with pytest.raises(AssertionError, match="sequence of 17, block size 16"):  # the model's own
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
        model = make(device, dropout=0.5, n_layer=1, n_head=1)
        patch(model, quiet=True)
        attention = model.transformer.h[0].attn
        attention.resid_dropout.p = 0.0
        x = torch.randn(1, 8, 24, device=device)
        with torch.no_grad():
            many = attention(x.expand(64, -1, -1))
            model.eval()
            error = (many.mean(0) - attention(x)[0]).abs() / (many.std(0) / 8 + 1e-7)
        assert error.mean() < 1.3  # of |N(0, 1)|: 0.8


@pytest.mark.parametrize("positions", [True, False], ids=["build-nanogpt", "rotary"])
def test_models_without_dropout_or_positions(device, positions):
    """build-nanogpt's and llm.c's GPT have no module for dropout; one with rotary positions has no wpe."""

    class NewGELU(nn.Module):  # llm.c's
        def forward(self, x):
            return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    class MLP(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.c_fc, self.gelu, self.c_proj = own.c_fc, NewGELU(), own.c_proj

        def forward(self, x):
            return self.c_proj(self.gelu(self.c_fc(x)))

    class Attention(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.c_attn, self.c_proj, self.n_head, self.n_embd = own.c_attn, own.c_proj, own.n_head, own.n_embd

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    class Model(GPT):
        def forward(self, idx, targets=None, return_logits=True):
            x = self.transformer.wte(idx)
            if positions:
                x = x + self.transformer.wpe(torch.arange(idx.shape[1], device=idx.device))
            for block in self.transformer.h:
                x = block(x)
            logits = self.lm_head(self.transformer.ln_f(x))
            loss = None
            if targets is not None:
                loss = nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
            return logits if return_logits else None, loss

    model = make(device, n_layer=1)
    model.__class__ = Model
    del model.transformer["drop"]
    if not positions:
        del model.transformer["wpe"]
    for block in model.transformer.h:
        block.mlp, block.attn = MLP(block.mlp), Attention(block.attn)
    assert_same(model, loss_of(*batch(device)), train=True)
    assert not patch(model, quiet=True).kept


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
        report = self.check(
            device, model, "attention of transformer.h.1", "a part that the fused forward does not know (extra)"
        )
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

    def test_arguments_that_are_not_x_alone(self, device):
        """A fused forward would drop them, or take them for options of its own."""

        class Attention(nanogpt_model.CausalSelfAttention):
            def forward(self, x, is_causal=True):
                return super().forward(x) if is_causal else x

        class Block(nanogpt_model.Block):
            def forward(self, x, is_causal=True):
                x = x + self.attn(self.ln_1(x), is_causal)
                return x + self.mlp(self.ln_2(x))

        class Model(GPT):
            def forward(self, idx, targets=None, is_causal=True):
                x = self.transformer.wte(idx)
                for block in self.transformer.h:
                    x = block(x, is_causal)
                logits = self.lm_head(self.transformer.ln_f(x))
                loss = None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
                return logits, loss

        model, x = make(device, dropout=0.5), torch.randn(2, 9, 24, device=device)
        model.__class__ = Model
        for block in model.transformer.h:
            block.__class__, block.attn.__class__ = Block, Attention
        own = copy.deepcopy(model)
        report = patch(model, quiet=True)
        assert report.kept["attention"] == "the forward of Attention takes (x, is_causal), not x alone"
        assert report.kept["residual add with its norm"] == "the forward of Attention takes (x, is_causal), not x alone"
        assert (report.replaced["MLP"], report.replaced["loss"]) == (2, 1)
        attention, idx = model.transformer.h[0].attn, torch.randint(0, 67, (2, 9), device=device)
        assert attention(x, False).equal(x)
        assert (attention(x) == 0).float().mean() > 0.3  # its dropout
        for each in (model, own):
            each.eval()
        torch.testing.assert_close(model(idx, idx, False), own(idx, idx, False))

    def test_a_block_whose_norm_takes_a_condition(self, device):
        class Norm(nanogpt_model.LayerNorm):
            def forward(self, input, shift=0.0):
                return super().forward(input) + shift

        model = make(device)
        for block in model.transformer.h:
            block.ln_1.__class__ = Norm
        report = self.check(device, model, "residual add with its norm", "Norm takes (input, shift)")
        assert report.replaced["attention"] == 2

    def test_gradients_that_are_cut_off(self, device):
        class Cut(nanogpt_model.Block):
            def forward(self, x):
                x = x + self.attn(self.ln_1(x.detach()))
                return x + self.mlp(self.ln_2(x))

        model = make(device)
        for block in model.transformer.h:
            block.__class__ = Cut
        self.check(device, model, "residual add with its norm", "its forward computes something else")

    def test_random_numbers_and_counters(self, device):
        """Neither shows in what one call returns."""

        class Random(nanogpt_model.Block):
            def forward(self, x):
                return x if self.training and torch.rand(()) > 2 else super().forward(x)

        class Counting(nanogpt_model.Block):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return x if self.calls > 100 else super().forward(x)

        for cls, why in (
            (Random, "its forward draws random numbers"),
            (Counting, "its forward changes the module's state"),
        ):
            model = make(device)
            for block in model.transformer.h:
                block.__class__ = cls
            self.check(device, model, "residual add with its norm", why)

    def test_dropout_elsewhere_or_of_another_probability(self, device):
        """Although every probability is 0 in this model: it may not stay so."""

        class Doubled(nanogpt_model.MLP):
            def forward(self, x):
                return self.dropout(self.c_proj(self.dropout(self.gelu(self.c_fc(x)))))

        class Undropped(nanogpt_model.CausalSelfAttention):
            def forward(self, x):
                own, self.dropout = self.dropout, 0.0
                y = super().forward(x)
                self.dropout = own
                return y

        model = make(device)
        for block in model.transformer.h:
            block.mlp.__class__, block.attn.__class__ = Doubled, Undropped
        report = self.check(device, model, "MLP", "its forward computes something else")
        assert report.kept["attention"] == "its forward computes something else"

    @pytest.mark.parametrize("part, name", [("mlp", "scale"), ("attn", "scale"), ("ln_1", "scale"), ("", "scale")])
    def test_a_parameter_that_nanogpt_has_not(self, device, part, name):
        model = make(device)
        for block in model.transformer.h:
            block.get_submodule(part).register_buffer(name, torch.ones(()), persistent=False)
        report = patch(model, quiet=True)
        assert "it has a part that the fused forward does not know (scale)" in report.kept.values()

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
