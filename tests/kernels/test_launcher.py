"""Triton's own launcher, in C and generated for each signature, hands a kernel the grid and the arguments that our host code
passes: pointers, integers, floats, tuples, and nothing for what is compiled in.

A stub of libcuda takes the place of the GPU. A process either interprets kernels or compiles them, so this file runs itself as
a child, which prints what differs.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
CASES = ("attention bf16 D64", "layer_norm bf16 C768 residual", "adamw fp32 bf16 copy")
FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d", "i1": "<b"}


def flat(signature, values):
    """(type, value) of each parameter: a tuple's members one by one, nothing for what is compiled in."""
    for kind, value in zip(signature, values):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def packed(kind, value):
    return struct.pack("<Q", value.data_ptr()) if kind.startswith("*") else struct.pack(FORMATS[kind], value)


def child() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    from bench import ops
    from fastgpt.kernels.offline import absent_gpu

    stub = ctypes.CDLL("libcuda.so.1")
    parameters = (ctypes.c_ubyte * 8 * 256).in_dll(stub, "parameters")
    grid, launches = (ctypes.c_uint * 3).in_dll(stub, "grid"), ctypes.c_long.in_dll(stub, "launches")
    found: dict = {"launches": 0, "parameters": 0, "kernels": [], "wrong": []}

    class Launcher(driver.CudaLauncher):
        def __init__(self, src, metadata):
            super().__init__(src, metadata)
            self.src = src

        def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            name, before = self.src.name, launches.value
            expected = list(flat(self.src.signature.values(), args))
            ctypes.c_int.in_dll(stub, "expected").value = len(expected)
            super().__call__(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args)
            found["launches"] += launches.value - before
            found["kernels"].append(name)
            if tuple(grid) != (x, y, z) or launches.value != before + 1:
                found["wrong"].append([name, "grid", tuple(grid), (x, y, z)])
            for i, (kind, value) in enumerate(expected):
                found["parameters"] += 1
                bits = packed(kind, value)
                if bytes(parameters[i])[: len(bits)] != bits:
                    found["wrong"].append([name, i, kind, str(value)])

    class Driver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), Launcher

        def get_current_target(self):
            return GPUTarget("cuda", 89, 32)

        def get_current_device(self):
            return 0

        def set_current_device(self, device):
            pass

        def get_device_capability(self, device=0):
            return 8, 9

        def get_current_stream(self, device=None):
            return 0

    triton.runtime.driver.set_active(Driver())
    with absent_gpu(89):
        for name, run in ops.cases():
            if name in CASES:
                run()
    print(json.dumps(found))


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="builds a libcuda.so")
def test_kernels_get_what_host_code_passes(tmp_path):
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("stub_cuda.c")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-w", f"-I{include}", source, "-o", library], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert len(set(found["kernels"])) == 9 and found["launches"] == len(found["kernels"]) and found["parameters"] > 100


if __name__ == "__main__":
    child()
