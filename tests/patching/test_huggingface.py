"""fastgpt.patch on transformers' GPT-2, in parity with the unpatched model. Passes from transformers 4.45 on."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model

from fastgpt.patching import patch, unpatch
from tests.patching.parity import assert_same, labelled, measure, tokens
from tests.patching.parity import make_huggingface as make

MAJOR, MINOR = map(int, transformers.__version__.split(".")[:2])
needs_loss_function = pytest.mark.skipif(
    (MAJOR, MINOR) < (4, 46), reason="transformers 4.45 has neither loss_function nor num_items_in_batch"
)


def same(model, call, **options):
    """The outputs of ``call`` are those of the unpatched model. Returns the report."""
    want = call(model)
    report = patch(model, quiet=True, **options)
    torch.testing.assert_close(call(model), want)
    return report


class TestParity:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("B, T, heads", [(2, 17, 2), (1, 2, 3), (2, 32, 1)])
    def test_logits_loss_and_every_gradient(self, device, train, B, T, heads):
        ids = tokens(device, B, T + 1 if T == 2 else T)
        assert_same(make(device, n_head=heads), labelled(ids), train)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast(self, device, dtype):
        assert_same(make(device, n_layer=1), labelled(tokens(device)), train=True, autocast=dtype)

    def test_with_keep_logits(self, device):
        assert_same(make(device, n_layer=1), labelled(tokens(device)), train=True, keep_logits=True)

    def test_without_a_cache(self, device):
        assert_same(make(device, n_layer=1), labelled(tokens(device), use_cache=False), train=True)

    def test_with_an_erf_gelu(self, device):
        assert_same(make(device, activation_function="gelu", n_layer=1), labelled(tokens(device)), train=True)

    def test_with_another_epsilon_and_inner_width(self, device):
        assert_same(make(device, layer_norm_epsilon=1e-2, n_inner=40, n_layer=1), labelled(tokens(device)), train=True)

    def test_with_scores_scaled_by_layer(self, device):
        changes = {"scale_attn_by_inverse_layer_idx": True}
        assert_same(make(device, **changes), labelled(tokens(device)), train=True)

    def test_gpt2_model_alone(self, device):
        ids = tokens(device)
        report = same(make(device, GPT2Model).eval(), lambda model: model(ids).last_hidden_state)
        assert report.kept["loss"] == "a GPT2Model has none"

    @needs_loss_function
    @pytest.mark.parametrize("num", [7, torch.tensor(7)], ids=["int", "tensor"])
    def test_num_items_in_batch_divides_the_sum(self, device, num):
        assert_same(make(device, n_layer=1), labelled(tokens(device), num_items_in_batch=num), train=True)

    def test_in_bf16(self, device):
        model, ids = make(device).to(torch.bfloat16), tokens(device)
        patch(model, quiet=True)
        model(ids, labels=ids).loss.backward()
        assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


class TestMasks:
    """A mask that hides anything takes the model's own attention: results are the same at every position."""

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, device, side):
        ids = tokens(device)
        mask = torch.ones_like(ids)
        mask[1, slice(0, 5) if side == "left" else slice(-5, None)] = 0
        model, call = make(device, n_layer=1), labelled(ids, attention_mask=mask)
        want = measure(model, call)  # not in fp64 as well: transformers 4.45 cannot mask in it
        patch(model, keep_logits=True, quiet=True)
        torch.testing.assert_close(measure(model, call), want)
        patch(model, quiet=True)
        del want["logits"]
        torch.testing.assert_close(measure(model, call), want)

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("mask", [True, False], ids=["mask of ones", "no mask"])
    def test_nothing_hidden_is_fused(self, device, monkeypatch, mask, use_cache):
        model, ids = make(device, n_layer=1), tokens(device)
        patch(model, quiet=True)
        if (4, 53) <= (MAJOR, MINOR) < (5, 0) and not use_cache and not mask:
            pytest.skip("this transformers hands each block a mask that hides the future only; the report says so")
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)
        options = {"attention_mask": torch.ones_like(ids)} if mask else {}
        model(ids, labels=ids, use_cache=use_cache, **options).loss.backward()

    def test_packed_positions(self, device):
        ids = tokens(device, B=1, T=12)
        positions = torch.cat((torch.arange(5), torch.arange(7)))[None].to(device)
        same(make(device).eval(), lambda model: model(ids, position_ids=positions, use_cache=False).logits)

    @pytest.mark.skipif(MAJOR >= 5, reason="transformers 5 has no head_mask")
    def test_head_masks(self, device):
        mask, ids = torch.tensor([1.0, 0.0], device=device), tokens(device)
        same(make(device).eval(), lambda model: model(ids, head_mask=mask).logits)


