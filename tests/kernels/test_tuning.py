"""Tables of launch configs: look-up, tables that are damaged or foreign, configs that do not fit, compiles per bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton.language as tl

from bench.compiler import tune_table
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.kernels import fused_adamw, fused_cross_entropy, fused_layernorm, runtime, tuning  # noqa: F401 (their spaces)
from fastgpt.kernels.fused_attn import attention_bucket
from fastgpt.kernels.operators import launches
from fastgpt.kernels.tuning import Key, Table, TableEntry, Target

ROOT = Path(__file__).parents[2]
RTX_4070 = Target(89, 46, 101_376)
KEY = Key("cross_entropy.rows", "bf16", "V>=8192")
DEFAULT = {"tile": 4096, "num_warps": 8}
OTHER = {"tile": 2048, "num_warps": 4}
THIRD = {"tile": 8192, "num_warps": 16}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Empty folders of shipped and user's tables; returns (shipped, user)."""
    shipped, user = tmp_path / "shipped", tmp_path / "cache" / "fastgpt" / "tuning"
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shipped.mkdir()
    user.mkdir(parents=True)
    tuning.forget()
    yield shipped, user
    tuning.forget()


@pytest.fixture
def on_rtx_4070(monkeypatch):
    monkeypatch.setattr(tuning, "target", lambda device: RTX_4070)


def write(folder, config, sms=46, *, origin="ranked", key=KEY, arch=89, shared=32):
    target = Target(arch, sms, cards.ARCHS[f"sm_{arch}"].shared_per_block)
    resources = {"spills": 0, "registers": 38, "shared": shared, "blocks_per_sm": 6}
    table = Table(
        target, f"a card with {sms} SMs", "triton 3.7.1", {key: TableEntry(key, config, origin, resources, {})}
    )
    path = folder / target.file_name
    tune_table.save(table, path)
    return path


def choose(key=KEY, default=DEFAULT):
    return tuning.choose(key.kernel, torch.bfloat16, key.bucket, torch.device("cpu"), default)


# ---------------------------------------------------------------- look-up


def test_exact_entry_is_used_and_says_where_it_is_from(folders, on_rtx_4070):
    write(folders[0], OTHER)
    choice = choose()
    assert choice.config == OTHER and choice.default == DEFAULT
    assert choice.source == "ranked (a card with 46 SMs)"


def test_nearest_sm_count_serves_where_there_is_no_exact_one(folders, on_rtx_4070):
    write(folders[0], THIRD, sms=128)
    write(folders[0], OTHER, sms=60)
    choice = choose()
    assert choice.config == OTHER
    assert choice.source == "ranked (a card with 60 SMs, 60 SMs)"


def test_a_nearer_table_without_the_bucket_is_passed_over(folders, on_rtx_4070):
    write(folders[0], {"BLOCK": 512, "CHUNK": 4096, "num_warps": 4}, key=Key("adamw.update", "fp32", "any"))
    write(folders[0], OTHER, sms=128)
    assert choose().config == OTHER


def test_default_where_no_table_has_the_bucket(on_rtx_4070):
    assert (choose().config, choose().source) == (DEFAULT, "default")


@pytest.mark.parametrize("other", [{"arch": 86, "sms": 46}, {"arch": 90, "sms": 132}])
def test_another_architecture_never_serves(folders, on_rtx_4070, other):
    write(folders[0], OTHER, **other)
    assert choose().config == DEFAULT


def test_the_users_table_wins_over_the_shipped_one(folders, on_rtx_4070):
    write(folders[0], OTHER)
    write(folders[1], THIRD, origin="measured")
    assert choose().config == THIRD and choose().source.startswith("measured")


def test_shipped_table_of_this_sm_count_wins_over_the_users_of_another_card(folders, on_rtx_4070):
    write(folders[0], OTHER)
    write(folders[1], THIRD, sms=128)
    assert choose().config == OTHER


def test_a_card_with_less_shared_memory_is_not_given_what_does_not_fit_it(folders, monkeypatch):
    write(folders[0], OTHER, shared=90_000)
    monkeypatch.setattr(tuning, "target", lambda device: Target(89, 46, 65_536))
    assert choose().config == DEFAULT


