"""Makes the helper modules of this folder, and the end-to-end ones, importable; one nursery of children a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e"), str(HERE.parent / "runtime")]

pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from crash_kit import Nursery  # noqa: E402 - of this folder, which stands on the path only now
from crash_shim import build_shim  # noqa: E402

#: Kills that the soak makes; `make test` makes a few of them.
KILLS = int(os.environ.get("HICACHE_TEST_KILLS", "500"))


@pytest.fixture(scope="session")
def kills() -> int:
    return KILLS


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that watches and fails writes; skips, with the reason, where it cannot be built."""
    return build_shim(tmp_path_factory.mktemp("shim"))
