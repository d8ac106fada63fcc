"""Every module can be imported where only torch, triton and numpy are installed, but for those that draw or print tables; and
on systems that lack what only POSIX has."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRINTS = """
fastgpt.data.__main__ fastgpt.data.progress fastgpt.doctor.__main__ fastgpt.doctor.report.page fastgpt.doctor.report.text
fastgpt.plan fastgpt.training.explain
bench.audit bench.kill_campaign bench.precision bench.project bench.refusals
bench.reports.calibration bench.reports.mfu_tables bench.reports.page bench.reports.pictures
bench.conftest bench.test_host bench.test_kernels
"""
"""What cannot be: what prints with rich, pytest's benchmarks, and the campaigns, which are POSIX's and use psutil."""

# Only what our own files ask for is refused: torch imports what it finds installed.
REFUSE = """
import importlib, sys
import os, signal, torch.distributed.checkpoint, triton
for module, missing in (os, "sysconf statvfs sched_getaffinity"), (signal, "SIGHUP SIGUSR1 SIGALRM SIGPIPE SIGKILL"):
    for name in missing.split():
        delattr(module, name)
sys.platform = "win32"
ours, names = tuple(sys.argv[1].split()), sys.argv[2].split()
known = sys.stdlib_module_names - set(sys.argv[3].split()) | {"torch", "triton", "numpy", "fastgpt", "bench"}
if sys.version_info < (3, 11):
    known |= {"tomli"}  # which is tomllib from 3.11 on
imported = "psutil rich safetensors filelock jinja2 markupsafe tiktoken".split() + sys.argv[3].split()
for name in list(sys.modules):
    if name.partition(".")[0] in imported:
        del sys.modules[name]

class Refuse:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(ours) and name.partition(".")[0] not in known:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name)
        print(name, repr(error), file=sys.stderr)
"""
POSIX = "resource fcntl pwd grp termios tty pty posix syslog"


def modules():
    paths = [path for folder in ("fastgpt", "bench") for path in (ROOT / folder).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(names)


def test_every_module_but_those_that_print_needs_torch_triton_and_numpy_alone():
    ours = f"{ROOT / 'fastgpt'} {ROOT / 'bench'}"
    command = [sys.executable, "-c", REFUSE, ours, " ".join(modules()), POSIX]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(PRINTS.split()), done.stderr