class TestOtherCalls:
    def test_output_attentions(self, device):
        model, ids = make(device, implementation="eager").eval(), tokens(device)
        report = same(model, lambda model: model(ids, output_attentions=True).attentions)
        assert report.kept["attention"].startswith("attn_implementation is 'eager'")
        assert report.replaced["residual add with its norm"] == 2

    def test_output_hidden_states(self, device):
        ids = tokens(device)
        same(make(device).eval(), lambda model: model(ids, output_hidden_states=True).hidden_states)

    def test_output_hidden_states_with_the_fused_loss(self, device):
        model, ids = make(device), tokens(device)
        patch(model, quiet=True)
        assert len(model(ids, labels=ids, output_hidden_states=True).hidden_states) == 3

    def test_cross_attention(self, device):
        model, ids = make(device, add_cross_attention=True).eval(), tokens(device)
        encoded = torch.randn(2, 5, 24, device=device)
        report = same(model, lambda model: model(ids, encoder_hidden_states=encoded, use_cache=False).logits)
        assert "crossattention" in report.kept["residual add with its norm"]

    def test_inputs_embeds(self, device):
        model, ids = make(device).eval(), tokens(device)
        same(model, lambda model: model(inputs_embeds=model.transformer.wte(ids)).logits)

    def test_return_dict_false_gives_the_models_own_tuple(self, device):
        model, ids = make(device), tokens(device)
        same(model, lambda model: [t.detach() for t in model(ids, labels=ids, return_dict=False)[:2]])

    def test_the_cache_of_a_training_step_holds_keys_and_values(self, device):
        model, ids = make(device), tokens(device)

        def cached(model):
            cache = model(ids, labels=ids).past_key_values
            if hasattr(cache, "layers"):
                return [(layer.keys, layer.values) for layer in cache.layers]
            return [(cache[i][0], cache[i][1]) for i in range(2)]

        same(model, cached)

    @needs_loss_function
    def test_another_loss_function(self, device):
        model, ids = make(device), tokens(device)
        model.loss_function = lambda logits, labels, **_: logits.square().mean()
        report = same(model, lambda model: model(ids, labels=ids).loss)
        assert report.kept["loss"] == "it is not the cross-entropy of what lm_head returns"

    @needs_loss_function
    def test_a_loss_function_set_after_patch(self, device):
        model, ids = make(device), tokens(device)
        patch(model, quiet=True)
        model.loss_function = lambda logits, labels, **_: 3 * logits.sum() * 0 + 3
        assert model(ids, labels=ids).loss.item() == 3

    def test_what_a_subclass_does_with_the_loss_is_done(self, device):
        class Doubled(GPT2LMHeadModel):
            def forward(self, *args, **kwargs):
                outputs = super().forward(*args, **kwargs)
                outputs.loss = outputs.loss * 2
                return outputs

        model, ids = make(device, Doubled), tokens(device)
        report = same(model, lambda model: model(ids, labels=ids).loss)
        assert report.replaced["loss"] == 1

    def test_an_unknown_activation_stays(self, device):
        ids = tokens(device)
        report = same(make(device, activation_function="relu").eval(), lambda model: model(ids).logits)
        assert "not a GELU" in report.kept["MLP"]


