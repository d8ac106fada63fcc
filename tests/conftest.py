"""Tests run the same on a CPU (Triton's interpreter) and on a GPU: ``pytest tests --device cuda``."""

import os

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the kernels run")


def pytest_configure(config):
    # Before any test module imports triton.
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device(request):
    import torch

    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(1234)
