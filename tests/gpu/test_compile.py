"""The kernels compile for an H100-class GPU, with wide accesses and unfused arithmetic; no GPU is needed for that."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_sm90.py"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_hopper(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=380,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 14
    for name, line in found.items():
        assert not line["spills"], line
        assert line["made"] == 1, f"launches of one shape compile anew: {line}"
        if name.endswith((" host", " device")) or name == "move_rows":
            assert min(line["wide_loads"], line["wide_stores"]) >= 4, line
        if "g64" in name or "e4m3" in name:
            assert not line["fused"], line
            assert line["wide_loads" if name.endswith(" in") else "wide_stores"], line
    assert min(found["unpack tokens"]["wide_loads"], found["unpack tokens"]["wide_stores"]) >= 1