def test_tables_are_read_once_per_process(folders, on_rtx_4070, monkeypatch):
    write(folders[0], OTHER)
    reads = []
    read = tuning.read
    monkeypatch.setattr(tuning, "read", lambda path: reads.append(path) or read(path))
    for _ in range(3):
        choose()
        choose(Key("adamw.update", "bf16", "any"), {"BLOCK": 1024})
    assert len(reads) == 1


class Kernel:
    """Stands for a kernel under @triton.jit: each launch is a call of ``run``, with its constexprs."""

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        def launched(enable_fp_fusion, **config):
            assert grid == (1,) and enable_fp_fusion
            return self.run(config)

        return launched


def launch(choice, run, asked=None):
    """As an operator launches: ``asked()`` is the choice once more, where the first did not fit."""
    choices = iter([choice])

    @launches
    def function(x):
        found = next(choices, None) or (asked or choose)()
        runtime.Launch(Kernel(run), (1,), found, **found.config)()

    function(torch.empty(0))


def test_a_listener_hears_the_choice_of_every_launch(folders, on_rtx_4070):
    write(folders[0], OTHER)
    heard, ran = [], []
    with tuning.heard(heard.append):
        for _ in range(2):
            launch(choose(), ran.append)
    launch(choose(), ran.append)
    assert [(choice.key, choice.config) for choice in heard] == [(KEY, OTHER)] * 2 and ran == [OTHER] * 3


