"""The package as it is installed: what the wheel holds, and what it does where there is no checkout and no triton."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import fastgpt
from fastgpt.common import tomllib

ROOT = Path(__file__).parents[1]
TINY = (
    "--n-embd 32 --n-layer 1 --block-size 16 --batch-size 2 --max-iters 2 --eval-iters 1 --device cpu --no-tensorboard"
)


def python(*args, path=ROOT, cwd=None, **environment):
    """A fresh Python on ``args``, which finds what is in ``path`` and was told nothing about the interpreter."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment = {**inherited, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd or path, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built with no network from what a source distribution holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("fastgpt", "configs"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*build, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder with the unpacked wheel and nothing else."""
    folder = wheel.parent / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def metadata(installed, name):
    return next(installed.glob(f"fastgpt_triton-*.dist-info/{name}")).read_text(encoding="utf-8")


class TestWheel:
    def test_holds_every_module_every_preset_and_every_table(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            held = {name for name in archive.namelist() if ".dist-info/" not in name}
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastgpt").rglob("*") if path.is_file()}
        expected = {name for name in files if "__pycache__" not in name}
        presets = {f"fastgpt/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
        assert held == expected | presets
        assert len(presets) >= 4 and "fastgpt/training/loop.py" in held

    def test_every_folder_of_the_package_is_a_package(self):
        folders = {path.parent for path in (ROOT / "fastgpt").rglob("*.py")}
        assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []

    def test_installs_the_command(self, installed):
        entries = configparser.ConfigParser()
        entries.read_string(metadata(installed, "entry_points.txt"))
        module, _, function = entries["console_scripts"]["fastgpt"].partition(":")
        assert (module, function) == ("fastgpt.__main__", "entry")

    def test_its_version_is_the_packages(self, installed):
        import fastgpt

        assert message_from_string(metadata(installed, "METADATA"))["Version"] == fastgpt.__version__

    def test_its_name_is_not_that_of_the_other_project_on_the_index(self, installed):
        assert message_from_string(metadata(installed, "METADATA"))["Name"] == "fastgpt-triton"
        with_another = [
            f"{path.relative_to(ROOT)}: {line.strip()}"
            for folder in ("fastgpt", "bench", "docs")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".md", ".jinja")
            for line in path.read_text(encoding="utf-8").splitlines()
            if re.search(r"pip install (-\S+ )*['\"]?fastgpt\b(?!-triton)", line)
        ]
        assert with_another == []

    @pytest.mark.parametrize("system, wanted", [("Linux", "triton"), ("Windows", "triton-windows"), ("Darwin", None)])
    def test_triton_is_what_the_system_has(self, installed, system, wanted):
        listed = message_from_string(metadata(installed, "METADATA")).get_all("Requires-Dist")
        needed = {
            requirement.name
            for requirement in map(Requirement, listed)
            if requirement.marker is None
            or requirement.marker.evaluate({"platform_system": system, "python_version": "3.12", "extra": ""})
        }
        assert {name for name in needed if "triton" in name} == ({wanted} if wanted else set())
        assert {"torch", "numpy", "safetensors", "filelock", "psutil", "tiktoken", "rich", "jinja2"} <= needed
        assert "matplotlib" not in needed and "pytest" not in needed

    def test_runs_away_from_the_checkout(self, installed, tmp_path):
        args = f"-m fastgpt train --kernels eager {TINY} --out {tmp_path / 'run'}".split()
        result = python(*args, path=installed, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "iter 2: loss" in result.stdout
        assert (tmp_path / "run" / "metrics.jsonl").exists()

    def test_the_benchmarks_stay_in_the_checkout(self, installed, tmp_path):
        result = python("-m", "fastgpt", "bench", "mfu", path=installed, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: bench is not part of the installed package: clone fastgpt's repository")


def test_the_versions_under_test_are_the_ends_of_the_supported_range():
    """``make test-versions`` installs them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pairs = re.findall(r"^.venv-(oldest|newest)/.installed: TORCH = torch==(.*) triton==(.*)$", makefile, re.MULTILINE)
    assert [end for end, *_ in pairs] == ["oldest", "newest"]
    for end, *versions in pairs:
        for name, version in zip(("torch", "triton"), map(Version, versions)):
            assert version in ranges[name], f"{name} {version} is not supported"
            major, minor = version.release[:2]
            beyond = f"{major}.{minor + (1 if end == 'newest' else -1)}.0"
            assert beyond not in ranges[name], f"{name} {version} is not the {end}"
    pythons = [text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    ends = {row["end"]: row["python"] for row in workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]}
    assert ends == {"oldest": pythons[0], "newest": pythons[-1]}


def test_the_workflow_runs_what_make_and_ci_run():
    """Each command of the workflow is a target of the Makefile, or names files that exist."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    targets = set(
        re.findall(r"^\.PHONY: (.*)$|^(test-oldest) (test-newest):", (ROOT / "Makefile").read_text(), re.MULTILINE)[0][
            0
        ].split()
    )
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {word.split()[1] for word in commands if word.startswith("make")} <= {*targets, "test-${{"}
    named = [
        word for command in commands for word in command.split() if word.startswith("tests/") or word.endswith(".py")
    ]
    assert named and all((ROOT / name).exists() for name in named)
    assert (ROOT / ".ci/run").read_text().count("make lint\nmake test\n") == 1


class TestWithoutTriton:
    """macOS, or a CPU-only PyTorch that came without it."""

    @pytest.fixture
    def path(self, tmp_path):
        """A path where ``import triton`` fails."""
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
        return f"{tmp_path}{os.pathsep}{ROOT}"

    def test_the_eager_model_trains(self, path, tmp_path):
        code = (
            "import torch, fastgpt\n"
            "from fastgpt.ops import EAGER\n"
            "shape = fastgpt.ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64)\n"
            "model = fastgpt.GPT(shape, EAGER)\n"
            "idx = torch.randint(0, 64, (2, 16))\n"
            "model(idx, idx)[1].backward()\n"
            "assert all(p.grad is not None for p in model.parameters())\n"
        )
        result = python("-c", code, path=path, cwd=tmp_path)
        assert result.returncode == 0, result.stderr

    def test_train_py_runs_eager_and_says_why(self, path, tmp_path):
        args = f"{ROOT / 'train.py'} {TINY} --out {tmp_path / 'run'}".split()
        result = python(*args, path=path, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "triton is not installed: the model trains in plain PyTorch, --kernels eager" in result.stdout
        assert "iter 2: loss" in result.stdout

    def test_train_py_says_what_kernels_triton_needs(self, path, tmp_path):
        result = python(str(ROOT / "train.py"), "--kernels", "triton", path=path, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: kernels is 'triton' but triton is not installed: use --kernels eager")
        assert result.stderr.count("\n") == 1
        assert {p.name for p in tmp_path.iterdir()} <= {"sitecustomize.py", "__pycache__"}


class TestImport:
    def test_of_everything_public_loads_little_beyond_torch_and_touches_no_gpu(self):
        """Time is not measured, for the machine may be busy: what an import costs is what it loads. torch's compiler is
        loaded by every optimizer, torch's own too."""
        code = (
            "import sys, torch\n"
            "before = set(sys.modules)\n"
            "import fastgpt\n"
            "for name in fastgpt.__all__: getattr(fastgpt, name)\n"
            "slow = 'torch.distributed.checkpoint tyro rich pyarrow datasets transformers matplotlib "
            "tensorboard tiktoken jinja2 psutil pandas safetensors filelock'\n"
            "print(*[name for name in slow.split() if name in sys.modules.keys() - before])\n"
            "assert not torch.cuda.is_initialized()\n"
        )
        result = python("-c", code)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == []

    def test_of_an_eager_model_loads_no_kernel(self):
        code = (
            "import sys, fastgpt, fastgpt.ops\n"
            "fastgpt.GPT, fastgpt.ops.EAGER\n"
            "sys.exit(any(name.startswith('fastgpt.kernels.fused') for name in sys.modules))\n"
        )
        assert python("-c", code).returncode == 0


class TestMissingPackages:
    @pytest.mark.parametrize("package", ["rich", "triton"])
    def test_of_a_command_are_one_sentence(self, package, tmp_path):
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
        command = "bench.audit" if package == "rich" else "bench.tune"
        result = python("-m", command, path=f"{tmp_path}{os.pathsep}{ROOT}", cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"error: {package} is not installed: pip install {package}")

    @pytest.mark.parametrize(
        "error", [ModuleNotFoundError("x", name="fastgpt.gone"), ImportError("x", name="rich"), KeyError(1)]
    )
    def test_anything_else_keeps_its_traceback(self, error, capsys):
        fastgpt._tell(type(error), error, None)
        assert capsys.readouterr().err.startswith(f"{type(error).__name__}: ")
