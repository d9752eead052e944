"""What ctypes is told of CUDA, held against the headers and the library of a real toolkit, where there is one.

The headers decide: a C compiler is given our declarations as assignments to function pointers, our constants, sizes
and offsets as static assertions. No GPU is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the device room needs numpy")

from hicache.device import cuda_abi

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def toolkit() -> Path:
    """Where the CUDA toolkit is installed."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME", ""), str(Path(nvcc).resolve().parents[1]) if nvcc else ""]
    for place in [*places, "/usr/local/cuda"]:
        if place and (Path(place) / "include" / "cuda_runtime_api.h").is_file():
            return Path(place)
    pytest.skip("no CUDA toolkit: CUDA_HOME, nvcc and /usr/local/cuda lead to no cuda_runtime_api.h")


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler to read the CUDA headers with")
    return found


def compiles(compiler: str, toolkit: Path, lines: list[str]) -> str:
    """What the compiler has to say of these lines after the headers; empty where they are right."""
    head = ["#include <stddef.h>", "#include <cuda_runtime_api.h>", "#include <cuda.h>"]
    command = [compiler, "-std=gnu11", "-fsyntax-only", "-Werror", "-Wall", "-x", "c", "-"]
    done = subprocess.run(
        [*command, f"-I{toolkit / 'include'}"],
        input="\n".join([*head, *lines, ""]),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return "" if done.returncode == 0 else done.stderr


def declarations(result: str, table: dict[str, str]) -> list[str]:
    return [f"{result} (*our_{name})({text}) = {name};" for name, text in table.items()]


def batch(text: str, versions: str) -> list[str]:
    return [f"#if {versions}", *declarations("cudaError_t", {"cudaMemcpyBatchAsync": text}), "#endif"]


def test_every_function_is_declared_as_in_the_headers(compiler, toolkit):
    runtime = dict(cuda_abi.RUNTIME)
    lines = batch(runtime.pop("cudaMemcpyBatchAsync"), "CUDART_VERSION >= 13000")
    lines += batch(cuda_abi.BATCH_12, "CUDART_VERSION >= 12080 && CUDART_VERSION < 13000")
    lines += declarations("cudaError_t", runtime) + declarations("CUresult", cuda_abi.DRIVER)
    lines += declarations("const char *", {"cudaGetErrorString": "cudaError_t"})
    lines += declarations("CUresult", {"cuGetErrorString": "CUresult, const char **"})
    assert compiles(compiler, toolkit, lines) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        "cudaError_t (*f)(void *, size_t, int) = cudaMemsetAsync;",
        '_Static_assert(cudaErrorNotReady == 601, "");',
        '_Static_assert(sizeof(CUmemAccessDesc) == 16, "");',
    ],
)
def test_what_is_not_as_in_the_headers_is_found(compiler, toolkit, wrong):
    assert "error" in compiles(compiler, toolkit, [wrong])


def test_constants_and_error_codes_are_the_headers(compiler, toolkit):
    wanted = {**cuda_abi.CONSTANTS, **cuda_abi.PASSING}
    lines = [f'_Static_assert((long long)({name}) == {value}, "{name}");' for name, value in wanted.items()]
    # the driver's codes of the same numbers mean the same
    for driver, runtime in (
        ("CUDA_ERROR_INVALID_VALUE", "cudaErrorInvalidValue"),
        ("CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation"),
        ("CUDA_ERROR_INVALID_CONTEXT", "cudaErrorDeviceUninitialized"),
        ("CUDA_ERROR_INVALID_HANDLE", "cudaErrorInvalidResourceHandle"),
        ("CUDA_ERROR_NOT_PERMITTED", "cudaErrorNotPermitted"),
        ("CUDA_ERROR_NOT_SUPPORTED", "cudaErrorNotSupported"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", "cudaErrorIllegalAddress"),
    ):
        lines.append(f'_Static_assert((int){driver} == (int){runtime}, "{driver}");')
    assert compiles(compiler, toolkit, lines) == ""


def test_structures_lie_in_memory_as_in_the_headers(compiler, toolkit):
    lines = []
    for name, structure in cuda_abi.STRUCTURES.items():
        if name == "struct cudaPointerAttributes":  # grew in 13; ours is the larger
            lines.append(f'_Static_assert(sizeof({name}) <= {_size(structure)}, "{name}");')
            fields = [field for field, *_ in structure._fields_ if field != "reserved"]
        else:
            lines.append(f'_Static_assert(sizeof({name}) == {_size(structure)}, "{name}");')
            fields = [field for field, *_ in structure._fields_]
        lines += [
            f'_Static_assert(offsetof({name}, {field}) == {getattr(structure, field).offset}, "{name}.{field}");'
            for field in fields
        ]
    flags = cuda_abi.AllocationFlags
    lines.append(
        f'_Static_assert(sizeof(((CUmemAllocationProp *)0)->allocFlags) == {_size(flags)}, "flags");'
    )
    for kind, size in (("enum cudaMemcpyKind", 4), ("CUdeviceptr", 8), ("CUmemGenericAllocationHandle", 8)):
        lines.append(f'_Static_assert(sizeof({kind}) == {size}, "{kind}");')
    assert compiles(compiler, toolkit, lines) == ""


def _size(structure) -> int:
    import ctypes

    return ctypes.sizeof(structure)


def test_the_real_runtime_has_every_function_and_says_that_there_is_no_gpu(toolkit):
    """In a process of its own, so that this one does not take it for its CUDA."""
    found = sorted((toolkit / "lib64").glob("libcudart.so.*"))
    if not found:
        pytest.skip(f"{toolkit} has no libcudart.so")
    code = f"""
from hicache.device.cudart import Cudart, _path
from hicache.device.cuda_abi import RUNTIME
runtime = Cudart({str(found[0])!r})
assert not [name for name in RUNTIME if not runtime.has(name)]
assert _path() == {str(found[0].resolve())!r}, _path()
assert runtime.version >= 12080
if not runtime.devices():
    try:
        runtime.malloc(1)
    except Exception as error:
        print(type(error).__name__, error, error.fatal)
else:
    print("DriverError: this machine has a GPU")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "DriverError" in done.stdout
