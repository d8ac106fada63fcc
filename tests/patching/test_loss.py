"""The loss of forks: whatever a model does with its trunk, its logits and its targets, the patched one does, too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.steps.nanogpt import GPT, GPTConfig
from fastgpt.patching import patch

V, C = 31, 16


@pytest.fixture(autouse=True)
def _in_pytorch_on_a_cpu(monkeypatch):
    """What the kernels compute is tested elsewhere."""
    monkeypatch.setattr("fastgpt.kernels.runtime.INTERPRET", False)


class Fork(GPT):
    """nanoGPT in three pieces, so that each fork below changes one."""

    def __init__(self, config=None):
        torch.manual_seed(0)
        super().__init__(config or GPTConfig(block_size=16, vocab_size=V, n_layer=3, n_head=2, n_embd=C))
        self.extra = nn.Parameter(torch.randn(1, 1, C))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("calls", torch.tensor(0))
        with torch.no_grad():  # blocks that matter
            for parameter in self.transformer.h.parameters():
                parameter.mul_(8 if parameter.dim() > 1 else 1)

    def embed(self, idx):
        return self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1], device=idx.device))

    def trunk(self, x, targets):
        for block in self.transformer.h:
            x = block(x)
        return x

    def loss(self, logits, targets):
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.transformer.ln_f(self.trunk(self.embed(idx), targets)))
        return logits, None if targets is None else self.loss(logits, targets)


def in_order(self, x, blocks):
    for block in blocks:
        x = block(x)
    return x


def scaled(self, x, targets):
    for block in self.transformer.h:
        x = x + 0.5 * (block(x) - x)
    return x


def register_token(self, x, targets):
    x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
    return in_order(self, x, self.transformer.h)[:, 1:]


def stochastic_depth(self, x, targets):
    for block in self.transformer.h:
        x = block(x) if torch.rand(()) < 0.5 else x
    return x


def counting(self, x, targets):
    """Other than usual from its sixth call on: no trial can show it."""
    self.calls += 1
    return in_order(self, x, self.transformer.h) * (1.0 if self.calls < 6 else 0.5)


def blocks_checkpointed(self, x, targets):
    for block in self.transformer.h:
        x = checkpoint(block, x, use_reentrant=True)
    return x


TRUNKS = {
    "looped": lambda self, x, targets: in_order(self, x, [*self.transformer.h] * 2),
    "reversed": lambda self, x, targets: in_order(self, x, reversed(self.transformer.h)),
    "early exit": lambda self, x, targets: in_order(self, x, self.transformer.h[:1]),
    "by index": lambda self, x, targets: in_order(self, x, [self.transformer.h[i] for i in self.order.tolist()]),
    "scaled": scaled,
    "register token": register_token,
    "only in training": lambda self, x, targets: in_order(self, x, self.transformer.h[: 2 if self.training else 3]),
    "reads the targets": lambda self, x, targets: in_order(self, x * (targets != 3)[..., None], self.transformer.h),
    "checkpointed": lambda self, x, targets: checkpoint(in_order, self, x, self.transformer.h, use_reentrant=False),
    "blocks checkpointed": blocks_checkpointed,
    "detached": lambda self, x, targets: in_order(self, x.detach() + self.extra, self.transformer.h),
    "stochastic depth": stochastic_depth,
    "counting": counting,
}


def rows(logits, targets):
    return logits.view(-1, V), targets.view(-1)


def in_chunks(self, logits, targets):
    """As F.cross_entropy of a part at a time is written to save memory."""
    parts = [slice(i, i + 4) for i in range(0, targets.shape[1], 4)]
    losses = [F.cross_entropy(logits[:, part].flatten(0, 1), targets[:, part].flatten()) for part in parts]
    return torch.stack(losses).mean()


def weighted(self, logits, targets):
    each = F.cross_entropy(*rows(logits, targets), reduction="none", ignore_index=5)
    return (each * torch.linspace(0, 1, len(each), device=each.device)).sum()


LOSSES = {
    "plain": lambda self, logits, targets: F.cross_entropy(*rows(logits, targets)),
    "ignoring": lambda self, logits, targets: F.cross_entropy(*rows(logits, targets), ignore_index=7),
    "smoothed": lambda self, logits, targets: F.cross_entropy(*rows(logits, targets), label_smoothing=0.1),
    "summed": lambda self, logits, targets: F.cross_entropy(*rows(logits, targets), reduction="sum"),
    "shifted": lambda self, logits, targets: F.cross_entropy(
        *rows(logits[:, :-1].contiguous(), targets[:, 1:].contiguous())
    ),
    "a module": lambda self, logits, targets: nn.CrossEntropyLoss()(*rows(logits.float(), targets)),
    "unknown width": lambda self, logits, targets: F.cross_entropy(
        logits.reshape(targets.numel(), -1), targets.reshape(-1)
    ),
    "with another loss": lambda self, logits, targets: (
        F.cross_entropy(*rows(logits, targets)) + self.extra.square().mean()
    ),
    "softcap": lambda self, logits, targets: F.cross_entropy(*rows(15 * torch.tanh(logits / 15), targets)),
    "softcap of a few columns": lambda self, logits, targets: F.cross_entropy(
        (torch.tanh(logits[..., :29].to(dtype=torch.float32) * 0.125) * 8).flatten(0, 1), targets.flatten() % 29
    ),
    "in chunks": in_chunks,
    "weighted by position": weighted,
}


def padded_vocabulary(self, logits, targets):
    flat = logits.view(-1, V)
    logits[:, :, 29:] = -1e4  # written to behind a view
    return F.cross_entropy(flat, targets.view(-1) % 29)


def without_the_head(self, idx, targets=None):
    logits = F.linear(self.transformer.ln_f(self.trunk(self.embed(idx), targets)), self.lm_head.weight)
    return logits, self.loss(logits, targets)


ELSE, TOO = (
    "it is not the cross-entropy of what lm_head returns",
    "its forward reads the logits for something else, too",
)
KEPT = {
    "softcap of another slope": ({"loss": lambda s, z, t: F.cross_entropy(*rows(15 * torch.tanh(z / 30), t))}, ELSE),
    "tanh of tanh": ({"loss": lambda s, z, t: F.cross_entropy(*rows(z.tanh().tanh(), t))}, ELSE),
    "product": ({"loss": lambda s, z, t: F.cross_entropy(*rows(z * z, t))}, ELSE),
    "other columns": ({"loss": lambda s, z, t: F.cross_entropy(z[..., 2:].flatten(0, 1), t.flatten() % 29)}, ELSE),
    "scale": ({"loss": lambda s, z, t: F.cross_entropy(*rows(0.5 * z, t))}, ELSE),
    "transposed": ({"loss": lambda s, z, t: F.cross_entropy(z.transpose(1, 2), t)}, ELSE),
    "class weights": (
        {"loss": lambda s, z, t: F.cross_entropy(*rows(z, t), weight=torch.arange(31.0).to(z.device))},
        ELSE,
    ),
    "soft targets": ({"loss": lambda s, z, t: F.cross_entropy(z.view(-1, V), F.one_hot(t.view(-1), V).float())}, ELSE),
    "by hand": ({"loss": lambda s, z, t: -z.log_softmax(-1).gather(-1, t[..., None]).mean()}, ELSE),
    "padded vocabulary": ({"loss": padded_vocabulary}, ELSE),
    "without the head": ({"forward": without_the_head}, ELSE),
    "z-loss": ({"loss": lambda s, z, t: F.cross_entropy(*rows(z, t)) + 0.1 * z.logsumexp(-1).square().mean()}, TOO),
    "z-loss first": (
        {"loss": lambda s, z, t: 0.1 * torch.logsumexp(z, -1).mean() + F.cross_entropy(*rows(z, t))},
        ELSE,
    ),
    "confidence": (
        {"loss": lambda s, z, t: F.cross_entropy(*rows(z, t)) - 0.1 * F.softmax(z, -1).square().mean()},
        TOO,
    ),
}


def step(model, idx, targets):
    torch.manual_seed(1)
    model.zero_grad()
    outputs = model(idx, targets)
    loss = outputs[1] if isinstance(outputs, tuple) else outputs
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_trains_alike(fork, device, steps=1):
    model = fork().to(device).train()
    own = copy.deepcopy(model)
    report = patch(model, quiet=True)
    idx, targets = torch.randint(0, V, (2, 2, 16), device=device)
    for _ in range(steps):
        torch.testing.assert_close(step(model, idx, targets), step(own, idx, targets), rtol=1e-4, atol=1e-5)
    return model, report


@pytest.mark.parametrize("name", TRUNKS)
def test_the_trunk_is_the_models_own(device, name):
    fork = type("Fork", (Fork,), {"trunk": TRUNKS[name]})
    model, report = assert_trains_alike(fork, device, steps=6 if name == "counting" else 1)
    assert report.replaced["loss"] == 1 and report.replaced["attention"] == 3
    idx = torch.randint(0, V, (2, 16), device=device)
    assert model(idx, idx)[0] is None


def _head_checkpointed(self, idx, targets=None):
    x = self.transformer.ln_f(self.trunk(self.embed(idx), targets))
    return self.loss(checkpoint(self.lm_head, x, use_reentrant=True), targets)


@pytest.mark.parametrize("name", LOSSES)
def test_options_of_the_cross_entropy_are_the_models_own(device, name):
    _, report = assert_trains_alike(type("Fork", (Fork,), {"loss": LOSSES[name]}), device)
    assert report.replaced["loss"] == 1


@pytest.mark.parametrize("name", KEPT)
def test_a_loss_that_needs_its_logits_is_kept(device, name):
    changes, why = KEPT[name]
    _, report = assert_trains_alike(type("Fork", (Fork,), changes), device)
    assert report.kept["loss"] == why


def test_logits_that_no_cross_entropy_has_read_are_returned(device):
    """In train mode without targets; and where a fork reads them only now and then, which no trial shows."""

    class Penalised(Fork):
        penalty = 0.0

        def loss(self, logits, targets):
            loss = super().loss(logits, targets)
            return loss + self.penalty * logits.square().mean() if self.penalty else loss

    model = Penalised().to(device)
    own, idx = copy.deepcopy(model), torch.randint(0, V, (2, 16), device=device)
    assert "loss" in patch(model, quiet=True).replaced
    torch.testing.assert_close(model(idx)[0], own(idx)[0])
    assert model(idx, idx)[0] is None
    model.penalty = own.penalty = 0.1
    torch.testing.assert_close(model(idx, idx), own(idx, idx))
    assert isinstance(model.lm_head(torch.randn(2, C, device=device)), torch.Tensor)  # outside of the model's forward


@pytest.mark.parametrize("change", [
    lambda head: head.register_forward_hook(lambda *_: None),
    lambda head: setattr(head, "__class__", type("Head", (nn.Linear,), {})),
], ids=["watched", "of its own class"])  # fmt: skip
def test_another_head_stays(device, change):
    model = Fork().to(device)
    change(model.lm_head)
    assert "lm_head" in patch(model, quiet=True).kept["loss"]


def test_a_checkpointed_head(device):
    _, report = assert_trains_alike(type("Fork", (Fork,), {"forward": _head_checkpointed}), device)
    assert report.replaced["loss"] == 1


def test_a_hook_on_the_head_after_patch_sees_logits(device):
    model, seen, idx = Fork().to(device), [], torch.randint(0, V, (2, 16), device=device)
    patch(model, quiet=True)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert model(idx, idx)[0].shape == (2, 16, V)
    assert seen == [(2, 16, V)]


def test_frozen_parameters_and_a_frozen_head_get_no_gradient(device):
    model = Fork().to(device)
    for parameter in (model.lm_head.weight, *model.transformer.h[0].parameters()):
        parameter.requires_grad_(False)
    own, idx = copy.deepcopy(model), torch.randint(0, V, (2, 16), device=device)
    patch(model, quiet=True)
    torch.testing.assert_close(step(model, idx, idx), step(own, idx, idx), rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight.grad is None
