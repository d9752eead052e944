"""The GPU kernels in Triton's interpreter, beside their torch twins, on a machine without a GPU."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from engines_kit import ROOT, environment

RUN_S = 600


@pytest.mark.timeout(RUN_S + 30)
def test_triton_kernels_equal_their_twins() -> None:
    python = environment("triton")
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-m", "not soak"]
    ran = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    # What runs nowhere but on a GPU is skipped; that no kernel ran at all would go unnoticed otherwise.
    assert "triton is not installed" not in ran.stdout
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) > 50, ran.stdout[-2000:]
