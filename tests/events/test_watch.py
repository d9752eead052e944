"""Watching a real sidecar with both clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from events_kit import FLAGS, PAGE_TOKENS, Picture, store, tokens
from sidecars import Sidecar

import hicache
import hicache.aio
from hicache.errors import InvalidArgumentError
from hicache.rpc.client import WatchKind

PATIENCE_S = 20.0


def follow(watch: Any, picture: Picture, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline, f"waited in vain: {picture.kinds[-5:]}, {len(picture.held)}"
        picture.apply(next(watch))


class InThread:
    """An asyncio watch as a synchronous iterator, so that one test drives either client."""

    def __init__(self, target: str, **ask: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.client = self.run(self._client(target))
        self.watch = self.client.watch(**ask)

    async def _client(self, target: str) -> hicache.aio.Client:
        return hicache.aio.Client(target)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def __next__(self) -> Any:
        return self.run(self.watch.__anext__())

    def close(self) -> None:
        self.run(self.watch.close())
        with pytest.raises(StopAsyncIteration):
            self.run(self.watch.__anext__())
        self.run(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Plain:
    def __init__(self, target: str, **ask: Any) -> None:
        self.client = hicache.Client(target)
        self.watch = self.client.watch(**ask)

    def __next__(self) -> Any:
        return next(self.watch)

    def close(self) -> None:
        self.watch.close()
        with pytest.raises(StopIteration):
            next(self.watch)
        self.client.close()


@pytest.fixture(params=[Plain, InThread])
def watching(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    opened: list[Any] = []

    def make(target: str, **ask: Any) -> Any:
        opened.append(request.param(target, **({"progress_ms": 100, "lost_ms": 300} | ask)))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_a_snapshot_then_news_then_a_restart(sidecar: Sidecar, watching: Callable[..., Any]) -> None:
    picture = Picture()
    with hicache.Client(sidecar.target) as client:
        store(client, tokens(5))
        watch = watching(sidecar.target)
        follow(watch, picture, lambda: WatchKind.CAUGHT_UP in picture.kinds)
        assert picture.kinds[0] is WatchKind.RESET
        assert (picture.pages("host"), picture.pages("disk")) == (5, 0)
        store(client, tokens(9))
        store(client, tokens(3, salt=1), model="other")
        follow(watch, picture, lambda: picture.pages("host") == 12)
        assert {place[0] for place in picture.held} == {"m", "other"}
        client.admin.clear()
        follow(watch, picture, lambda: not picture.held)
        store(client, tokens(4))
        follow(watch, picture, lambda: picture.pages("host") == 4)
        follow(watch, picture, lambda: picture.kinds[-1] is WatchKind.PROGRESS)
    sidecar.stop()
    follow(watch, picture, lambda: picture.kinds[-1] is WatchKind.LOST)
    assert picture.kinds.count(WatchKind.LOST) == 1
    sidecar.start()
    follow(watch, picture, lambda: picture.kinds[-1] is WatchKind.RESET)
    follow(watch, picture, lambda: picture.pages("disk") == 4)  # saved at the stop, recovered
    follow(
        watch,
        picture,
        lambda: WatchKind.CAUGHT_UP in picture.kinds[-3:] or picture.kinds[-1] is WatchKind.PROGRESS,
    )
    assert picture.pages("host") == 0


def test_filters(sidecar: Sidecar, watching: Callable[..., Any]) -> None:
    picture = Picture()
    with hicache.Client(sidecar.target) as client:
        store(client, tokens(2), model="a")
        store(client, tokens(3), model="b")
        all_of_it = Picture()
        watch = watching(sidecar.target)
        follow(watch, all_of_it, lambda: WatchKind.CAUGHT_UP in all_of_it.kinds)
        wanted = [client.namespace(model="b", page_bytes=4096, page_tokens=PAGE_TOKENS)]
        wanted[0].match(tokens(1))
        only = watching(sidecar.target, fingerprints=[wanted[0]._state.fingerprint], tiers=["host"])
        follow(only, picture, lambda: WatchKind.CAUGHT_UP in picture.kinds)
        assert {place[0] for place in picture.held} == {"b"} and len(picture.held) == 3
        disk = Picture()
        durable = watching(sidecar.target, tiers=["disk"])
        follow(durable, disk, lambda: WatchKind.CAUGHT_UP in disk.kinds)
        assert not disk.held
        with pytest.raises(InvalidArgumentError):
            next(watching(sidecar.target, tiers=["tape"]))
        with pytest.raises(InvalidArgumentError):
            next(watching(sidecar.target, fingerprints=[b"short"]))


def test_a_broken_stream_goes_on_where_it_was(sidecar: Sidecar) -> None:
    picture = Picture()
    with hicache.Client(sidecar.target) as client, hicache.Client(sidecar.target) as other:
        store(client, tokens(2))
        with other.watch(progress_ms=100) as watch:
            follow(watch, picture, lambda: WatchKind.CAUGHT_UP in picture.kinds)
            for pages in (4, 6, 8):
                watch._state._stream.cancel()
                store(client, tokens(pages))
                follow(watch, picture, lambda: picture.pages("host") == pages)  # noqa: B023
        assert picture.kinds.count(WatchKind.RESET) == 1
        assert WatchKind.LOST not in picture.kinds


def test_tenants_see_their_own(home: Path) -> None:
    (home / "tokens").write_text("red " + "r" * 16 + "\nblue " + "b" * 16 + "\nboss " + "x" * 16 + " admin\n")
    (home / "tokens").chmod(0o600)
    flags = ("--tcp-address", "127.0.0.1:0", "--token-file", str(home / "tokens"), "--allow-plain-tcp")
    with Sidecar(home, (*FLAGS, *flags)) as sidecar:
        address = sidecar.ready_line.split(" with ")[0].split()[-1]
        target = f"{address.rpartition(':')[0]}:{address.rpartition(':')[2]}"
        with (
            hicache.Client(target, token="r" * 16) as red,
            hicache.Client(target, token="b" * 16) as blue,
            hicache.Client(target, token="x" * 16) as boss,
        ):
            store(red, tokens(3), model="red's")
            pictures = {"red": Picture(), "blue": Picture(), "boss": Picture(), "all": Picture()}
            watches = {
                "red": red.watch(progress_ms=50),
                "blue": blue.watch(progress_ms=50),
                "boss": boss.watch(progress_ms=50),
                "all": boss.watch(progress_ms=50, all_tenants=True),
            }
            for name, watch in watches.items():
                follow(watch, pictures[name], lambda: WatchKind.CAUGHT_UP in pictures[name].kinds)  # noqa: B023
            store(blue, tokens(2), model="blue's")
            follow(watches["blue"], pictures["blue"], lambda: pictures["blue"].pages("host") == 2)
            follow(watches["all"], pictures["all"], lambda: pictures["all"].pages("host") == 5)
            for name in ("red", "boss"):
                follow(watches[name], pictures[name], lambda: pictures[name].kinds[-1] is WatchKind.PROGRESS)  # noqa: B023
            assert {place[0] for place in pictures["red"].held} == {"red's"}
            assert not pictures["boss"].held
            assert {place[0] for place in pictures["blue"].held} == {"blue's"}
            with pytest.raises(hicache.errors.DeniedError):
                next(red.watch(all_tenants=True))
