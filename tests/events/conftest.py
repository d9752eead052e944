"""A real sidecar, as `hicache serve` runs it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sidecars import Sidecar

sys.path.insert(0, str(Path(__file__).parent))

from events_kit import FLAGS


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hc") as name:  # short: socket paths are limited
        yield Path(name)


@pytest.fixture
def sidecar(home: Path) -> Iterator[Sidecar]:
    disk = ("--disk-path", str(home / "disk"), "--disk-bytes", "64MiB")
    found = Sidecar(home, (*FLAGS, *disk))
    with found:
        yield found
