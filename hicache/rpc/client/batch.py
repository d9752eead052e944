"""Many short prompts in one call: look-ups, and stores straight out of registered memory.

A store's pages lie in regions: the client's own write memory, or memory of the engine's own (``ForeignMemory``), which
the server then copies from directly. Their checksums travel along: memory that changes before the server has read it
is refused, never stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hicache.errors import InvalidArgumentError
from hicache.rpc.client.core import Attempt, Budget, Core, NamespaceState, invoke, named, opened
from hicache.rpc.client.region import Region
from hicache.rpc.client.steps import Call, Step, Steps
from hicache.rpc.client.storing import registered
from hicache.rpc.pb import batch_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a page's bytes lie, and their xxh3-64."""

    region: Region
    offset: int
    checksum: int


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """One prompt's outcome: ``reason`` is empty where all of it is cached now."""

    present_pages: int
    stored_pages: int
    reason: str
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class StoreAsk:
    """How to store: the time to wait for room, and when to answer."""

    wait_ms: int
    durable: bool = False


def match_many(
    core: Core, namespace: NamespaceState, prompts: Sequence[bytes], budget: Budget
) -> Steps[list[int]]:
    """How many pages of each prompt are cached; what is not in reach begins to be promoted."""
    if not prompts:
        return []
    joined, pages = _joined(namespace, prompts)
    reply = yield from named(
        core,
        "MatchMany",
        namespace,
        lambda who, _: batch_pb2.MatchManyRequest(
            session_id=who.session_id,
            namespace_id=who.namespace_id,
            prompts=joined,
            prompt_pages=pages,
            touch=True,
            prefetch=True,
        ),
        budget,
    )
    return list(reply.message.matched_pages)


def store_many(
    core: Core,
    namespace: NamespaceState,
    stores: Sequence[tuple[bytes, Sequence[Place]]],
    ask: StoreAsk,
    budget: Budget,
) -> Steps[list[Stored]]:
    """Store prompts whose pages lie in these places, those that are missing. One outcome each, in their order."""
    if not stores:
        return []
    joined, pages = _joined(namespace, [prompt for prompt, _ in stores])
    places = [place for _, given in stores for place in given]
    request_id = core.new_id()

    def step(attempt: Attempt) -> Steps[Step]:
        number = yield from opened(namespace, attempt)
        ids: dict[int, int] = {}
        for place in places:
            if id(place.region) not in ids:
                ids[id(place.region)] = yield from registered(core, place.region, attempt)
        request = batch_pb2.StoreManyRequest(
            session_id=attempt.link.session_id,
            request_id=request_id,
            namespace_id=number,
            prompts=joined,
            prompt_pages=pages,
            region_id=[ids[id(place.region)] for place in places],
            offset=[place.offset for place in places],
            checksums=[place.checksum for place in places],
            wait_ms=ask.wait_ms,
            durable=ask.durable,
        )
        return Call("StoreMany", request, attempt.left_s)

    reply = yield from invoke(core, step, budget)
    return [
        Stored(each.present_pages, each.stored_pages, each.reason, each.message)
        for each in reply.message.outcomes
    ]


def _joined(namespace: NamespaceState, prompts: Sequence[bytes]) -> tuple[bytes, int]:
    """The prompts one after another, and the pages of each. Raises InvalidArgumentError for unequal ones."""
    width = namespace.spec.symbol_bytes
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1 or max(lengths) % width or not max(lengths):
        raise InvalidArgumentError(f"prompts of one call must have one length, of whole {width}-byte symbols")
    return b"".join(prompts), max(lengths) // width
