"""What the documents say is run: every command and every Python block of README, CONTRIBUTING and docs/, every link.

A block between ``` fences (or indented by four) whose first line starts with a program's name is a block of commands; CHECKS
says how each is checked, and a command that matches none of its patterns fails. Cheap ones are run; the rest goes through the
entry's own argument parser and stops there, so that a flag, a preset or a choice that does not exist fails.

CONTRIBUTING's recipe is carried out in a copy of the repository: files are written, diffs applied, commands run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from _pytest.config import get_config

from fastgpt import command as front_end
from fastgpt.__main__ import COMMANDS
from fastgpt.__main__ import main as fastgpt_command
from fastgpt.common import tomllib

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = "python|python3|fastgpt|make|pytest|torchrun|pip|git|export|cd|source|lm_eval"
TINY = "--n-embd 32 --n-layer 1 --block-size 16 --vocab-size 256 --tokenizer bytes --batch-size 2 --grad-accum 1"
TINY += " --max-iters 1 --eval-iters 1 --device cpu --no-tensorboard"


# ---- what is in a page


def blocks(page):
    """(language, text) of every fenced block, and of every indented one that holds commands."""
    text = page.read_text(encoding="utf-8")
    fenced = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    found = [(match[2], textwrap.dedent(match[3])) for match in fenced.finditer(text)]
    indented = re.findall(r"(?:^ {4,}\S.*\n)+", fenced.sub("", text), re.MULTILINE)
    return found + [("", textwrap.dedent(block)) for block in indented if is_command(block)]


def is_command(text):
    """Whether the first line starts with a program, after ``$ `` and VARIABLE=value."""
    return bool(re.match(rf"\s*(\$ )?(\w+=\S* +)*({PROGRAMS})\b(?! *=|,| import)", text))


def commands(page):
    for language, text in blocks(page):
        if language in ("sh", "bash", "shell", "console") or (language == "" and is_command(text)):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and (language != "console" or line.startswith("$ ")):
                    yield shlex.join(words)


def pythons(page):
    return [text for language, text in blocks(page) if language in ("python", "py")]


COMMANDS_OF_PAGES = {
    **{command: page for page in reversed(PAGES) for command in commands(page)},
    **{f"fastgpt {name} {entry.example}".rstrip(): ROOT / "fastgpt/__main__.py" for name, entry in COMMANDS.items()},
}


# ---- how a command is checked


class Parsed(Exception):
    """An entry's parser has accepted its arguments."""


def accepts(main, args, monkeypatch):
    """Call ``main`` up to the point where its arguments are parsed."""
    parse = front_end.parse_known

    def parse_known(*args, **options):
        found, rest = parse(*args, **options)
        if not rest:  # else what calls this refuses them
            raise Parsed
        return found, rest

    with monkeypatch.context() as patch, pytest.raises((Parsed, SystemExit)) as stopped:
        patch.setattr(front_end, "parse_known", parse_known)
        main(args)
        raise AssertionError("its main() parsed nothing")
    if stopped.type is SystemExit:
        assert stopped.value.code == 0 and "--help" in args, "its parser refuses this"


def entry(words):
    """main() and its arguments of ``python train.py``, ``python -m NAME`` and ``fastgpt NAME``."""
    if words[0] == "fastgpt":
        return fastgpt_command, words[1:]
    if words[1] == "-m":
        name = words[2]
        package = importlib.util.find_spec(name)
        assert package is not None, f"there is no module {name}"
        if package.submodule_search_locations is not None:
            name += ".__main__"
        return importlib.import_module(name).main, words[3:]
    assert words[1] == "train.py"
    return importlib.import_module("fastgpt.train").main, words[2:]


def parse(words, monkeypatch, **_):
    accepts(*entry(words), monkeypatch)


def run(words, capsys, **_):
    main, args = entry(words)
    assert main(args) == 0
    assert capsys.readouterr().out


def doctor(words, capsys, **_):
    main, args = entry(words)
    assert main(args) in (0, 1)  # 1: it found something critical
    assert "parameters" in capsys.readouterr().out


