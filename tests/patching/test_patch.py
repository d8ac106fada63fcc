"""What fastgpt.patch promises of any model: what it leaves alone, what it reports, what it refuses."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from bench.steps import nanogpt as nanogpt_model
from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.kernels import working_copy
from fastgpt.model import GPT
from fastgpt.patching import patch, unpatch
from fastgpt.patching.swap import is_fused

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 31}


def nanogpt():
    return nanogpt_model.GPT(nanogpt_model.GPTConfig(block_size=16, **SMALL))


def huggingface(cls=GPT2LMHeadModel):
    return cls(GPT2Config(n_positions=16, bos_token_id=0, eos_token_id=0, **SMALL))


@pytest.fixture(params=[nanogpt, huggingface], ids=["nanogpt", "huggingface"])
def model(request, device):
    return request.param().to(device)


def loss(model):
    ids = torch.arange(12, device=next(model.parameters()).device).view(1, 12)
    outputs = model(ids, ids) if isinstance(model, nanogpt_model.GPT) else model(ids, labels=ids)
    return outputs[1] if isinstance(outputs, tuple) else outputs.loss


def test_parameters_names_state_and_ties_are_the_very_same(model):
    before = dict(model.named_parameters(remove_duplicate=False))
    names, state, text = [n for n, _ in model.named_modules()], list(model.state_dict()), repr(model)
    random = torch.get_rng_state()
    patch(model, quiet=True)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert [n for n, _ in model.named_modules()] == names
    assert list(model.state_dict()) == state
    assert repr(model) == text
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.get_rng_state().equal(random)
    assert not any(is_fused(part) for part in (model.transformer.wte, model.transformer.drop))


def test_isinstance_and_class_names_stay(model):
    classes = [type(module) for module in model.modules()]
    patch(model, quiet=True)
    for module, cls in zip(model.modules(), classes):
        assert isinstance(module, cls)
        assert (type(module).__name__, type(module).__module__) == (cls.__name__, cls.__module__)


def test_it_pickles_and_copies(model):
    model.eval()
    patch(model, quiet=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [is_fused(module) for module in twin.modules()] == [is_fused(module) for module in model.modules()]
        assert loss(twin) == loss(model)
        unpatch(twin)
        assert not any(map(is_fused, twin.modules()))


def test_patching_again_takes_the_new_options(model):
    first = patch(model, quiet=True)
    classes = [type(module) for module in model.modules()]
    assert "loss" in patch(model, keep_logits=True, quiet=True).kept
    assert patch(model, quiet=True) == first
    assert [type(module) for module in model.modules()] == classes


def test_nothing_is_computed_from_working_copies(model, device):
    """Optimizers that write through param.data do not raise the version that a copy's freshness is told by."""
    patch(model, quiet=True)
    with torch.autocast(device.type, torch.bfloat16):
        before = loss(model)
        before.backward()
        for parameter in model.parameters():
            assert parameter not in working_copy._copies
            parameter.data.mul_(2.0)
        assert abs(loss(model) - before) > 1e-3


def test_functional_call_uses_the_parameters_it_is_given(model):
    patch(model, quiet=True)
    model.eval()
    other = {name: parameter * 1.5 for name, parameter in model.named_parameters()}
    ids = torch.arange(5, device=next(model.parameters()).device)[None]
    got = torch.func.functional_call(model, other, (ids,))
    model.load_state_dict(other, strict=False)
    want = model(ids)
    torch.testing.assert_close(got[0], want[0])


class TestReport:
    def test_it_says_what_was_done(self, model, capsys):
        report = patch(model)
        assert report.replaced["attention"] == 2
        assert report.replaced["layer norm"] == 5
        assert report.replaced["residual add with its norm"] == 2
        assert report.replaced["loss"] == 1
        assert report.replaced["MLP"] == 2
        printed = capsys.readouterr().out
        assert printed.strip() == str(report)
        assert "2 x attention" in printed and "logits are None" in printed

    def test_other_ranks_and_quiet_print_nothing(self, model, capsys, monkeypatch):
        patch(model, quiet=True)
        monkeypatch.setenv("RANK", "1")
        patch(model)
        assert not capsys.readouterr().out

    def test_it_says_what_computes(self, model, device, monkeypatch):
        expected = "Triton kernels" if device.type == "cuda" else "Triton's interpreter"
        assert patch(model, quiet=True).runs_in == expected
        monkeypatch.setattr("fastgpt.kernels.runtime.INTERPRET", False)
        if device.type == "cpu":
            assert patch(model, quiet=True).runs_in.startswith("PyTorch computes while the model is on cpu")

    def test_without_triton_everything_is_plain_pytorch(self, model, monkeypatch):
        monkeypatch.setattr("fastgpt.patching.find_spec", lambda name: None)
        report = patch(model, quiet=True)
        assert "triton is not installed" in report.runs_in
        assert {module.ops.name for module in model.modules() if is_fused(module)} == {"eager"}
        loss(model).backward()


@pytest.mark.parametrize("shared", ["block", "ln_1", "ln_2", "attn", "mlp"])
def test_modules_in_several_places_are_patched_once(device, shared):
    model = nanogpt().to(device)
    first, second = model.transformer.h
    if shared == "block":
        model.transformer.h[1] = first
    else:
        setattr(second, shared, getattr(first, shared))
    own = copy.deepcopy(model)
    report = patch(model, quiet=True)
    assert report.replaced["attention"] == (1 if shared in ("block", "attn") else 2) and not report.kept
    torch.testing.assert_close(loss(model), loss(own))
    unpatch(model)
    assert not any(map(is_fused, model.modules()))


