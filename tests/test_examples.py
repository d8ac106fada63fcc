"""The examples in the docstrings of the public interface run, and each public name has one."""

from __future__ import annotations

import ast
import doctest
import inspect
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import kernels

ROOT = Path(__file__).parents[1]
PUBLIC = {f"{room.__name__}.{name}": getattr(room, name) for room in (fastgpt, kernels) for name in room.__all__}
PUBLIC["fastgpt.FusedAdamW.from_optimizer"] = fastgpt.FusedAdamW.from_optimizer
del PUBLIC["fastgpt.__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    found = PUBLIC[name]
    if "transformers" in found.__doc__:
        pytest.importorskip("transformers")
    lines = doctest.DocTestParser().get_examples(inspect.getdoc(found))
    assert lines, f"the docstring of {name} has no example"
    test = doctest.DocTest(lines, vars(sys.modules[found.__module__]).copy(), name, None, None, None)
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert not failed, "what it printed is in the captured output"


@pytest.mark.parametrize("room", [fastgpt, kernels], ids=lambda room: room.__name__)
def test_type_checkers_see_every_public_name(room):
    for node in ast.parse(inspect.getsource(room)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            seen = {name.name for imported in node.body for name in imported.names}
    assert seen == set(room.__all__) - {"__version__"}


def test_the_api_page_has_every_public_name():
    """Operations come from fastgpt.kernels.__all__ by themselves."""
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    assert ".. automodule:: fastgpt.kernels\n   :members:" in page
    assert [name for name in PUBLIC if name.count(".") == 1 and f":: {name}\n" not in page] == []


@pytest.mark.parametrize("name", kernels.__all__)
def test_an_operation_says_what_it_takes_and_what_it_raises(name):
    words = inspect.getdoc(getattr(kernels, name))
    assert all(word in words for word in ("fp32", "fp16", "bf16", "Raises ValueError", " (")), words