class TestGenerate:
    def test_a_decoding_step_sees_what_is_in_the_cache(self, device):
        """By its logits: greedy tokens of a small random model hardly depend on what came before."""
        model, ids = make(device).eval(), tokens(device)

        def call(model):
            cache = model(ids[:, :-2], use_cache=True).past_key_values
            return model(ids[:, -2:], past_key_values=cache).logits

        same(model, call)

    def test_an_argument_that_is_not_known_takes_the_models_own_attention(self, device):
        """transformers 5.24 renamed past_key_values to cache: whatever is renamed next must not be overlooked."""
        model = make(device)
        patch(model, quiet=True)
        attention, known = model.transformer.h[0].attn, {"hidden_states": torch.randn(2, 3, 24, device=device)}
        assert attention.fusable({**known, "use_cache": True, "renamed_cache": None})
        assert not attention.fusable({**known, "renamed_cache": object()})

    @pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
    def test_greedy_tokens_are_the_same(self, device, use_cache):
        model, prompt = make(device).eval(), tokens(device, T=4)
        options = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        mask[1, :2] = 0  # padded on the left, as a batch of prompts is
        same(model, lambda model: model.generate(prompt, attention_mask=mask, **options))
        same(unpatch(model), lambda model: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))

    def test_beams(self, device):
        model, prompt = make(device).eval(), tokens(device, T=4)
        options = {"max_new_tokens": 4, "num_beams": 2, "pad_token_id": 0}
        same(model, lambda model: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))

    def test_tokens_are_sampled_alike_from_one_seed(self, device):
        model, prompt = make(device).eval(), tokens(device, T=4)

        def call(model):
            torch.manual_seed(3)
            mask = torch.ones_like(prompt)
            return model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=True, pad_token_id=0)

        same(model, call)


class TestTraining:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_repeats_dropout(self, device, reentrant):
        model, ids = make(device, dropout=0.2, n_layer=1), tokens(device)
        patch(model, quiet=True)

        def gradients():
            torch.manual_seed(5)
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        want = gradients()
        calls = []
        model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *_: calls.append(1))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for got, expected in zip(gradients(), want):
            torch.testing.assert_close(got, expected)
        assert len(calls) == 2  # it was recomputed

    def test_compiled(self, device):
        model, ids = make(device, n_layer=1), tokens(device)
        patch(model, quiet=True)
        want = model(ids, labels=ids, use_cache=False).loss
        torch._dynamo.reset()
        loss = torch.compile(model, backend="aot_eager")(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.testing.assert_close(loss, want)
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_dropout_is_on_in_training_only(self, device):
        model, ids = make(device, dropout=0.2), tokens(device)
        patch(model, quiet=True)
        assert model(ids, labels=ids).loss != model(ids, labels=ids).loss
        model.eval()
        assert model(ids, labels=ids).loss == model(ids, labels=ids).loss

    def test_residual_dropout_has_its_mean_and_spread_with_and_without_a_mask(self, device):
        model = make(device, dropout=0.25, n_layer=1)
        patch(model, quiet=True)
        block = model.transformer.h[0]
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.zero_()
            block.attn.c_proj.bias.fill_(1.0)
        x = torch.zeros(4, 32, 24, device=device)
        causal = torch.ones(4, 1, 32, 32, dtype=torch.bool, device=device).tril()
        for mask in (None, causal):
            out = block(x, attention_mask=mask)
            out = out[0] if isinstance(out, tuple) else out
            torch.testing.assert_close(out.unique().tolist(), [0.0, 1 / 0.75])
            assert abs((out != 0).float().mean().item() - 0.75) < 4 * (0.75 * 0.25 / out.numel()) ** 0.5


def test_saved_and_loaded_as_if_never_patched(device, tmp_path):
    model, ids = make(device).eval(), tokens(device)
    patch(model, quiet=True)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).to(device).eval()
    assert type(loaded) is GPT2LMHeadModel
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_weights_loaded_after_patch(device):
    source, model, ids = make(device).eval(), make(device).eval(), tokens(device)
    patch(model, quiet=True)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(ids).logits, source(ids).logits)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_lora_like_replacements_after_patch_are_called(device):
    model, ids = make(device).eval(), tokens(device)
    patch(model, quiet=True)
    before = model(ids).logits

    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    for block in model.transformer.h:
        block.attn.c_attn, block.mlp.c_fc = Adapter(block.attn.c_attn), Adapter(block.mlp.c_fc)
    patched = model(ids).logits
    assert not torch.allclose(patched, before)
    torch.testing.assert_close(patched, unpatch(model)(ids).logits)


def test_a_copy_is_patched_and_independent(device):
    model, ids = make(device), tokens(device)
    patch(model, quiet=True)
    twin = copy.deepcopy(model)
    unpatch(model)
    assert twin(ids, labels=ids).logits is None
    assert model(ids, labels=ids).logits is not None
