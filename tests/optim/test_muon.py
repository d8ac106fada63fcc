"""Muon against plain fp64, torch.optim.Muon and a model that trains; MuonAdamW's groups, clipping, skipping and states."""

import copy
import math

import pytest
import torch

from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.kernels.reference import orthogonalize, polynomials
from fastgpt.kernels.working_copy import copies_kept, existing, working_copy
from fastgpt.model import GPT
from fastgpt.optim.build import build_optimizer
from fastgpt.optim.muon import Muon, MuonAdamW

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=True)


def parameter(*shape, dtype=torch.float32, device="cpu"):
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(device, dtype))
    p.grad = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    return p


def exact(direction):
    """U V^T."""
    u, _, vt = torch.linalg.svd(direction.double(), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("coefficients", "steps", "within"), [("classic", 5, 0.35), ("polar", 5, 0.2), ("polar", 8, 1e-3)]
)
def test_singular_values_come_near_1_as_the_polynomials_say(coefficients, steps, within, dtype):
    """And singular vectors stay. In bf16 the error of an element of U^T X V is at most 0.06, and that of all together 2% of its
    norm (measured: 0.05 and 1.7%): which is far less than the polynomials themselves are off."""
    u, _ = torch.linalg.qr(torch.randn(3, 24, 24, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(3, 40, 24, dtype=torch.float64))
    values = torch.logspace(-1.5, 0, 24, dtype=torch.float64)
    wanted = values / values.norm() / (1.01 if coefficients == "polar" else 1)
    for a, b, c in polynomials(coefficients, steps):
        wanted = a * wanted + b * wanted**3 + c * wanted**5
    assert (wanted - 1).abs().max() <= within
    x = (u * values @ v.mT).to(dtype)
    error = u.mT @ orthogonalize(x, coefficients, steps).double() @ v - torch.diag(wanted)
    most = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    assert error.abs().max() <= most
    assert error.norm() <= {torch.bfloat16: 0.02}.get(dtype, most) * wanted.norm() * math.sqrt(3)


def test_the_update_is_that_of_the_equations():
    """Two steps in fp64, with eight steps of Polar Express, which are U V^T to 1e-5: packed thirds, tall, decay."""
    lr, mu, decay = 0.1, 0.9, 0.2
    packed, tall = parameter(12, 4, dtype=torch.float64), parameter(9, 4, dtype=torch.float64)
    groups = [{"params": [packed], "split": (4, 4, 4)}, {"params": [tall]}]
    muon = Muon(groups, lr, mu, weight_decay=decay, coefficients="polar", ns_steps=12)
    wanted = {p: p.detach().clone() for p in (packed, tall)}
    momentum = {p: torch.zeros_like(p) for p in (packed, tall)}
    for _ in range(2):
        for p, splits in ((packed, 3), (tall, 1)):
            p.grad = torch.randn_like(p)
            momentum[p] = mu * momentum[p] + (1 - mu) * p.grad
            ahead = (1 - mu) * p.grad + mu * momentum[p]
            update = torch.cat([exact(part) for part in ahead.chunk(splits)])
            scale = math.sqrt(max(1, len(p) / splits / p.shape[1]))
            wanted[p] = wanted[p] * (1 - lr * decay) - lr * scale * update
        muon.step()
        for p in (packed, tall):
            torch.testing.assert_close(p.detach(), wanted[p], rtol=0, atol=1e-5)


def test_cautious_decay_acts_where_update_and_weight_agree():
    one, two = parameter(6, 8), parameter(6, 8)
    two.data.copy_(one)
    two.grad.copy_(one.grad)
    before = one.detach().clone()
    Muon([one], 0.1).step()
    Muon([two], 0.1, weight_decay=0.5, cautious=True).step()
    agree = (before - one) * before >= 0
    torch.testing.assert_close((one - two).detach(), 0.05 * before * agree)


def test_normuon_gives_every_row_the_same_size_and_keeps_the_norm():
    """At the first step, where the running mean is the row's own."""
    for shape in ((6, 20), (20, 6)):
        plain, rows = parameter(*shape), parameter(*shape)
        rows.data.copy_(plain)
        rows.grad.copy_(plain.grad)
        before = plain.detach().clone()
        Muon([plain], 0.1).step()
        optimizer = Muon([rows], 0.1, normuon=True)
        optimizer.step()
        update = (before - rows).norm(dim=1)
        torch.testing.assert_close(update, update.mean().expand(len(update)))
        torch.testing.assert_close((before - rows).norm(), (before - plain).norm())
        assert optimizer.state[rows]["second_moment"].shape == (shape[0], 1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_it_is_torchs_muon(device):
    """With its iterations in bf16, as torch's are: rounded elsewhere, so 5% of the update may differ (measured: 3%)."""
    shapes = ((16, 32), (32, 16), (8, 40))  # well conditioned, as random square ones are not
    ours, theirs = ([parameter(*shape, device=device) for shape in shapes] for _ in range(2))
    for p, q in zip(ours, theirs):
        q.data.copy_(p)
    one = Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    before = [p.detach().clone() for p in ours]
    for step in range(4):
        for p, q in zip(ours, theirs):
            p.grad, q.grad = (torch.randn_like(p),) * 2
        one.step()
        other.step()
        if step == 1:  # the state goes from one to the other
            one.load_state_dict(copy.deepcopy(other.state_dict()))
    for p, q, start in zip(ours, theirs, before):
        assert (p - q).norm() <= 0.05 * (q - start).norm()


def test_a_state_that_means_something_else_is_refused(device):
    matrix = parameter(8, 8, device=device)
    others = (
        torch.optim.AdamW([matrix]),  # without a step: its groups alone tell
        torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw"),
    )
    for other in others:
        with pytest.raises(ValueError, match=r"of another optimizer, or of a torch\.optim\.Muon whose adjust_lr_fn"):
            Muon([matrix]).load_state_dict(other.state_dict())


def test_empty_groups_and_matrices_do_no_harm(device):
    matrix, flat = parameter(8, 4, device=device), torch.nn.Parameter(torch.empty(4, 0, device=device))
    before, flat.grad = matrix.detach().clone(), torch.empty(4, 0, device=device)
    Muon([{"params": []}, {"params": [matrix, flat]}]).step()
    assert (matrix - before).norm() > 0


def trained(kernels, steps=200, **options):
    """A small net that learns to reverse its input; its losses."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=16))
    optim = OptimConfig(optimizer="muon", lr=3e-3, grad_clip=0, **options)
    optimizer, losses = build_optimizer(model, optim, kernels), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        first = torch.randint(0, 16, (16, 4), generator=generator)
        both = torch.cat((first, first.flip(1)), 1)
        loss = model(both[:, :-1], both[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_200_steps_learn_what_can_be_known():
    losses = trained("eager")
    # Four of the seven targets are random: log(16) each. The other three can be known.
    assert sum(losses[-20:]) / 20 < 4 / 7 * math.log(16) + 0.35 < losses[0]


def test_a_model_is_grouped_as_the_recipe_says():
    model = GPT(TINY)
    optim = OptimConfig(optimizer="muon", lr=1e-3, embedding_lr=0.3, scalar_lr=0.04, muon_lr=0.02, weight_decay=0.1)
    optimizer = build_optimizer(model, optim, "eager")
    names = {p: name for name, p in model.named_parameters()}
    found = [({names[p].split(".", 1)[1] for p in group["params"]}, group) for group in optimizer.param_groups]
    assert [sorted(n) for n, _ in found[:3]] == [
        ["h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"],
        ["h.0.attn.c_attn.weight"],
        ["wpe.weight", "wte.weight"],
    ]
    assert [group["lr_ratio"] for _, group in found] == pytest.approx([20, 20, 300, 40])
    assert found[1][1]["split"] == (32, 32, 32)
    assert found[2][1]["weight_decay"] == 0.1 and found[3][1]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_clip_norm_and_skip_are_of_all_gradients(kernels):
    model = GPT(TINY)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", lr=1e-3, grad_clip=0.5), kernels)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    matrix = model.transformer.h[0].mlp.c_fc.weight
    grad = matrix.grad.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    torch.testing.assert_close(optimizer.state[matrix]["momentum_buffer"], 0.05 * grad * 0.5 / norm)
    before = [p.detach().clone() for p in params]
    states = [t.clone() for state in optimizer.state.values() for t in state.values()]
    matrix.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not torch.isfinite(optimizer.grad_norm)
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    assert all(torch.equal(t, s) for t, s in zip((t for st in optimizer.state.values() for t in st.values()), states))


def test_working_copies_are_written_with_their_parameters():
    """Packed with grouped heads: queries and keys are then in different batches."""
    param = parameter(24, 16)
    optimizer = Muon([{"params": [param], "split": (16, 4, 4)}], 0.1)
    with copies_kept():
        copy = working_copy(param, torch.bfloat16)
        before = copy.clone()
        optimizer.step()
        assert existing(param) is not None and existing(param).data_ptr() == copy.data_ptr()
        assert torch.equal(copy, param.bfloat16()) and not torch.equal(copy, before)
    assert copy.data_ptr() in [tensor.data_ptr() for tensor in optimizer.graph_tensors()]


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_a_state_goes_to_another_optimizer_and_no_further(kernels):
    def built(shape=TINY, optimizer="muon"):
        torch.manual_seed(0)
        model = GPT(shape)
        return model, build_optimizer(model, OptimConfig(optimizer=optimizer, muon_normuon=True), kernels)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    (one, first), (two, second) = built(), built()
    step(one, first, 1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    two.load_state_dict(one.state_dict())
    step(one, first, 2)
    step(two, second, 2)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert len(second.state) == len(list(two.parameters()))
    wrong = first.state_dict()
    wrong["state"][0] = {"momentum_buffer": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 is \(3, 3\), and must be"):
        second.load_state_dict(wrong)
    with pytest.raises(ValueError, match="load that of a MuonAdamW"):
        second.load_state_dict(built(optimizer="adamw")[1].state_dict())
    step(one, first, 3)
    step(two, second, 3)  # nothing of what was refused has been taken over
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ((8,), {}, r"shape \(8,\): Muon updates matrices, so give those of other dimensions to AdamW"),
        ((2, 3, 4), {}, r"shape \(2, 3, 4\): Muon updates matrices"),
        ((4, 4), {"lr": -1.0}, "lr is -1.0: give a number >= 0"),
        ((4, 4), {"lr": math.inf}, "lr is inf: give a number >= 0 that is finite"),
        ((4, 4), {"momentum": 1.0}, r"momentum is 1.0: it must be in \[0, 1\)"),
        ((4, 4), {"coefficients": "best"}, "coefficients is 'best': use 'classic' or 'polar'"),
        ((4, 4), {"ns_steps": 0}, "ns_steps is 0: give 1 to 100 steps"),
        ((4, 4), {"ns_steps": 2.5}, "ns_steps is 2.5: give 1 to 100 steps"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(shape, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Muon([torch.nn.Parameter(torch.zeros(shape))], **options)


def test_other_dtypes_splits_and_norms_are_refused():
    with pytest.raises(ValueError, match="bfloat16: Muon updates dense fp32 masters"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))])
    for split in ((8, -2), (2.5, 3.5), 6):
        with pytest.raises(ValueError, match="give the rows of each matrix"):
            Muon([{"params": [torch.randn(6, 3)], "split": split}])
    with pytest.raises(ValueError, match=r"split is \(2, 3\): its rows must add up to the 6"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(6, 2))], "split": (2, 3)}])
    parts = Muon([parameter(2, 2)]), torch.optim.AdamW([parameter(2)])
    with pytest.raises(ValueError, match="max_grad_norm is -1"):
        MuonAdamW(*parts, max_grad_norm=-1)


class Nanochats(torch.optim.Optimizer):
    """Groups and state as nanochat's MuonAdamW has them (July 2026); what it computes is not needed here."""

    def __init__(self, matrices, table):
        muon = {"lr": 0.02, "momentum": 0.9, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.0}
        adamw = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.01}
        groups = [
            dict(kind="adamw", params=[table], **adamw),
            *(dict(kind="muon", params=[p], **muon) for p in matrices),
        ]
        super().__init__(groups, {})
        self.state[table] = {"step": 3, "exp_avg": 0.1 * table.detach(), "exp_avg_sq": table.detach().square()}
        for p in matrices:
            rows, columns = p.shape
            second = torch.full((1, rows, 1) if rows >= columns else (1, 1, columns), 0.05, device=p.device)
            self.state[p] = {"momentum_buffer": torch.randn_like(p)[None], "second_momentum_buffer": second}
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]


