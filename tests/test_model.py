"""The GPT: what it counts, what it computes (against Hugging Face's), and how it generates. Every test that computes runs
with both tables of operations."""

import pytest
import torch

from bench.parity import assert_parity
from fastgpt import ops
from fastgpt.config import ModelConfig, load_preset
from fastgpt.decoding import sample
from fastgpt.model import GPT

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)


@pytest.fixture(params=["eager", "triton"])
def table(request):
    return ops.get(request.param)


def tokens(device, B=2, T=16, vocab=64):
    return torch.randint(0, vocab, (B, T), device=device)


@pytest.mark.parametrize(("preset", "millions"), [("gpt2-40m", 40.56), ("gpt2-124m", 123.59), ("gpt2-350m", 353.55)])
def test_parameter_counts_are_gpt2s(preset, millions):
    with torch.device("meta"):
        model = GPT(load_preset(preset).model)
    without_positions = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    assert round(without_positions / 1e6, 2) == millions


def test_scaled_initialisation():
    model = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=1024, block_size=64, bias=True))
    block = model.transformer.h[3]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.attn.c_attn.bias.any()


def test_state_dict_is_fp32_masters_and_the_head_is_tied(table):
    model = GPT(TINY, table)
    state = model.state_dict()
    assert all(value.dtype == torch.float32 for value in state.values())
    assert model.head is model.transformer.wte.weight
    assert not any("head" in name for name in state)


@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_gets_a_gradient(table, device, bias):
    # bug 26: parameters that never train.
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=bias)
    model = GPT(config, table).to(device)
    x = tokens(device)
    model(x, x.roll(-1, 1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_later_token_never_changes_an_earlier_logit(table, device):
    model = GPT(TINY, table).to(device).eval()
    x = tokens(device)
    changed = x.clone()
    changed[:, 9] = (x[:, 9] + 1) % 64
    a, b = model(x)[0], model(changed)[0]
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


def test_eval_mode_turns_dropout_off(table, device):
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, dropout=0.5)
    model = GPT(config, table).to(device)
    x = tokens(device)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    plain = GPT(TINY.__class__(**{**vars(config), "dropout": 0.0}), table).to(device)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], plain(x)[0])


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_compiles_without_a_graph_break_and_computes_the_same(table, device, precision):
    model = GPT(TINY, table).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = tokens(device)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            loss = run(x, x.roll(-1, 1))[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-7)


def test_a_step_survives_activation_checkpointing_with_dropout(table, device):
    """Recomputed dropout repeats its mask, so gradients are those of the plain run."""
    from torch.utils.checkpoint import checkpoint

    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, dropout=0.3)
    model = GPT(config, table).to(device)
    x = tokens(device)
    gradients = []
    for run in (model, lambda *args: checkpoint(model, *args, use_reentrant=False)):
        torch.manual_seed(5)
        model.zero_grad()
        run(x, x.roll(-1, 1))[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_too_long_a_sequence_is_refused(table, device):
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        GPT(TINY, table).to(device)(tokens(device, T=17))


@pytest.mark.parametrize("prompt", [1, 5, 16, 20])
def test_cached_generation_equals_encoding_everything_again(table, device, prompt):
    # Greedy, through and past block_size, where learned positions shift.
    model = GPT(TINY, table).to(device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # logits far enough apart that rounding cannot change the argmax
    x = tokens(device, T=prompt)
    got = torch.cat([x, *model.generate(x, 8, temperature=0)], 1)
    expected = x
    for _ in range(8):
        logits = model(expected[:, -16:])[0]
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, expected)


def test_sampling_stays_inside_top_k_and_the_real_vocabulary(device):
    model = GPT(TINY).to(device).eval()
    x = tokens(device, B=1, T=4)
    new = torch.cat(list(model.generate(x, 40, vocab_size=5)), 1)
    assert new.max() < 5
    greedy = torch.cat(list(model.generate(x, 10, temperature=0)), 1)
    top1 = torch.cat(list(model.generate(x, 10, top_k=1)), 1)
    assert torch.equal(greedy, top1)
    nucleus = torch.cat(list(model.generate(x, 10, top_p=1e-9)), 1)  # the likeliest token reaches it alone
    assert torch.equal(greedy, nucleus)


def test_top_p_keeps_the_fewest_tokens_that_reach_it(device):
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]], device=device)
    drawn = {
        p: {int(sample(probabilities.log(), 1.0, None, p, None)) for _ in range(200)} for p in (0.3, 0.5, 0.75, 1.0)
    }
    assert drawn == {0.3: {1}, 0.5: {1, 2}, 0.75: {1, 2, 3}, 1.0: {0, 1, 2, 3}}


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-300, None), (1e-40, None), (1.0, 1e-300), (1e-300, 1e-300)])
def test_what_fp32_cannot_tell_from_zero_samples_the_likeliest(device, temperature, top_p):
    logits = torch.tensor([[1.0, 60.0, 59.0, -3.0]], device=device)
    assert [sample(logits, temperature, k, top_p, None).tolist() for k in (None, 3)] == [[[1]]] * 2


def hugging_face(config: ModelConfig, device, dtype):
    """A GPT2LMHeadModel with random weights, and the same weights under this model's names."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            vocab_size=config.vocab_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    theirs = theirs.to(device, dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return theirs


def our_names(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face keeps linear weights as (in, out); the head is tied in both."""
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {
        name: value.T.contiguous() if name.endswith(transposed) else value
        for name, value in named.items()
        if name != "lm_head.weight"
    }


def test_logits_loss_and_gradients_equal_hugging_faces(table, device):
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=96, bias=True)
    theirs64 = hugging_face(config, device, torch.float64)
    theirs = hugging_face(config, device, torch.float32)
    theirs.load_state_dict({name: value.float() for name, value in theirs64.state_dict().items()})
    theirs64.load_state_dict({name: value.double() for name, value in theirs.state_dict().items()})
    ours = GPT(config, table).to(device)
    ours.load_state_dict(our_names(theirs.state_dict()))

    x = tokens(device, T=32, vocab=96)
    y = x.roll(-1, 1)
    results = {}
    for name, model in (("fp64", theirs64), ("theirs", theirs)):
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 96), y.reshape(-1))
        loss.backward()
        gradients = our_names({key: p.grad for key, p in model.named_parameters()})
        results[name] = {"logits": logits, "loss": loss, **gradients}
    loss = ours(x, y)[1]
    loss.backward()
    mine = {"logits": ours(x)[0], "loss": loss, **{name: p.grad for name, p in ours.named_parameters()}}
    assert mine.keys() == results["fp64"].keys()
    for name, value in mine.items():
        assert_parity(name, value, results["fp64"][name], results["theirs"][name])


def test_with_document_ids_another_document_never_shows(table, device):  # bug 9
    model = GPT(TINY, table).to(device).eval()
    x = tokens(device, B=2, T=16)
    doc_ids = (torch.arange(16, device=device) >= 7).int().expand(2, 16)
    other = x.clone()
    other[:, :7] = (other[:, :7] + 1) % TINY.vocab_size
    a, b = (model(ids, doc_ids=doc_ids)[0][:, 7:] for ids in (x, other))
    assert torch.equal(a, b)
    assert not torch.equal(*(model(ids)[0][:, 7:] for ids in (x, other)))
