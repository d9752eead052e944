"""An engine in a process of its own, as the tests of two processes run it: says on stdout how far it is."""

from __future__ import annotations

import asyncio
import sys

import grpc
from kv_kit import LAYERS, Engine, Kv, checksum
from server_kit import Client

ROWS = [[0], [4], [8]]
TARGETS = [[64], [68], [72]]


async def whole(engine: Engine) -> None:
    """Store with layers as they come, then load to elsewhere; compare."""
    kv = Kv()
    region = await engine.register(kv)
    timeline, counters = await engine.timeline()
    reserved = await engine.reserve(3)
    fields = {"timeline_id": timeline, "counter": 0}
    commit = asyncio.ensure_future(engine.commit(region, reserved.reservation_id, ROWS, **fields))
    kv.fill(9)
    for layer in range(LAYERS):
        await asyncio.sleep(0.005)
        counters.set(0, layer + 1)
    assert (await commit).stored_pages == 3
    lease = await engine.fetch(3)
    assert list(lease.extents.checksums) == [checksum(kv.page(row)) for row in ROWS]
    loaded = await engine.load(lease.lease_id, region, TARGETS, timeline_id=timeline, counter=1)
    assert loaded.loaded_pages == 3
    assert counters.get(1) == LAYERS
    assert [kv.page(row) for row in TARGETS] == [kv.page(row) for row in ROWS]
    await engine.unregister(region)
    say("done")


async def loading(engine: Engine) -> None:
    """Begin a Load, and be killed in it."""
    region = await engine.register(Kv())
    lease = await engine.fetch(3)
    say("loading")
    await engine.load(lease.lease_id, region, TARGETS)


async def computing(engine: Engine) -> None:
    """Begin a Commit, count half of the layers, and be killed then."""
    region = await engine.register(Kv())
    timeline, counters = await engine.timeline()
    reserved = await engine.reserve(3)
    call = engine.commit(region, reserved.reservation_id, ROWS, timeline_id=timeline)
    commit = asyncio.ensure_future(call)
    await asyncio.sleep(0.05)
    counters.set(0, LAYERS // 2)
    say("computing")
    await commit


def say(word: str) -> None:
    print(word, flush=True)


async def main(path: str, what: str) -> None:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        engine = await Engine.attach(Client(channel, path + ".fd"))
        await {"whole": whole, "loading": loading, "computing": computing}[what](engine)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
