"""Who runs the matmuls of the linear layers, and in which tiles: cuBLAS until measured, tables, defaults, ways to split."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch

from fastgpt.kernels import matmul as launch
from fastgpt.kernels import runtime, tuning
from fastgpt.kernels.operators import launches
from tests.kernels import test_tuning

KEY = tuning.Key("linear", "-", "-")


@pytest.fixture
def compiled_for_a_gpu(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)


@pytest.fixture
def tables(tmp_path, monkeypatch, compiled_for_a_gpu):
    """On an RTX 4070 with no table but those that a test writes: ``write(kind, config, origin)``."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "target", lambda device: test_tuning.RTX_4070)
    tuning.forget()

    def write(kernel, config, origin, dtype="fp16", **options):
        key = tuning.Key(kernel, dtype, "N3072 K768")
        test_tuning.write(tmp_path, config, origin=origin, key=key, **options)
        tuning.forget()

    yield write
    tuning.forget()


TILES = {"block_m": 128, "block_n": 128, "block_k": 32, "group": 8, "num_warps": 4, "num_stages": 3}
CPU = torch.device("cpu")


def of_mlp(kind, fp16=False, tokens=8192, **options):
    """Of the MLP's first matrix (3072, 768)."""
    sizes = (3072, 768, tokens) if kind.startswith("weight_grad") else (tokens, 3072, 768)
    return launch.choose(kind, *sizes, torch.float16, CPU, fp16, **options)


@pytest.mark.parametrize("kind", launch.LINEAR_KINDS)
def test_without_a_table_matmuls_are_cublas_unless_they_accumulate_in_fp16(kind, tables):
    assert of_mlp(kind).config == tuning.CUBLAS
    fast = of_mlp(kind, True)
    assert fast.source == "default" and fast.config["chunk"] >= 1


def test_a_ranked_entry_takes_no_matmul_from_cublas_a_measured_one_does(tables):
    tables("linear.gelu", TILES, "ranked")
    assert of_mlp("gelu").config == tuning.CUBLAS and of_mlp("gelu").source == "default: never measured"
    tables("linear.gelu", TILES, "measured")
    assert of_mlp("gelu").config == TILES and of_mlp("gelu").source.startswith("measured")
    assert of_mlp("dgelu").config == tuning.CUBLAS, "of another epilogue nothing is known"


def test_a_measurement_on_a_card_of_other_size_takes_no_matmul_from_cublas(tables):
    tables("linear.gelu", TILES, "measured", sms=60)
    assert of_mlp("gelu").config == tuning.CUBLAS


def test_a_measurement_that_cublas_won_says_so(tables):
    tables("linear.gelu", tuning.CUBLAS, "measured", shared=0)
    assert of_mlp("gelu").config == tuning.CUBLAS and of_mlp("gelu").source.startswith("measured")


def test_sums_in_fp16_take_the_ranked_tiles_of_the_nearest_card(tables):
    tables("linear_fast.gelu", {**TILES, "chunk": 4}, "ranked", sms=60)
    assert of_mlp("gelu", True).config == {**TILES, "chunk": 4}


@pytest.mark.parametrize("options", [{"tokens": 1024}, {"wide": False}, {"usual": False}], ids=str)
def test_tables_serve_what_they_were_made_for_only(tables, options):
    tables("linear.gelu", TILES, "measured")
    assert of_mlp("gelu", **options).config == tuning.CUBLAS


@pytest.mark.parametrize(
    "kernel, chunk, fits",
    [("linear_fast.gelu", 4, True), ("linear_fast.gelu", 8, False), ("linear_fast.weight_grad", 2, True),
     ("linear_fast.weight_grad", 4, False)],
)  # fmt: skip
def test_a_table_with_longer_sums_in_fp16_than_the_error_allows_is_foreign(tables, kernel, chunk, fits):
    splits = {"splits": 2} if "grad" in kernel else {}
    tables(kernel, {**TILES, "chunk": chunk, **splits}, "ranked")
    kind = kernel.split(".")[1]
    if fits:
        assert of_mlp(kind, True).config["chunk"] == chunk
    else:
        with pytest.warns(UserWarning, match="is not one that this version knows"):
            assert of_mlp(kind, True).source == "default"


