"""examples/engine_kv.py as a user runs it: two engines, two processes."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a copier needs torch")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("codec", "most"), [("", 0.0), pytest.param("fp8-e4m3", 1 / 16, marks=pytest.mark.soak)]
)
def test_the_second_engine_loads_what_the_first_stored(lasting_sidecar: Any, codec: str, most: float) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "engine_kv.py"),
        lasting_sidecar.target,
        "--tokens",
        "200",
    ]
    done = subprocess.run(
        [*command, *(["--codec", codec] if codec else [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "loaded 0 of 200 tokens" in lines[0] and "stored 192 tokens" in lines[1]
    assert "loaded 192 of 200 tokens" in lines[2] and "stored 0 tokens" in lines[3]
    found = re.search(r"off by ([\d.]+)", lines[2])
    assert found is not None and float(found[1]) <= most


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["unix:///nowhere/x"], "not attached to unix:///nowhere/x"),
        (["unix:///x", "--device", "cuda:0"], "no GPU"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(options: list[str], why: str) -> None:
    if "cuda:0" in options and importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "engine_kv.py"), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert why in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