def test_nanochats_optimizer_is_taken_over_with_its_state(device):
    square, wide, table = (parameter(*shape, device=device) for shape in ((24, 24), (16, 32), (64, 8)))
    old = Nanochats([square, wide], table)
    peer = torch.nn.Parameter(table.detach().clone())
    peer.grad = table.grad
    adamw = torch.optim.AdamW([peer], lr=0.05, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.01)
    adamw.state[peer] = {
        "step": torch.tensor(3.0),
        **{k: v.clone() for k, v in old.state[table].items() if k != "step"},
    }
    buffers = {p: old.state[p]["momentum_buffer"][0].clone() for p in (square, wide)}

    new = MuonAdamW.from_optimizer(old)
    assert {id(group) for group in new.param_groups} == {id(group) for group in old.param_groups}
    assert (new.state[square]["second_moment"] == 0.05).all() and "second_moment" not in new.state[wide]
    for group in old.param_groups:  # nanochat's schedule
        group["lr"] = group["initial_lr"] * 0.5
    before = {p: p.detach().clone() for p in (square, wide)}
    new.step()
    adamw.step()
    torch.testing.assert_close(table, peer)
    for p, buffer in buffers.items():
        momentum = buffer.lerp(p.grad, 0.1)
        torch.testing.assert_close(new.state[p]["momentum_buffer"], momentum)
        moved, wanted = (before[p] - p.detach()).double(), 0.01 * exact(p.grad.lerp(momentum, 0.9))
        assert torch.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.95
        assert 0.85 < moved.norm() / wanted.norm() < 1.15


def test_another_optimizer_is_no_nanochats():
    with pytest.raises(TypeError, match=r"optimizer is a SGD: from_optimizer takes over nanochat's MuonAdamW"):
        MuonAdamW.from_optimizer(torch.optim.SGD([parameter(4, 4)]))
