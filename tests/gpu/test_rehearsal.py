"""What `make gpu` runs on a GPU, rehearsed on a CUDA in ordinary memory: every case of the bench, the GPU's tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")
pytest.importorskip("xxhash", reason="the reference")

import fake_cuda  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NEW = ("transfers", "layered", "ipc", "owner")


def rehearse(*command: str, timeout_s: int) -> str:
    """What the command says, run as if there were a GPU."""
    if torch.version.cuda:
        pytest.skip("a CUDA build of torch brings its own CUDA: rehearse with a CPU build")
    fake_cuda.build()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/gpu/rehearse.py", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_bench_moves_the_right_bytes_by_every_engine():
    said = rehearse("bench/gpu.py", "--tiny", "--repetitions", "1", "--only", "copies", timeout_s=110)
    for wanted in ("kernel_gb_s", "staged_gb_s", "batch_gb_s", "a dry run"):
        assert wanted in said


def test_the_dry_run_has_the_whole_paths():
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--device", "cpu", "--tiny", "--repetitions", "1", "--only", *NEW],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert all(f"\n{case}" in f"\n{done.stdout}" for case in (*NEW, "slowdown", "ipc load")), done.stdout


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_whole_bench():
    said = rehearse("bench/gpu.py", "--tiny", "--repetitions", "1", timeout_s=1100)
    for case in (
        "transfers",
        "layered",
        "slowdown",
        "ipc",
        "overlap",
        "store",
        "d2d",
        "duplex",
        "owner",
        "kernels",
        "copies",
    ):
        assert f"\n{case}" in f"\n{said}", said


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_gpus_own_tests_and_the_conformance_suite():
    said = rehearse(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_cuda_device.py", "tests/stores",
        "-k", "cuda and not cudart", timeout_s=1100,
    )  # fmt: skip
    assert "failed" not in said
    assert "passed" in said
