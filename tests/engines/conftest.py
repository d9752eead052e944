"""Real engines: environments, models, the host process that makes vLLM engines, and sidecars.

Everything here is marked e2e, which `make test` leaves out and `make e2e` runs. An environment that is missing is a
skip that names the command; in CI it is a failure.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TEST_S = 300
sys.path.insert(0, str(HERE))

from engines_kit import Host, SidecarBox, environment  # noqa: E402
from engines_models import Models  # noqa: E402
from engines_oracle import Oracle  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nobody has to remember the marker, and no real engine starts by accident in `make test`."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)
            if (
                item.get_closest_marker("timeout") is None
            ):  # engines take seconds to start, and minutes where others work
                item.add_marker(pytest.mark.timeout(TEST_S))


@pytest.fixture(scope="session")
def vllm_host() -> Iterator[Host]:
    """The process that has imported vLLM and forks engines."""
    with Host(environment("vllm")) as host:
        yield host


@pytest.fixture(scope="session")
def models(vllm_host: Host) -> Iterator[Models]:
    """Model folders by shape, made when first asked for, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="hicache-models-") as folder:
        yield Models(vllm_host, Path(folder))


@pytest.fixture
def sidecar() -> Iterator[Callable[..., SidecarBox]]:
    """Makes sidecars, each in a folder of its own (short: a socket's path has 107 bytes), killed at the end."""
    with ExitStack() as stack:

        def make(*flags: str, host: str = "256MiB", disk: str = "", start: bool = True) -> SidecarBox:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hc-")))
            return stack.enter_context(SidecarBox(folder, flags, host=host, disk=disk, start=start))

        yield make


@pytest.fixture(scope="session")
def oracle(vllm_host: Host) -> Oracle:
    """What vLLM says without us."""
    return Oracle(vllm_host)