def train(words, tmp_path, monkeypatch, **_):
    """For real, but for one step of a tiny model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("All work and no play. " * 200, encoding="utf-8")
    main, args = entry(words)
    assert main([*args, *TINY.split(), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def torchrun(words, monkeypatch, **_):
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(words[1:])
    script = ["-m", asked.training_script] if asked.module else [asked.training_script]
    command = ["python", *script, *asked.training_script_args]
    next(check for pattern, check in CHECKS if re.match(pattern, shlex.join(command)))(command, monkeypatch=monkeypatch)


def nanogpt(words, tmp_path, monkeypatch, **_):
    """Its arguments belong to a nanoGPT checkout, which is not here: one is made whose train.py keeps them."""
    main, args = entry(words)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text("class GPT:\n    def configure_optimizers(self): pass\n")
    (tmp_path / "configurator.py").touch()
    (tmp_path / "train.py").write_text("import sys\nopen('seen', 'w').write(' '.join(sys.argv[1:]))\n")
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "model", raising=False)
    at = next(i for i, arg in enumerate(args) if arg.endswith("train.py"))
    assert main([*args[:at], "train.py", *args[at + 1 :]]) == 0
    assert (tmp_path / "seen").read_text().split() == args[at + 1 :]
    sys.modules.pop("model", None)


def make(words, **_):
    result = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def pytest_accepts(words, **_):
    """Its options are known and its paths exist."""
    args = words[words.index("pytest") + 1 :]
    for path in (arg for arg in args if "/" in arg or arg in ("tests", "bench")):
        assert (ROOT / path.split("::")[0]).exists(), path
    get_config().parse(args)  # raises UsageError


def pip(words, **_):
    """Extras that are asked for exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[1:2] == ["install"]
    for word in words[2:]:
        match = re.fullmatch(r"(?:fastgpt|\.)\[([\w,-]+)\]", word)
        for extra in match[1].split(",") if match else ():
            assert extra in project["optional-dependencies"], f"there is no extra {extra!r}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A copy of the repository after CONTRIBUTING's recipe: each block was written, or applied, where its first line says."""
    folder = tmp_path_factory.mktemp("recipe")
    for name in ("fastgpt", "bench", "configs", "tests"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "CONTRIBUTING.md"):
        copy(ROOT / name, folder)
    for language, text in blocks(CONTRIBUTING):
        if language == "python":
            title = re.match(r"# (\S+\.py)\n", text)
            assert title, f"this block does not begin with the name of its file:\n{text}"
            (folder / title[1]).write_text(text, encoding="utf-8")
        elif language == "diff":
            apply(text, folder)
    return folder


def apply(diff, folder):
    """Apply a diff without line numbers: what a hunk keeps and removes has to stand once in its file."""
    for change in re.split(r"^\+\+\+ ", diff, flags=re.MULTILINE)[1:]:
        name, _, hunks = change.partition("\n")
        text = "\n" + (folder / name).read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old = "\n" + "".join(line[1:] or line for line in lines if not line.startswith("+"))
            new = "\n" + "".join(line[1:] or line for line in lines if not line.startswith("-"))
            assert text.count(old) == 1, (
                f"CONTRIBUTING's recipe changes lines that {name} does not have, or has twice:{old}"
            )
            text = text.replace(old, new)
        (folder / name).write_text(text[1:], encoding="utf-8")


def after_the_recipe(words, request, tmp_path, **_):
    folder = request.getfixturevalue("recipe")
    unset = {"TRITON_INTERPRET"} | {key for key in os.environ if key.startswith("PYTEST_")}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "silu" in result.stdout or words[2] == "pytest", result.stdout


def nothing(words, **_):
    """The shell's own, or another program's: not ours to check."""