def test_a_config_that_does_not_fit_gives_the_matmul_back_to_cublas(tables, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def full(*_, **__):
        raise OutOfResources(200_000, 101_376, "shared memory")

    tables("linear.gelu", TILES, "measured")
    monkeypatch.setattr(launch, "linear_kernel", defaultdict(lambda: full))  # kernel[grid](...)
    x, weight = torch.ones(2048, 768, dtype=torch.float16), torch.ones(3072, 768, dtype=torch.float16) / 768
    with pytest.warns(UserWarning, match="does not fit this GPU"):
        out, _ = launches(launch.matmul_gelu)(x, weight.t(), None, "gelu", False, False)
    assert torch.allclose(out.float(), torch.nn.functional.gelu(torch.ones(())), atol=0.02)
    assert of_mlp("gelu").config == tuning.CUBLAS


@pytest.mark.parametrize("kind", ["gelu", "dgelu", "none", "weight_grad"])
def test_tables_are_asked_about_the_layouts_of_a_linear_only(device, tables, kind, monkeypatch):
    asked = []

    def choose(kind, *_, usual, **__):
        asked.append(usual)
        return tuning.Choice(KEY, tuning.CUBLAS, tuning.CUBLAS, "default", torch.device("cpu"))

    monkeypatch.setattr(launch, "choose", choose)
    x, weight, dz = (torch.ones(*size, device=device) for size in ((64, 32), (48, 32), (64, 48)))
    if kind == "weight_grad":
        launch.weight_grad(dz, x, torch.empty_like(weight), None, False)
        launch.weight_grad(dz, x, torch.empty_like(weight.t().contiguous()).t(), None, False)
    elif kind == "dgelu":
        launch.matmul_dgelu(dz, weight, x, "gelu", False)
        launch.matmul_dgelu(dz, weight.t().contiguous().t(), x, "gelu", False)
    elif kind == "gelu":
        launch.matmul_gelu(x, weight.t(), None, "gelu", False, False)
        launch.matmul_gelu(x, weight.t().contiguous(), None, "gelu", False, False)
        launch.matmul_gelu(x, weight.t(), None, "gelu_erf", False, False)
    else:
        launch.matmul(x, weight.t(), None, None, None, 0.0, False)
        launch.matmul(x.t().contiguous().t(), weight.t(), None, None, None, 0.0, False)
    assert asked == [True] + [False] * (len(asked) - 1) and len(asked) >= 2


@pytest.mark.parametrize("M, N, ways", [(768, 768, 5), (2304, 768, 2), (3072, 768, 2), (384, 384, 5), (50304, 768, 1)])
def test_a_weight_gradient_is_split_where_its_tiles_leave_sms_idle(M, N, ways, compiled_for_a_gpu):
    assert launch.default_tiles("weight_grad", M, N, 8192, torch.bfloat16, sms=46)["splits"] == ways


@pytest.mark.parametrize("K, ways", [(0, 1), (1, 1), (1000, 1), (1024, 2), (4096, 8)])
def test_few_tokens_are_not_split(K, ways):
    assert launch.splits(1024, 256, K, 128, 128, sms=46) == ways


@pytest.mark.parametrize("kind", launch.LINEAR_KINDS)
@pytest.mark.parametrize("interpreted", [False, True])
def test_fp16_sums_are_of_64_products_where_no_table_says_otherwise(kind, interpreted, compiled_for_a_gpu, monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", interpreted)
    for wide in (True, False):
        found = launch.default_tiles(kind, 8192, 3072, 768, torch.float16, True, wide=wide)
        assert found["chunk"] * found["block_k"] == 64
    assert "chunk" not in launch.default_tiles(kind, 8192, 3072, 768, torch.float16)


@pytest.mark.parametrize("rows, columns, wide", [(32, 48, True), (33, 48, True), (32, 40, False), (48, 1, False)])
def test_what_can_be_read_128_bits_at_a_time(device, rows, columns, wide):
    buffer = torch.empty(rows + 1, columns, device=device, dtype=torch.bfloat16)
    assert launch._wide(buffer[1:]) == wide
    assert launch._wide(buffer[1:].t()) == wide
    assert not launch._wide(buffer.view(-1)[1 : 1 + rows * columns].view(rows, columns)), "off alignment"
    assert not launch._wide(buffer.view(-1)[: rows * columns].view(rows, columns)[::2, ::2])


def test_matmuls_and_the_sweeps_behind_them_are_recorded_while_somebody_listens(device, tables):
    def run():
        x, weight, dz = (torch.ones(*size, device=device) for size in ((64, 32), (48, 32), (64, 48)))
        launch.matmul(x, weight.t(), None, None, None, 0.0, False)
        launch.matmul_dgelu(dz, weight, x, "gelu", False)
        launch.weight_grad(dz, x, torch.empty_like(weight), None, False)

    seen, inside = [], []

    @contextmanager
    def note(op, shape, dtype, engine):
        seen.append((op, shape, dtype, engine))
        inside.append(op)
        yield
        inside.remove(op)

    with runtime.recorded(note):
        run()
    run()
    assert seen == [
        ("linear.none", (64, 48, 32), torch.float32, "cublas"),
        ("linear.dgelu", (64, 32, 48), torch.float32, "cublas"),
        ("gelu_grad", (64, 32), torch.float32, "triton"),
        ("linear.weight_grad", (48, 32, 64), torch.float32, "cublas"),
        ("matmul_fp32", (48, 32, 64), torch.float32, "cublas"),
    ]
    assert not inside, "each ran in the context that it was given"
