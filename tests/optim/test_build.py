"""Which parameters of a model decay."""

from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.model import GPT
from fastgpt.optim.build import parameter_groups

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=True)


def test_norms_and_biases_do_not_decay():
    decay, plain = parameter_groups(GPT(TINY), OptimConfig(weight_decay=0.1))
    assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decay["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert len(decay["params"]) + len(plain["params"]) == len(list(GPT(TINY).parameters()))
