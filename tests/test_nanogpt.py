"""python -m fastgpt.nanogpt: a train.py that knows nothing of fastgpt, run patched."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import nanogpt
from fastgpt.common import UserError

ROOT = Path(__file__).parents[1]

TRAIN = '''
"""Trains as nanoGPT's train.py does: globals, a configurator, GPT, configure_optimizers, a GradScaler, a checkpoint."""
import os, sys
import torch
from model import GPTConfig, GPT
learning_rate, max_iters, compile, out_dir, init_from, dtype = 1e-2, 4, True, "out", "scratch", "float32"
exec(open("configurator.py").read())
torch.manual_seed(1337)
torch.set_num_threads(1)
args = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=31, bias=False, dropout=0.0)
model = GPT(GPTConfig(**args))
if init_from == "resume":
    checkpoint = torch.load(os.path.join(out_dir, "ckpt.pt"))
    model.load_state_dict(checkpoint["model"])
scaler = torch.amp.GradScaler("cpu", enabled=False)
optimizer = model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), "cpu")
if init_from == "resume":
    optimizer.load_state_dict(checkpoint["optimizer"])
raw_model = model
if compile:
    model = torch.compile(model, backend="aot_eager")
X = torch.randint(0, 31, (2, 16))
for it in range(max_iters):
    for micro_step in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits, loss = model(X, X)
            loss = loss / 2
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    print(f"iter {it}: loss {loss.item() * 2:.6f}, logits {logits if logits is None else 'there'}, {type(optimizer).__name__}")
raw_model.eval()
with torch.no_grad():
    logits, loss = raw_model(X, X)
print(f"eval loss {loss:.4f} {tuple(logits.shape)}")
os.makedirs(out_dir, exist_ok=True)
torch.save({"model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": args,
            "iter_num": max_iters, "best_val_loss": loss, "config": {}}, os.path.join(out_dir, "ckpt.pt"))
'''

CONFIGURATOR = """
import sys
for arg in sys.argv[1:]:
    if "=" not in arg:
        exec(open(arg).read())
    else:
        key, value = arg[2:].split("=")
        globals()[key] = type(globals()[key])(eval(value) if not isinstance(globals()[key], str) else value)
"""


def checkout(folder):
    """A checkout with nanoGPT's layout, around our own model of its structure."""
    Path(folder, "config").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "steps" / "nanogpt.py", Path(folder, "model.py"))
    Path(folder, "train.py").write_text(TRAIN)
    Path(folder, "configurator.py").write_text(CONFIGURATOR)
    Path(folder, "config", "quick.py").write_text("max_iters = 3\n")


@pytest.fixture
def repository(tmp_path):
    checkout(tmp_path / "their repository")
    return tmp_path / "their repository"


def python(*args, cwd):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def losses(out):
    return [float(x) for x in re.findall(r"iter \d+: loss ([\d.]+)", out)]


@pytest.fixture
def here(monkeypatch, capsys):
    """Calls ``run()`` in this process as if it were a fresh one in ``cwd``, and returns what it printed."""

    def call(cwd, run, *argv):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "path", [str(cwd), *sys.path])
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        sys.modules.pop("model", None)
        capsys.readouterr()
        run()
        return capsys.readouterr().out

    yield call
    sys.modules.pop("model", None)


def test_an_unmodified_train_py_learns_the_same_patched_and_resumes(repository, tmp_path, here):
    train = repository / "train.py"
    own = here(
        repository, lambda: runpy.run_path(str(train), run_name="__main__"), train, "config/quick.py", "--compile=False"
    )
    code, out, error = python("-m", "fastgpt.nanogpt", "train.py", "config/quick.py", cwd=repository)  # compiled
    assert code == 0, error
    assert "fastgpt.patch: nanoGPT's GPT" in out and "fastgpt" not in own
    assert len(losses(out)) == 3 and losses(out)[-1] < losses(out)[0]
    torch.testing.assert_close(losses(out), losses(own), atol=1e-4, rtol=0)
    assert "logits None, AdamW" in out and "logits there" in own
    assert "eval loss" in out and "(2, 16, 31)" in out

    # From another folder, under autocast, with FusedAdamW taking over the state that AdamW saved.
    config = os.path.relpath(repository / "config" / "quick.py", tmp_path)
    args = ["--fused-adamw", str(train), config, "--compile=False", "--dtype=bfloat16", "--init_from=resume"]
    resumed = here(tmp_path, lambda: nanogpt.main(args))
    assert "logits None, FusedAdamW" in resumed
    assert losses(resumed)[0] < losses(out)[-1]


class TestRefused:
    @pytest.mark.parametrize(
        "args, message",
        [
            ([], "TRAIN.PY is missing"),
            (["--bogus", "train.py"], "flag is '--bogus', which is not known"),
            (["nowhere/train.py"], "nowhere/train.py does not exist"),
            (["."], r"^\. is not a file: name nanoGPT's train.py"),
        ],
    )
    def test_arguments(self, args, message):
        with pytest.raises(UserError, match=message):
            nanogpt.main(args)

    def test_no_model_beside_it(self, tmp_path, monkeypatch):
        (tmp_path / "train.py").write_text("")
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(UserError, match=r"has no model\.py"):
            nanogpt.main([str(tmp_path / "train.py")])

    def test_a_model_that_is_not_nanogpts(self, tmp_path):
        """One sentence, exit code 2."""
        (tmp_path / "train.py").write_text("from model import GPT\nGPT(1, 1)\n")
        (tmp_path / "model.py").write_text("import torch\nclass GPT(torch.nn.Linear):\n    pass\n")
        code, out, error = python("-m", "fastgpt.nanogpt", "train.py", cwd=tmp_path)
        assert code == 2
        assert "model is a GPT: patch knows nanoGPT's GPT" in error and "Traceback" not in error

    def test_a_model_py_without_gpt(self, tmp_path, monkeypatch):
        (tmp_path / "train.py").write_text("")
        (tmp_path / "model.py").write_text("x = 1\n")
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, "model", raising=False)
        with pytest.raises(UserError, match="has no class GPT"):
            nanogpt.main([str(tmp_path / "train.py")])
        monkeypatch.delitem(sys.modules, "model")
