"""Tests run the same on a CPU (Triton's interpreter) and on a GPU: ``pytest tests --device cuda``."""

from __future__ import annotations

import os
from collections import Counter

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the kernels run")
    parser.addoption(
        "--adversary", action="store_true", help="all tests with a GPU's errors and garbage (adversary.py)"
    )
    parser.addoption("--shard", metavar="I/N", help="only the tests of process I of N (counted from 0): see bench.gpu")


def pytest_configure(config):
    # Before any test module imports triton.
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    # Inductor's cached graphs outlive a change of an op's arguments.
    os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    config.addinivalue_line("markers", "adversarial: runs a second time, under adversary.py")
    import torch

    torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    twice = metafunc.config.getoption("--device") == "cpu" and not metafunc.config.getoption("--adversary")
    if twice and metafunc.definition.get_closest_marker("adversarial"):
        metafunc.parametrize("_arithmetic", ["exact", "adverse"], indirect=True)


@pytest.fixture(autouse=True)
def _arithmetic(request):
    """What the interpreter computes with: NumPy's functions, or a GPU's."""
    if getattr(request, "param", "exact") == "exact" and not request.config.getoption("--adversary"):
        yield
        return
    from tests.adversary import adversary

    with adversary():
        yield


LONG = ("test_compile_gate.py", "test_training_parity.py", "test_loop.py", "test_docs.py", "test_distributed.py")


def pytest_collection_modifyitems(config, items):
    """The long files first: begun last, one would leave the other workers with nothing to do for minutes."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if config.getoption("--shard"):
        index, count = map(int, config.getoption("--shard").split("/"))
        items[:] = shard(items, index, count)
        print(f"\n[shard: {len(items)} tests]")


def shard(items, index, count):
    """Every ``count``-th test of an order in which each function comes once before any comes with a second parameter. Tests
    that need gigabytes (``xdist_group``) all belong to shard 0, at its end, so that no two run at once."""
    large = [item for item in items if item.get_closest_marker("xdist_group")]
    seen, order = Counter(), []
    for item in items:
        function = item.nodeid.split("[")[0]
        order.append((seen[function], len(order), item))
        seen[function] += 1
    small = [item for _, _, item in sorted(order, key=lambda one: one[:2]) if item not in large]
    return small[index::count] + (large if index == 0 else [])


def pytest_exception_interact(node, call, report):
    """A kernel that has read or written out of bounds takes the CUDA context with it: all that follows would fail, too."""
    if any(
        words in str(call.excinfo.value)
        for words in ("illegal memory access", "device-side assert", "misaligned address")
    ):
        node.session.shouldstop = f"the GPU's context is lost since {node.nodeid}"


@pytest.fixture(scope="session")
def device(request):
    import torch

    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def needs_memory(device):
    """``needs_memory(bytes)`` skips a test on a GPU that has no room for them and 1 GiB of whatever else. On a CPU the large
    tensors are pages that nobody touches, and take none."""
    import torch

    def check(count):
        if device.type != "cuda":
            return
        torch.cuda.empty_cache()  # what earlier tests have let go of counts as free
        if torch.cuda.mem_get_info(device)[0] < count + 2**30:
            pytest.skip(f"needs {(count + 2**30) / 2**30:.1f} GiB of free GPU memory")

    return check


@pytest.fixture
def needs_fp8(device):
    """Skips a test on a GPU whose tensor cores have no fp8, for which Triton compiles no such kernel."""
    from fastgpt.kernels.fp8 import launch

    if reason := launch.refusal(device):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(1234)