CHECKS = [
    (r".*silu", after_the_recipe),
    (r"(\w+=\S* )*make ", make),
    (r"(python -m )?pip ", pip),
    (r"(python -m )?pytest ", pytest_accepts),
    (r"git clone |cd |export |source |lm_eval |python3? -m venv ", nothing),
    (r"torchrun ", torchrun),
    (r"(python -m fastgpt\.|fastgpt )nanogpt (?!--help)", nanogpt),
    (r"(python -m fastgpt\.|fastgpt )(hardware|plan|env)\b(?!.*--help)", run),
    (r"(python -m fastgpt\.|fastgpt )doctor docs/", doctor),
    (r"(python train\.py|fastgpt train)( --kernels eager)?$", train),
    (r"fastgpt( --help| --version)$", run),
    (r"(python train\.py|python -m fastgpt\.\w+|python -m bench\.\w+|fastgpt \w+)( |$)", parse),
]


@pytest.mark.parametrize("command", COMMANDS_OF_PAGES)
def test_the_command_works(command, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    words = shlex.split(command)
    while "=" in words[0]:  # VARIABLE=value
        words.pop(0)
    if words[0] == "python3":
        words[0] = "python"
    check = next((check for pattern, check in CHECKS if re.match(pattern, shlex.join(words))), None)
    assert check, f"{COMMANDS_OF_PAGES[command].name}: CHECKS in {__name__} does not say how to check this command"
    check(words, request=request, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


def test_the_commands_are_found():
    found = {page.relative_to(ROOT).as_posix(): len(list(commands(page))) for page in PAGES}
    for page in ("README.md", "CONTRIBUTING.md", "docs/data.md", "docs/patch.md", "docs/troubleshooting.md"):
        assert found[page], found
    assert len(COMMANDS_OF_PAGES) > 30


def spans(page):
    """What stands between single backticks in its sentences and tables."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_entries_named_in_a_sentence_exist(page):
    for span in spans(page):
        if match := re.match(r"python -m ((?:fastgpt|bench)[\w.]*)", span):
            entry(["python", "-m", match[1]])
        elif match := re.match(r"fastgpt (\w+)", span):
            assert match[1] in COMMANDS, span
        elif match := re.match(r"make (\w+)", span):
            make(["make", match[1]])


FOREIGN = {
    "--adversary",
    "--benchmark-only",
    "--benchmark-timer",
    "--depth",
    "--help",
    "--model_args",
    "--nproc_per_node",
}
"""Flags of other programs (pytest, nanochat, lm_eval, torchrun), and the one that all have."""


def test_flags_named_in_a_sentence_exist():
    from bench.refusals import commands

    options = [option for _, cls in commands() for option in front_end.options(cls)]
    known = {flag for option in options for flag in (option.flag, *option.arg.aliases)} | FOREIGN
    known |= {f"--no-{option.flag[2:]}" for option in options if option.type is bool}
    named = {
        (page.name, flag) for page in PAGES for span in spans(page) for flag in re.findall(r"(?<!\S)--\w[\w-]*", span)
    }
    assert len(named) > 100 and [found for found in sorted(named) if found[1] not in known] == []


OURS = [path for top in ("fastgpt", "bench", "tests", "docs", "tools", "configs") for path in (ROOT / top).rglob("*")]
OURS += [path for path in ROOT.iterdir() if path.is_file()]
KERNELS = list((ROOT / "fastgpt" / "kernels").rglob("*.py"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_and_names_in_a_sentence_exist(page):
    """A Python file or a folder of ours, by its whole path or the end of it, and ``fastgpt.module.name``."""
    for span in spans(page):
        if span == "bench/results/":  # made by the first results
            continue
        if re.fullmatch(r"[\w/]+\.py|(fastgpt|bench|tests|docs|tools|configs)/[\w./-]+", span):
            ending = f"/{span.rstrip('/')}"
            assert any(path.as_posix().endswith(ending) for path in OURS), f"there is no {span}"
        elif match := re.fullmatch(r"((?:fastgpt|bench)(?:\.\w+)*)(?:\(.*\))?", span):
            pkgutil.resolve_name(match[1])
        elif re.fullmatch(r"\w+_kernel", span):
            assert any(f"def {span}(" in path.read_text(encoding="utf-8") for path in KERNELS), f"there is no {span}"


# ---- Python blocks


def given(name):
    """What a block may use without making it: the reader's own model."""
    import torch

    from bench.steps.nanogpt import GPT, GPTConfig

    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64))
    idx = torch.randint(0, 64, (2, 16))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "idx": idx, "targets": idx}[name]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != CONTRIBUTING and pythons(page)], ids=lambda page: page.name
)
def test_the_python_blocks_run(page, tmp_path, monkeypatch):
    """In their order, each as a file of its own."""
    monkeypatch.chdir(tmp_path)
    for text in pythons(page):
        code = compile(text, page.name, "exec")
        wanted = {"model", "optimizer", "idx", "targets"} & set(code.co_names)
        exec(code, {"__name__": "block"} | {name: given(name) for name in wanted})


