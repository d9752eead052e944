"""What an endpoint says and answers, with batches made by hand."""

from __future__ import annotations

import asyncio
import itertools
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("zmq")
pytest.importorskip("msgspec")

import msgspec
import zmq
from events_kit import tokens

from hicache.errors import ConfigError
from hicache.integrations.kv_events import OutletSpec, Publisher, parse_outlet, parse_outlets
from hicache.integrations.kv_events.metrics import start_http
from hicache.integrations.kv_events.outlet import END_SEQUENCE
from hicache.keys import chain_keys, fingerprint
from hicache.rpc.client.watch import EventBatch, PageEvents, WatchedNamespace, WatchKind
from hicache.types import Namespace, SymbolKind

TOKENS = 16
PATIENCE_MS = 10_000
RESET, DONE = EventBatch(WatchKind.RESET), EventBatch(WatchKind.CAUGHT_UP, 1)


def namespace(**fields: Any) -> WatchedNamespace:
    spec = Namespace(**({"model": "m", "page_tokens": TOKENS, "page_bytes": 4096} | fields))
    return WatchedNamespace(spec, fingerprint(spec))


PLAIN = namespace()


def pages(
    prompt: Any, first: int = 0, *, stored: bool = True, tier: str = "host", of: WatchedNamespace = PLAIN
) -> PageEvents:
    """The pages of a prompt from ``first`` on."""
    raw = prompt.astype("<i4").tobytes()
    keys = chain_keys(of.fingerprint, raw, 4 * TOKENS)
    parent = keys[first - 1] if first else b""
    return PageEvents(
        stored, of, tier, parent, tuple(keys[first:]), raw[first * 4 * TOKENS :] if stored else b""
    )


def news(*events: PageEvents) -> EventBatch:
    return EventBatch(WatchKind.NEWS, 1, b"", events)


_NAMES = itertools.count()


class Stage:
    """A publisher, its subscriber, and one who asks for replays."""

    def __init__(self, options: str = "", *, retold: list[EventBatch] | None = None) -> None:
        number = next(_NAMES)
        spec = f"inproc://kv{number},replay=inproc://re{number}{options}"
        self.publisher = Publisher([parse_outlet(spec)], pod="pod", now_s=lambda: 5.0)
        self.outlet = self.publisher.outlets[0]
        self.retold = retold or []
        context = self.publisher._context
        self.listener = context.socket(zmq.SUB)
        self.listener.subscribe(b"")
        self.listener.connect(self.outlet.spec.bind)
        self.asker = context.socket(zmq.DEALER)
        self.asker.connect(self.outlet.spec.replay)

    async def tell(self, *batches: EventBatch) -> None:
        for batch in batches:
            await self.publisher.publish(batch)

    def heard(self) -> list[tuple[str, int, list[Any]]]:
        """(topic, sequence, events) of what has come; batches are [5.0, events, rank]."""
        found = []
        while self.listener.poll(50):
            topic, sequence, payload = self.listener.recv_multipart()
            ts, events, _rank = msgspec.msgpack.decode(payload)
            assert ts == 5.0
            found.append((topic.decode(), int.from_bytes(sequence, "big"), events))
        return found

    async def replay(self, *frames: bytes) -> list[list[bytes]]:
        """What is answered, up to the end."""
        answering = asyncio.create_task(self.outlet.answer())
        self.asker.send_multipart([b"", *frames])
        found: list[list[bytes]] = []
        try:
            while not found or found[-1][-2] != END_SEQUENCE:
                await asyncio.sleep(0.005)
                while self.asker.poll(0):
                    found.append(self.asker.recv_multipart())
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        assert all(each[0] == b"" for each in found)
        return [each[1:] for each in found[:-1]]

    def close(self) -> None:
        self.listener.close(0)
        self.asker.close(0)
        self.publisher._close()


