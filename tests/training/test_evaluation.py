"""HellaSwag scoring: against a count by hand, on files as people have them, and bad ones."""

from __future__ import annotations

import json

import pytest
import torch

from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.data.tokenizer import get_tokenizer
from fastgpt.model import GPT
from fastgpt.training.evaluation import HellaSwagExample as Example
from fastgpt.training.evaluation import hellaswag_score, load_hellaswag

EXAMPLES = [
    Example("A man sits", ("on a chair.", "under the sea.", "x", "and flies"), 0),
    Example("She opens the", ("door", "a", "sky and then the sea", "book."), 3),
    Example("Water", ("boils", "is wet and cold", "burns", "sings"), 1),
]


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=24, vocab_size=256)).to(device).eval()


def by_hand(model, tokenizer, example, device):
    """Summed and mean loss of each ending, one sequence at a time, no padding."""
    sums, means = [], []
    for ending in example.endings:
        context, added = tokenizer.encode(example.context), tokenizer.encode(" " + ending)
        ids = torch.tensor([(context + added)[-25:]], device=device)
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0][0].float(), ids[0, 1:], reduction="none")
        sums.append(losses[-len(added) :].sum().item())
        means.append(losses[-len(added) :].mean().item())
    return sums.index(min(sums)), means.index(min(means))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_scores_equal_a_count_by_hand(model, device, batch):
    tokenizer = get_tokenizer("bytes")
    answers = [by_hand(model, tokenizer, example, device) for example in EXAMPLES]
    examples = [e._replace(label=answers[i][i % 2]) for i, e in enumerate(EXAMPLES)]
    expected = [sum(a[k] == e.label for a, e in zip(answers, examples)) / 3 for k in (0, 1)]
    score = hellaswag_score(model, tokenizer, examples, device, batch)
    assert (score.acc, score.acc_norm, score.examples) == (*expected, 3)


def rows():
    return [{"ctx": e.context, "endings": list(e.endings), "label": str(e.label), "ind": 7} for e in EXAMPLES]


def test_jsonl_and_parquet_files_are_read_and_unlabelled_rows_left_out(tmp_path):
    from pyarrow import Table, parquet

    unlabelled = {**rows()[0], "label": ""}
    (tmp_path / "val.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows(), unlabelled]) + "\n")
    parquet.write_table(Table.from_pylist(rows()), tmp_path / "val.parquet")
    assert load_hellaswag(str(tmp_path / "val.jsonl")) == EXAMPLES == load_hellaswag(str(tmp_path / "val.parquet"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{not json", "cannot be read"),
        ('{"text": "a"}', "columns ctx, endings and label"),
        ("", "holds no example"),
        ("[" * 100_000, "cannot be read"),
        ('{"ctx": "", "endings": ["a", "b"], "label": 0}', "row 1, has no context"),
        ('{"ctx": null, "endings": ["a", "b"], "label": 0}', "row 1, has no context: ctx is None"),
        ('{"ctx": "a", "endings": [], "label": 0}', "row 1, has no two endings"),
        ('{"ctx": "a", "endings": "ab", "label": 0}', "row 1, has no two endings"),
        ('{"ctx": "a", "endings": ["a", ""], "label": 0}', "row 1, has no two endings"),
        ('\n{"ctx": "a", "endings": ["a", "b"], "label": 9}', "row 1, has label 9: of 2 endings the last is 1"),
        ('{"ctx": "a", "endings": ["a", "b"], "label": -1}', "row 1, has label -1"),
        ('{"ctx": "a", "endings": ["a", "b"], "label": 0.5}', "row 1, has label 0.5"),
        ('["ctx"]', "columns ctx, endings and label"),
    ],
)
def test_bad_files_end_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "val.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        load_hellaswag(str(path))
    assert "\n" not in str(error.value) and "val.jsonl" in str(error.value)