def test_one_norm_in_both_places_of_a_block(device):
    model = nanogpt().to(device)
    for block in model.transformer.h:
        block.ln_2 = block.ln_1
    own = copy.deepcopy(model)
    assert patch(model, quiet=True).replaced["layer norm"] == 3
    torch.testing.assert_close(loss(model), loss(own))


@pytest.mark.parametrize("part", ["ln_1", "attn", "ln_2", "mlp"])
def test_hooks_on_parts_of_a_block_see_what_they_saw_before(model, part):
    """A patched block leaves sums and dropout to its parts: not to one that somebody watches."""
    seen = []
    ids = torch.arange(12, device=next(model.parameters()).device).view(1, 12)
    for block in model.transformer.h:
        block.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append((*args, out)))
    model.eval()(ids)
    want, seen[:] = [[t for t in tree_leaves(each) if isinstance(t, torch.Tensor)] for each in seen], []
    patch(model, quiet=True)
    model(ids)
    got = [[t for t in tree_leaves(each) if isinstance(t, torch.Tensor)] for each in seen]
    torch.testing.assert_close(got, want)


def refused(model, message):
    """patch raises one sentence with ``message`` in it, and nothing has changed."""
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=message) as error:
        patch(model)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == classes


class TestRefused:
    def test_a_model_of_another_family(self):
        refused(
            nn.Linear(2, 2),
            "model is a Linear: patch knows nanoGPT's GPT, nanochat's, and GPT2LMHeadModel and GPT2Model",
        )
        bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        refused(BertModel(bert), "model is a BertModel")

    def test_a_model_that_is_nearly_nanogpts_says_what_it_lacks(self):
        other = nanogpt()
        other.transformer.h[1].norm = other.transformer.h[1].__dict__["_modules"].pop("ln_2")
        refused(other, "patch knows nanoGPT's GPT, .*; as nanoGPT's it lacks transformer.h.1.ln_2$")

    def test_something_that_is_no_model(self):
        with pytest.raises(UserError, match="model is a str: give patch a nanoGPT GPT"):
            patch("gpt2")

    def test_our_own_model(self):
        ours = GPT(ModelConfig(block_size=8, **SMALL))
        refused(ours, "fastgpt's own GPT: it needs no patch")

    def test_another_head_names_the_part_that_can_be(self):
        other = huggingface(GPT2ForSequenceClassification)
        refused(other, "patch its body with fastgpt.patch.model.transformer.")
        patch(other.transformer, quiet=True)
        refused(nn.ModuleDict({"net": nanogpt()}), "patch its body with fastgpt.patch.model.net.")

        class Wrapper(nn.Module):
            """PEFT's pass on what they have not themselves."""

            def __init__(self):
                super().__init__()
                self.base_model = nanogpt()

            def __getattr__(self, name):
                return super().__getattr__(name) if name == "base_model" else getattr(self.base_model, name)

        refused(Wrapper(), "model is a Wrapper: patch its body with fastgpt.patch.model.base_model.")

    def test_wrapped_models(self, model):
        refused(torch.compile(model), "wrapped in OptimizedModule: patch the model itself")
        refused(nn.DataParallel(model), "wrapped in DataParallel")

    def test_a_half_patched_model(self, model):
        donor = copy.deepcopy(model)
        patch(donor, quiet=True)
        model.transformer.h[0] = donor.transformer.h[0]
        refused(model, "modules of this GPT.* are patched and the model is not: fastgpt.unpatch.model. first")
        unpatch(model)
        assert "loss" in patch(model, quiet=True).replaced

    def test_a_model_without_memory(self):
        with torch.device("meta"):
            empty = nanogpt()
        refused(empty, "on the meta device")

    def test_an_error_half_way_changes_nothing(self, model, monkeypatch):
        """Not even the earlier patch of a model that is patched again."""
        calls = []

        def fail_at_third(module, *args):
            calls.append(module)
            if len(calls) == 3:
                raise RuntimeError("boom")
            return real(module, *args)

        from fastgpt import patching

        real = patching.fuse
        for _ in range(2):
            classes, state = [type(m) for m in model.modules()], dict(vars(model))
            calls.clear()
            monkeypatch.setattr(patching, "fuse", fail_at_third)
            with pytest.raises(RuntimeError, match="boom"):
                patch(model)
            monkeypatch.setattr(patching, "fuse", real)
            assert [type(m) for m in model.modules()] == classes
            assert vars(model) == state
            patch(model, quiet=True)


def test_a_forward_that_something_has_replaced_stays(model):
    """Accelerate's hooks assign to ``module.forward``: a patched class would be ignored."""
    block = model.transformer.h[0]
    block.forward = block.forward
    report = patch(model, quiet=True)
    assert any("something has replaced its forward" in why for why in report.kept.values())
    assert not is_fused(block)


def test_gpt2_model_alone_is_unpatched(device):
    model = huggingface(GPT2Model).to(device)
    patch(model, quiet=True)
    assert is_fused(model.h[0]) and not is_fused(model)
    unpatch(model)
    assert not any(map(is_fused, model.modules()))


def test_unpatch_sees_through_wrappers(model):
    patch(model, quiet=True)
    assert unpatch(torch.compile(model)) is model
    assert not any(map(is_fused, model.modules()))


def test_unpatch_refuses_a_class_that_was_subclassed_since(model):
    patch(model, quiet=True)
    block = model.transformer.h[0]
    block.__class__ = type("FSDPBlock", (type(block),), {})  # as fully_shard does
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match="FSDPBlock was wrapped after patch"):
        unpatch(model)
    assert [type(module) for module in model.modules()] == classes


def test_environment_is_the_interpreters(device):
    assert device.type == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
