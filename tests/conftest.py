"""Settings common to all tests: Hypothesis profiles, printed seeds, GPU tests skipped where there is none."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent / "shared"))  # what several folders' tests import

CI = bool(os.environ.get("CI"))
# The seed of the project's own random tests (faults, schedules). CI repeats one; other runs draw a new one.
SEED = int(os.environ.get("HICACHE_TEST_SEED", "20261120" if CI else random.randrange(2**32)))
os.environ["HICACHE_TEST_SEED"] = str(SEED)  # the processes of a parallel run draw none of their own

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci" if CI else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets the suite run on images that lack our options: an older pytest, or no pytest-timeout."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "ignored: pytest-timeout is not installed")
    if pytest.version_tuple < (9,):
        parser.addini("strict", "ignored: needs pytest 9")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the one marker that pytest-timeout would have registered."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): ignored, pytest-timeout is not installed")


def pytest_report_header() -> str:
    """Says how to repeat this run's random choices."""
    how = "ci, derandomised" if CI else "dev, a failure prints its own @reproduce_failure"
    return f"seeds: HICACHE_TEST_SEED={SEED}; hypothesis profile {how}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips GPU tests, with the reason, where they cannot run; in a parallel run long modules come first."""
    if config.getoption("dist", "no") != "no":
        long = {item.path for item in items if item.get_closest_marker("slow") is not None}
        items.sort(key=lambda item: item.path not in long)
    for item in items:
        if item.get_closest_marker("gpu") is not None and (reason := why_no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def why_no_gpu() -> str:
    """What a GPU test would miss here; empty where nothing is missing."""
    if importlib.util.find_spec("torch") is None:
        return "gpu: torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "gpu: torch finds no CUDA device"


@pytest.fixture
def seed() -> int:
    """The run's seed, printed in the header; HICACHE_TEST_SEED repeats it."""
    return SEED


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that depend on the run's seed and the test's name, not on the order of tests."""
    return random.Random(f"{seed}/{request.node.nodeid}")
