"""A real sidecar in a process of its own, and both clients behind one asynchronous face."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sidecars import BareSidecar

import hicache
import hicache.aio
from hicache.rpc.client import KvRegion, Lease, Load, NamespaceHandle, Reservation, Store


@pytest.fixture
def idle_sidecar() -> Iterator[BareSidecar]:
    """Not started, so that a test can set it up."""
    with tempfile.TemporaryDirectory(prefix="hc") as home:  # short: socket paths are limited
        sidecar = BareSidecar(Path(home))
        yield sidecar
        sidecar.kill()


@pytest.fixture
def sidecar(idle_sidecar: BareSidecar) -> BareSidecar:
    return idle_sidecar.start()


def lasting(**service: Any) -> Iterator[BareSidecar]:
    with tempfile.TemporaryDirectory(prefix="hc") as home:
        sidecar = BareSidecar(Path(home))
        sidecar.service |= service
        yield sidecar.start()
        sidecar.kill()


@pytest.fixture(scope="module")
def lasting_sidecar() -> Iterator[BareSidecar]:
    """One for all tests of a file that leave it as it is."""
    yield from lasting()


@pytest.fixture(scope="module")
def device_sidecar() -> Iterator[BareSidecar]:
    """As ``lasting_sidecar``, with a device tier whose pool is shared."""
    yield from lasting(device="cpu", device_bytes=8 << 20, share_device=True)


#: The same, and not awaited, in both clients.
PLAIN = {
    "namespace",
    "still_valid",
    "buffer",
    "pages",
    "ticket",
    "staging",
    "adopt",
    "adopt_memory",
    "kv_memory",
    "places",
    "layer_done",
    "layer_done_on",
}
WRAPPED = (KvRegion, Lease, Load, NamespaceHandle, Reservation, Store)


class Awaited:
    """The synchronous client as the asyncio one looks, so that one test drives either."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "admin":
            return Awaited(found)
        if not callable(found):
            return found
        if name in PLAIN:
            return lambda *args, **kwargs: wrap(found(*unwrap(args), **kwargs))

        async def call(*args: Any, **kwargs: Any) -> Any:
            plain = dict(zip(kwargs, unwrap(tuple(kwargs.values())), strict=True))
            return wrap(await asyncio.to_thread(found, *unwrap(args), **plain))

        return call

    def __len__(self) -> int:
        return len(self._inner)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Awaited) and other._inner is self._inner

    def __hash__(self) -> int:
        return id(self._inner)

    async def __aenter__(self) -> Awaited:
        await asyncio.to_thread(self._inner.__enter__)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await asyncio.to_thread(self._inner.__exit__, *error)


def wrap(found: Any) -> Any:
    if type(found) in {list, tuple} and any(isinstance(each, WRAPPED) for each in found):
        return type(found)(wrap(each) for each in found)
    return Awaited(found) if isinstance(found, WRAPPED) else found


def unwrap(args: tuple[Any, ...]) -> list[Any]:
    def inner(arg: Any) -> Any:
        if isinstance(arg, list) and any(isinstance(item, Awaited) for item in arg):
            return [inner(item) for item in arg]
        return arg._inner if isinstance(arg, Awaited) else arg

    return [inner(arg) for arg in args]


@pytest.fixture(params=["sync", "aio"])
def make_client(request: pytest.FixtureRequest) -> Any:
    """Makes either client, as the asyncio one looks."""

    def make(target: str, **fields: Any) -> Any:
        if request.param == "aio":
            return hicache.aio.Client(target, **fields)
        return Awaited(hicache.Client(target, **fields))

    return make
