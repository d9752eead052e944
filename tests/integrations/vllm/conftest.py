"""Makes the helper modules of this folder importable by its tests; what the worker's tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def caches() -> dict[str, Any]:
    from worker_kit import FACTS, make_caches

    return make_caches(FACTS, 1)


@pytest.fixture
def worker(caches: dict[str, Any]) -> Iterator[Any]:
    from worker_kit import FACTS, make_worker

    worker = make_worker(FACTS, caches)
    yield worker
    worker.close()


@pytest.fixture
def staging() -> Iterator[Any]:
    """Room for 64 parts."""
    from worker_kit import PART, Staging

    staging = Staging(64 * PART)
    yield staging
    staging.close()