# ---- what a page must have


def test_the_doctors_page_has_every_check():
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fastgpt/doctor/checks").glob("*.py")]
    names = {name for source in sources for name in re.findall(r'\b(?:id|check)="(\w+)"', source)}
    assert len(names) > 10 and [name for name in sorted(names) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("section, file", [("Layer norm", "fused_layernorm.py"), ("Attention", "fused_attn.py")])
def test_code_quoted_to_explain_a_kernel_is_in_its_file(section, file):
    page = (ROOT / "docs" / "reading-kernels.md").read_text(encoding="utf-8")
    (text,) = [each for each in page.split("\n## ") if each.startswith(section)]
    quoted = re.findall(r"^\| `([^`]+)`.* \| ", text.split("| in the code |")[1], re.MULTILINE)
    source = (ROOT / "fastgpt" / "kernels" / file).read_text(encoding="utf-8")
    assert len(quoted) >= 4 and [code for code in quoted if code not in source] == []


# ---- links and quoted messages


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?://|mailto:", target):
            path, _, fragment = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            if fragment and file.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert fragment in map(anchor, headings), f"{page.name} links to {target}"


UPSTREAM = {
    "Not enough SMs to use max_autotune_gemm mode": "torch/_inductor/utils.py",
    "No working C++ compiler found": "torch/_inductor/exc.py",
    "Cannot find a working triton installation": "torch/_inductor/exc.py",
    "In order to use an autograd.Function with functorch transforms": None,  # compiled in since 2.15: test_operators.py
    "hit config.recompile_limit": None,  # put together from a format and the limit's name
    "0 active drivers": None,  # the same, in triton
    "out of resource: shared memory, Required: …": None,
    "CUDA out of memory. Tried to allocate …": None,  # these four are compiled in
    "no kernel image is available for execution on the device": None,
    "CUDA error: device-side assert triggered": None,
    "CUBLAS_WORKSPACE_CONFIG": None,
    "No module named 'triton'": None,
}


def test_the_messages_of_the_troubleshooting_page_are_the_real_ones():
    """A heading in `quotes` is a message, ``…`` for what varies: of this package, or of another as UPSTREAM knows."""
    import ast

    constants = "\n".join(
        node.value
        for path in (ROOT / "fastgpt").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(messages) > 20 and messages[0] == "Not enough SMs to use max_autotune_gemm mode"
    for message in messages:
        if message in UPSTREAM:
            if UPSTREAM[message]:
                package, _, file = UPSTREAM[message].partition("/")
                source = Path(importlib.util.find_spec(package).origin).parent / file
                assert message in source.read_text(encoding="utf-8"), message
            continue
        for piece in message.split("…"):
            assert piece in constants, f"{message}: no message of this package says {piece!r}"


def test_a_bug_report_asks_for_the_environment():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the datasets and transformers packages")
    forms = {path.stem: path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    for name, path in forms.items():
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["description"] and form["body"], name
        ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(set(ids)) == len(ids), name
        assert all(field["attributes"]["label"] for field in form["body"] if "id" in field), name
    report = yaml.safe_load(forms["bug_report"].read_text(encoding="utf-8"))
    asked = next(field for field in report["body"] if "`fastgpt env`" in field["attributes"].get("label", ""))
    assert asked["validations"]["required"] is True