def test_a_cached_answer_is_asked_for_again_after_whatever_changes_it(folders, on_rtx_4070):
    asked = []

    @tuning.cached
    def cached_choice(tile: int) -> tuning.Choice:
        asked.append(tile)
        return choose(default={"tile": tile, "num_warps": 8})

    def unfit(config):
        if config == OTHER:
            raise out_of_resources()

    assert cached_choice(4096) is cached_choice(4096) and asked == [4096]
    write(folders[0], OTHER)
    tuning.forget()
    assert cached_choice(4096).config == OTHER
    with tuning.forced({KEY.kernel: THIRD}):
        assert cached_choice(4096).config == THIRD
    assert cached_choice(4096).config == OTHER
    with pytest.warns(UserWarning, match="does not fit"):
        launch(stale := cached_choice(4096), unfit, lambda: cached_choice(4096))
    assert cached_choice(4096).config == DEFAULT
    before = len(asked)
    tuning.refuse(runtime.NoRoom(stale, out_of_resources()))  # of another thread, which may have kept it since
    assert cached_choice(4096).config == DEFAULT and len(asked) == before + 1


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    current, entered = [0], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)
            current.append(self.device.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    for index in (0, 1):
        x = mock.Mock(spec=torch.Tensor, is_cuda=True, device=torch.device("cuda", index))
        assert launches(lambda x: current[-1])(x) == index
    assert entered == [torch.device("cuda", 1)] and current == [0]


def test_no_table_is_read_without_a_bucket(folders, on_rtx_4070, monkeypatch):
    monkeypatch.setattr(tuning, "read", lambda path: pytest.fail("read"))
    write(folders[0], OTHER)
    found = tuning.choose("attention.forward", torch.bfloat16, None, torch.device("cpu"), DEFAULT)
    assert found.config == DEFAULT


def test_forced_configs_win_inside_only(folders, on_rtx_4070):
    write(folders[0], OTHER)
    with tuning.forced({KEY.kernel: THIRD}):
        assert choose().config == THIRD
    assert choose().config == OTHER


def test_the_interpreter_has_no_target_and_a_compile_only_run_the_one_it_compiles_for():
    assert tuning.target(torch.device("cpu")) is None
    found = in_child(
        "from fastgpt.kernels import offline, tuning\nimport torch\n"
        "with offline.absent_gpu(90, 132): print(json.dumps(tuning.target(torch.device('cpu'))))"
    )
    assert found == [90, 132, 232_448]


# ---------------------------------------------------------------- damaged and foreign tables


def edited(path, **changes):
    found = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del found[key]
        elif key in found:
            found[key] = value
        else:
            found["entries"][0][key] = value
    path.write_text(json.dumps(found))


BAD = {
    "not JSON": "{",
    "another schema": {"schema": "fastgpt.bench"},
    "a newer version": {"schema_version": 2},
    "of another card": {"sms": 60},
    "of another architecture": {"arch": "sm_90"},
    "no entries": {"entries": None},
    "an unknown config": {"config": {"tile": 999, "num_warps": 8}},
    "a config of another kernel": {"config": {"rows": 4, "num_warps": 4}},
    "a config that is no numbers": {"config": {"tile": "4096", "num_warps": 8}},
    "a config that is a list": {"config": [4096, 8]},
    "an unknown origin": {"origin": "guessed"},
    "too much shared memory": {"resources": {"shared": 200_000}},
    "no resources": {"resources": {}},
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_table_is_one_warning_and_the_default(folders, on_rtx_4070, what):
    path = write(folders[1], OTHER)
    path.write_text(BAD[what]) if isinstance(BAD[what], str) else edited(path, **BAD[what])
    with pytest.warns(UserWarning) as caught:
        assert choose().config == DEFAULT
        assert choose().config == DEFAULT
    (message,) = [str(w.message) for w in caught]
    assert str(path) in message and "bench.tune" in message and "\n" not in message


def test_an_entry_for_a_kernel_that_was_not_imported_is_no_reason_to_warn(folders, on_rtx_4070):
    edited(write(folders[1], OTHER), kernel="softmax")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose().config == DEFAULT


def test_a_foreign_entry_costs_a_table_that_kernels_entries_only(folders, on_rtx_4070):
    update = Key("adamw.update", "bf16", "any")
    path = write(folders[1], OTHER)
    table = tuning.read(path)
    table.entries[update] = replace(table.entries[KEY], key=update)
    tune_table.save(table, path)
    with pytest.warns(UserWarning, match="left out"):
        assert choose(update, {"BLOCK": 1024}).config == {"BLOCK": 1024}
    assert choose().config == OTHER


def test_a_damaged_table_of_the_users_leaves_the_shipped_one(folders, on_rtx_4070):
    write(folders[0], OTHER)
    write(folders[1], THIRD).write_bytes(b"\0\0")
    with pytest.warns(UserWarning, match="left out"):
        assert choose().config == OTHER


def test_a_table_that_is_a_folder_is_left_out(folders, on_rtx_4070):
    (folders[1] / RTX_4070.file_name).mkdir()
    with pytest.warns(UserWarning, match="left out"):
        assert choose().config == DEFAULT


def test_a_missing_cache_directory_is_nothing_to_warn_of(on_rtx_4070, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose().config == DEFAULT


# ---------------------------------------------------------------- a config that does not fit


def out_of_resources():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(200_000, 101_376, "shared memory")


def test_a_config_that_does_not_fit_is_replaced_once_and_for_all(folders, on_rtx_4070):
    write(folders[0], OTHER)
    ran = []

    def run(config):
        if config == OTHER:
            raise out_of_resources()
        ran.append(config)

    first = choose()
    with pytest.warns(UserWarning, match="does not fit this GPU") as caught:
        launch(first, run)
        launch(first, run)  # a launcher may hold on to its choice
        launch(choose(), run)
    assert ran == [DEFAULT] * 3 and len(caught) == 1
    assert choose().config == DEFAULT


def test_a_default_that_does_not_fit_is_an_error(on_rtx_4070):
    def run(config):
        raise out_of_resources()

    with pytest.raises(type(out_of_resources())):
        launch(choose(), run)


def test_other_errors_pass(folders, on_rtx_4070):
    write(folders[0], OTHER)

    def run(config):
        raise ValueError("of the kernel")

    with pytest.raises(ValueError, match="of the kernel"):
        launch(choose(), run)


# ---------------------------------------------------------------- writing


def test_a_table_reads_back_as_it_was_written(folders):
    path = write(folders[0], OTHER)
    table = tuning.read(path)
    assert table.target == RTX_4070 and table.compiler == "triton 3.7.1"
    assert table.entries[KEY].config == OTHER and table.entries[KEY].origin == "ranked"
    before = path.read_bytes()
    tune_table.save(table, path)
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_table(folders, monkeypatch):
    path = write(folders[0], OTHER)
    before = path.read_bytes()

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UserError, match="No space left"):
        write(folders[0], THIRD)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------- what ships


def shipped_tables():
    folder = Path(tuning.__file__).parent / "tables"
    return [tuning.read(path) for path in sorted(folder.glob("*.json"))]


def test_the_five_cards_have_a_table():
    names = {table.target.file_name for table in shipped_tables()}
    assert names >= {"sm89_46.json", "sm90_132.json", "sm89_128.json", "sm86_82.json", "sm80_108.json"}


def test_shipped_entries_say_that_they_are_ranked_and_by_what():
    for table in shipped_tables():
        assert table.compiler.startswith("triton ") and table.entries
        for key, entry in table.entries.items():
            table.check(key.kernel)
            assert entry.origin == "ranked", f"{key}: nothing was measured on {table.gpu}"
            assert entry.resources["spills"] == 0 and entry.resources["blocks_per_sm"] >= 1
            assert 0 < entry.evidence["fill"] <= 1 and entry.evidence["model"] >= 1


def test_no_shipped_entry_is_one_that_the_look_up_can_never_choose():
    for table in shipped_tables():
        ranked = {key.kernel for key, entry in table.entries.items() if entry.origin == "ranked"}
        assert not any(tuning.has_library(kernel) for kernel in ranked)
        assert any(kernel.startswith("attention") for kernel in ranked)


def test_shipped_tables_name_a_card_with_these_limits():
    for table in shipped_tables():
        card = cards.lookup(table.gpu)
        assert (card.arch, card.sm_count) == (f"sm_{table.target.arch}", table.target.sms)
        assert table.target.shared == card.chip.shared_per_block


def test_a_shipped_entry_differs_from_the_default_only_for_a_gain():
    for table in shipped_tables():
        for key, entry in table.entries.items():
            gain = entry.evidence["over_default"]
            assert gain is None or gain <= 1.0, f"{key} on {table.gpu}: {gain}"


def test_the_page_says_how_many_entries_are_of_older_code():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for table in shipped_tables():
        older = sum(map(tuning.is_of_older_code, table.entries.values()))
        row = next(line for line in page.splitlines() if line.startswith(f"| `{table.target.file_name}`"))
        assert row.endswith(f"| {len(table.entries)} | ranked | {older or 'none'} |"), row


CODE = """
LIMIT = 1

def decorated(function):
    return function

def helper(x):
    return x + 1

def kernel(x):
    y = x + LIMIT
    return helper(y)
"""


@pytest.mark.parametrize(
    "old, new, same",
    [("    y = x", "    # why\n    y  =  x", True), ("def kernel", "@decorated\ndef kernel", True),
     ("def kernel(x):", "def kernel(x):\n    \"\"\"What it does.\"\"\"", True),
     ("y = x", "y = -x", False), ("x + 1", "x + 2", False), ("LIMIT = 1", "LIMIT = 2", False)],
)  # fmt: skip
def test_an_entry_is_bound_to_code_and_not_to_comments(tmp_path, monkeypatch, old, new, same):
    monkeypatch.setattr(tuning, "_spaces", {})
    hashes = []
    for n, code in enumerate((CODE, CODE.replace(old, new))):
        path = tmp_path / f"code{n}.py"
        path.write_text(code, encoding="utf-8")
        found: dict = {}
        exec(compile(code, path, "exec"), found)
        found["helper"].__module__ = "fastgpt.kernels.found"
        kernel = SimpleNamespace(fn=found["kernel"])  # as @triton.jit keeps it
        found |= {"helper": SimpleNamespace(fn=found["helper"]), "LIMIT": tl.constexpr(found["LIMIT"])}
        tuning.space(path.as_posix(), [])(kernel)
        hashes.append(tuning.source_hash(path.as_posix()))
    assert code != CODE and (hashes[0] == hashes[1]) == same


# ---------------------------------------------------------------- buckets and compiles


@pytest.mark.parametrize(
    "rows, bucket",
    [
        (1, "D64 rows<=16384"),
        (16_384, "D64 rows<=16384"),
        (16_385, "D64 rows<=65536"),
        (98_304, "D64 rows<=262144"),
        (2**20 + 1, "D64 rows>1048576"),
    ],
)
def test_buckets_of_attention(rows, bucket):
    assert attention_bucket(64, rows, plain=True, dropout=False) == bucket
    assert attention_bucket(64, rows, plain=False, dropout=False) is None
    assert attention_bucket(80, rows, plain=True, dropout=False) is None


def test_every_space_has_its_default():
    found = in_child(
        "from fastgpt.kernels import fused_attn as a, fused_layernorm as n, tuning as s\n"
        "from fastgpt.kernels import fused_cross_entropy as c, fused_adamw as w\nimport torch\n"
        "ok = [s.contains(f'attention.{k}', a.config(k, torch.bfloat16, 64, 1024, plain=not d, dropout=d, arch=arch))\n"
        "      for k in ('forward', 'backward_q', 'backward_kv') for d in (False, True) for arch in (80, 89, 90, 120)]\n"
        "ok += [s.contains(f'layer_norm.{k}', n.config(k, C)) for k in ('forward', 'backward')\n"
        "       for C in (384, 768, 1024, 1600)]\n"
        "ok += [s.contains('cross_entropy.rows', c._choice(torch.float32, 50304, None, torch.device('cpu')).default)]\n"
        "ok += [s.contains('adamw.update', w.config())]\n"
        "print(json.dumps(ok))"
    )
    assert len(found) == 34 and all(found)


def in_child(code, **env):
    """The JSON that ``code`` prints last, in a process whose triton compiles."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | env
    command = [sys.executable, "-c", f"import json\n{code}"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


COUNT_COMPILES = """
from collections import Counter
import torch
from triton.runtime.jit import JITFunction
from bench.compiler.capture import compile_for
from bench.ops import common
from bench.ops.cross_entropy import launch_loss
from bench.ops.layer_norm import launch_norm
from fastgpt.kernels.fused_attn import attention_bucket
from fastgpt.kernels.fused_attn import qkv_attention
from fastgpt.kernels.fused_cross_entropy import cross_entropy_bucket
from fastgpt.kernels.fused_layernorm import layer_norm_bucket

torch.set_num_threads(1)
compiles, run, bucket = Counter(), JITFunction.run, ""

def count(self, key, signature, device, constexprs, options, attrs, warmup):
    compiles[f"{self.__name__}, {bucket}"] += 1
    self.device_caches[device][0][key] = kernel = object()  # what triton would compile, and keep
    return kernel

JITFunction._do_compile = count
JITFunction.run = lambda self, *args, grid, warmup=False, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)

with compile_for(89, 46):
    for B in (1, 2, 3, 8, 17):
        for T in (64, 100, 512, 1000, 1024, 1025):
            bucket = attention_bucket(64, B * 2 * T, plain=True, dropout=False)
            qkv = torch.empty(B, T, 3 * 128, dtype=torch.bfloat16, requires_grad=True)
            common.backward(qkv_attention(qkv, 2))
            bucket = layer_norm_bucket(768)
            launch_norm(768, torch.bfloat16, torch.float32, rows=B * T, out_dtype=torch.bfloat16)
    for N in (64, 100, 1000, 1024):
        bucket = cross_entropy_bucket(8192, None)
        launch_loss(torch.bfloat16, V=8192, N=N)
print(json.dumps(compiles))
"""


def test_a_new_batch_size_or_length_compiles_a_kernel_at_most_once_per_bucket():
    compiles = in_child(COUNT_COMPILES)
    assert {name.split(",")[0] for name in compiles} == {
        "forward_kernel", "backward_q_kernel", "backward_kv_kernel", "layer_norm_forward_kernel",
        "layer_norm_backward_kernel", "add_up_kernel", "rows_kernel",
    }  # fmt: skip
    assert max(compiles.values()) == 1, compiles