@pytest.fixture
def stage() -> Iterator[Any]:
    opened: list[Stage] = []

    def make(options: str = "") -> Stage:
        opened.append(Stage(options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def number(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def test_maps_as_vllm_and_sglang_write_them(stage: Any) -> None:
    one = stage(",sequence=zero,rank=2")
    prompt = tokens(3)
    keys = pages(prompt).keys
    asyncio.run(one.tell(RESET, EventBatch(WatchKind.SNAPSHOT, 0, b"", (pages(prompt[:32]),)), DONE))
    asyncio.run(one.tell(news(pages(prompt, 2), pages(prompt, tier="disk"), pages(prompt, 1, stored=False))))
    heard = one.heard()
    assert [(topic, sequence) for topic, sequence, _ in heard] == [("", 0), ("", 1), ("", 2)]
    assert heard[0][2] == [{"type": "AllBlocksCleared"}]
    assert heard[1][2] == [
        {
            "type": "BlockStored",
            "block_hashes": [number(keys[0]), number(keys[1])],
            "parent_block_hash": None,
            "token_ids": prompt[:32].tolist(),
            "block_size": TOKENS,
            "lora_id": None,
            "medium": "CPU",
            "lora_name": None,
        }
    ]
    added, on_disk, gone = heard[2][2]
    assert added["parent_block_hash"] == number(keys[1]) and added["token_ids"] == prompt[32:].tolist()
    assert (on_disk["medium"], len(on_disk["block_hashes"])) == ("DISK", 3)
    assert gone == {"type": "BlockRemoved", "block_hashes": [number(k) for k in keys[1:]], "medium": "CPU"}


def test_arrays_whole_hashes_and_names(stage: Any) -> None:
    one = stage(",format=array,hash=bytes,cpu=CPU_PINNED,topic=kv@{pod}@{model}@{adapter}")
    lora = namespace(adapter="pirate")
    event = pages(tokens(1), of=lora)
    asyncio.run(one.tell(RESET, news(event, pages(tokens(1), stored=False, of=lora))))
    (topic, first, cleared), (_, second, rows) = one.heard()
    assert topic == "kv@pod@m@pirate" and cleared == [["AllBlocksCleared"]]
    assert first == 5_000_000 and second == first + 1, "numbers begin with the clock"
    stored = ["BlockStored", [event.keys[0]], None, tokens(1).tolist(), TOKENS, None, "CPU_PINNED", "pirate"]
    assert rows == [stored, ["BlockRemoved", [event.keys[0]], "CPU_PINNED"]]


def test_smaller_blocks_are_chained_and_shared(stage: Any) -> None:
    """Pages that begin alike share blocks, which are gone with the last of them only."""
    one = stage(",block_size=4")
    left, right = tokens(2), tokens(2)
    right[10:] += 7777  # alike in the first two blocks of page 0
    asyncio.run(one.tell(RESET, news(pages(left), pages(right))))
    _, (_, _, (a, b)) = one.heard()
    assert a["block_size"] == 4 and len(a["block_hashes"]) == 8 == len(set(a["block_hashes"]))
    assert a["block_hashes"][:2] == b["block_hashes"][:2]
    assert not set(a["block_hashes"][2:]) & set(b["block_hashes"][2:])
    assert a["block_hashes"][3] == number(pages(left).keys[0])
    asyncio.run(one.tell(news(pages(left, 1, stored=False))))
    asyncio.run(one.tell(news(pages(left[:16], stored=False))))
    (_, _, (tail,)), (_, _, (head,)) = one.heard()
    assert set(tail["block_hashes"]) == set(a["block_hashes"][4:])
    assert set(head["block_hashes"]) == set(a["block_hashes"][2:4]), "two of its blocks are still another's"
    asyncio.run(one.tell(news(pages(right, stored=False))))
    ((_, _, (last,)),) = one.heard()
    assert set(last["block_hashes"]) == set(b["block_hashes"])
    assert not one.publisher._desks[0]._blocks._shared and not one.publisher._desks[0]._blocks._inner


def test_what_routers_would_get_wrong_is_not_published(stage: Any) -> None:
    one = stage(",model=m,block_size=8")
    others = (
        namespace(model="other"),
        namespace(salt="s"),
        namespace(extra_key_bytes=8),
        namespace(page_tokens=12),
        namespace(symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=32),
    )
    events = [PageEvents(True, of, "host", b"", (b"k" * 32,), bytes(of.spec.symbol_bytes)) for of in others]
    asyncio.run(one.tell(RESET, news(*events, pages(tokens(1)))))
    _, (_, _, rows) = one.heard()
    assert len(rows) == 1 and rows[0]["token_ids"] == tokens(1).tolist()


def test_a_gap_with_the_sidecar_clears_every_topic(stage: Any) -> None:
    one = stage(",topic={model}")
    asyncio.run(one.tell(RESET, news(pages(tokens(1)), pages(tokens(2), of=namespace(model="n")))))
    assert [topic for topic, _, _ in one.heard()] == ["m", "m", "n", "n"]
    asyncio.run(one.tell(EventBatch(WatchKind.LOST), RESET))
    cleared = one.heard()
    assert [topic for topic, _, _ in cleared] == ["m", "n", "m", "n"]
    assert all(events == [{"type": "AllBlocksCleared"}] for _, _, events in cleared)


def test_replay_always_answers(stage: Any) -> None:
    one = stage(",sequence=zero,buffer=4")

    async def scenario() -> None:
        await one.tell(RESET, *(news(pages(tokens(1, salt=salt))) for salt in range(3)))
        whole = await one.replay((0).to_bytes(8, "big"))
        assert [int.from_bytes(frames[1], "big") for frames in whole] == [0, 1, 2, 3]
        assert [frames[1:] for frames in whole] == [
            [sequence.to_bytes(8, "big"), payload] for sequence, _, payload in one.outlet._kept
        ]
        assert len(await one.replay((3).to_bytes(8, "big"))) == 1
        assert await one.replay((4).to_bytes(8, "big")) == [], "nothing yet"
        assert await one.replay((2**63).to_bytes(8, "big")) == []
        assert await one.replay(b"what?") == []
        assert await one.replay() == [] and await one.replay(b"") == []

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_who_asks_for_what_is_not_kept_is_told_anew(stage: Any) -> None:
    one = stage(",sequence=zero,buffer=2")

    async def retell() -> Any:
        for payload in (b"cleared", b"all there is", b"and more"):
            yield b"", payload

    async def scenario() -> None:
        one.outlet.retell = retell
        await one.tell(RESET, *(news(pages(tokens(1, salt=salt))) for salt in range(4)))
        found = await one.replay((1).to_bytes(8, "big"))
        assert [(int.from_bytes(sequence, "big"), payload[:4]) for _, sequence, payload in found[:3]] == [
            (1, b"clea"), (2, b"all "), (2, b"and "),
        ]  # fmt: skip
        assert [int.from_bytes(frames[1], "big") for frames in found[3:]] == [3, 4]
        assert one.outlet.retold == 1
        assert len(await one.replay((3).to_bytes(8, "big"))) == 2 and one.outlet.retold == 1

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_slow_subscriber_loses_only_its_own_messages(stage: Any) -> None:
    one = stage(",sequence=zero,hwm=3,buffer=100")
    one.listener.close(0)
    slow = one.publisher._context.socket(zmq.SUB)
    slow.setsockopt(zmq.RCVHWM, 2)
    slow.subscribe(b"")
    slow.connect(one.outlet.spec.bind)
    quick = one.publisher._context.socket(zmq.SUB)
    quick.subscribe(b"")
    quick.connect(one.outlet.spec.bind)
    heard: list[int] = []

    async def scenario() -> None:
        await one.tell(RESET)
        for salt in range(50):
            await one.tell(news(pages(tokens(1, salt=salt))))
            while quick.poll(20):
                heard.append(int.from_bytes(quick.recv_multipart()[1], "big"))

    try:
        asyncio.run(asyncio.wait_for(scenario(), 30))
        assert heard == list(range(51))
        got = []
        while slow.poll(50):
            got.append(int.from_bytes(slow.recv_multipart()[1], "big"))
        assert got[0] == 0 and len(got) < 20, "and the next number it hears shows the gap"
        asyncio.run(one.tell(news(pages(tokens(1)))))
        assert slow.poll(PATIENCE_MS) and int.from_bytes(slow.recv_multipart()[1], "big") == 51
    finally:
        slow.close(0)
        quick.close(0)


def test_counts_for_prometheus(stage: Any) -> None:
    one = stage()
    asyncio.run(one.tell(RESET, news(pages(tokens(5))), DONE))
    stop, port = start_http(one.publisher, 0)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    stop()
    for line in ("stored_blocks_total 5.0", "resets_total 1.0", "caught_up 1.0", "revision 1.0"):
        assert f"hicache_events_{line}" in text
    assert f'hicache_events_messages_total{{endpoint="{one.outlet.spec.bind}"}} 2.0' in text


def test_endpoints_as_text() -> None:
    first, second = parse_outlets(
        "tcp://*:5557 ; ipc:///tmp/kv,replay=tcp://*:1,format=array,rank=4,hwm=9,topic=a{pod}"
    )
    assert first == OutletSpec("tcp://*:5557") and second.rank == 4 and second.medium("disk") == "DISK"
    for text, words in {
        "5557": "no ZMQ address",
        "tcp://*:1,replay=x": "no ZMQ address",
        "tcp://*:1,replay=tcp://*:1": "of its own",
        "tcp://*:1,form=map": "no option",
        "tcp://*:1,format=json": "map, array",
        "tcp://*:1,hash=md5": "int, bytes",
        "tcp://*:1,rank=one": "whole number",
        "tcp://*:1,rank=-1": "negative",
        "tcp://*:1,hwm=0": "at least 1",
        "tcp://*:1,topic={node}": "no template",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parse_outlet(text)


def test_an_address_in_use_is_said_so() -> None:
    publisher = Publisher([parse_outlet("tcp://127.0.0.1:0")], pod="p", now_s=lambda: 0.0)
    taken = publisher.outlets[0].address
    with pytest.raises(ConfigError, match="cannot bind"):
        Publisher([parse_outlet(taken)], pod="p", now_s=lambda: 0.0)
    publisher._close()
