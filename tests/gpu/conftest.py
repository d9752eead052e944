"""Kernels and devices. With a GPU these tests run on it; without one, Triton runs in its interpreter.

The interpreter is chosen when Triton is imported, hence here and before anything else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fake_cuda

torch = pytest.importorskip("torch", reason="the device room needs torch")

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Lets Triton 3.6's interpreter run with a numpy of these days (before 2.4; later ones it cannot take)."""
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture(params=["twin", "triton"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the tensors of a kernel test lie; the door then takes the twin or Triton."""
    from hicache.device import kernels

    if request.param == "twin":
        return torch.device("cpu")
    if not HAS_TRITON:
        pytest.skip("triton is not installed: pip install triton, its interpreter needs no GPU")
    if HAS_CUDA:
        return torch.device("cuda")
    monkeypatch.setattr(kernels, "FUSED", True)
    return torch.device("cpu")
