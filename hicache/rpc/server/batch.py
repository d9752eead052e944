"""BatchService: many short prompts of one length in one call, each with its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hicache.errors import HicacheError, InvalidArgumentError
from hicache.rpc.pb import batch_pb2
from hicache.rpc.server.edge import Edge, session_call, wait_ms
from hicache.rpc.server.idempotency import payload_digest
from hicache.rpc.server.identity import Context
from hicache.rpc.server.sessions import Session
from hicache.runtime.service import Service
from hicache.types import Ack

MAX_PROMPTS_PER_CALL = 4096
#: How long a prompt's reservation may stay, should its commit never come to run.
RESERVE_TTL_MS = 30_000

Places = list[tuple[int, int]]


class BatchServicer:
    """Serves BatchService."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self.edge = edge
        self._service = service

    @session_call
    async def MatchMany(
        self, session: Session, request: batch_pb2.MatchManyRequest, _: Context
    ) -> batch_pb2.MatchManyResponse:
        """How much of each prompt is cached."""
        prompts = self._prompts(session, request)
        matched = [
            self._service.match(
                request.namespace_id, prompt, touch=request.touch, prefetch=request.prefetch
            ).pages
            for prompt in prompts
        ]
        return batch_pb2.MatchManyResponse(matched_pages=matched)

    @session_call
    async def StoreMany(
        self, session: Session, request: batch_pb2.StoreManyRequest, context: Context
    ) -> batch_pb2.StoreManyResponse:
        """Reserve and commit each prompt, all at once."""
        prompts = self._prompts(session, request)
        pages = len(prompts) * request.prompt_pages
        if not len(request.region_id) == len(request.offset) == len(request.checksums) == pages:
            raise InvalidArgumentError(
                f"{pages} pages, {len(request.region_id)} regions, {len(request.offset)} offsets, "
                f"{len(request.checksums)} checksums: the columns must have one entry a page"
            )
        store = _Store(self._service, session.number, request, wait_ms(request.wait_ms, context))

        async def work() -> batch_pb2.StoreManyResponse:
            outcomes = await asyncio.gather(*(store.one(i, prompt) for i, prompt in enumerate(prompts)))
            return batch_pb2.StoreManyResponse(outcomes=outcomes)

        answer: batch_pb2.StoreManyResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request), work
        )
        return answer

    def _prompts(
        self, session: Session, request: batch_pb2.MatchManyRequest | batch_pb2.StoreManyRequest
    ) -> Sequence[bytes]:
        """The prompts of a call. Raises InvalidArgumentError, NotFoundError."""
        whole = self.edge.prompt(session, request.namespace_id, request.prompts)
        each = request.prompt_pages * session.namespaces[request.namespace_id].symbol_bytes
        if not each or len(whole) % each or len(whole) != len(request.prompts):
            raise InvalidArgumentError(
                f"{len(request.prompts)} bytes are not a whole number of prompts of {request.prompt_pages} pages"
            )
        if len(whole) // each > MAX_PROMPTS_PER_CALL:
            raise InvalidArgumentError(
                f"{len(whole) // each} prompts in one call, at most {MAX_PROMPTS_PER_CALL}"
            )
        return [whole[at : at + each] for at in range(0, len(whole), each)]


class _Store:
    """One StoreMany under way."""

    def __init__(
        self, service: Service, session: int, request: batch_pb2.StoreManyRequest, wait_ms: int
    ) -> None:
        self._service = service
        self._session = session
        self._namespace = request.namespace_id
        self._places: Places = list(zip(request.region_id, request.offset, strict=True))
        self._checksums = list(request.checksums)
        self._pages = request.prompt_pages
        self._wait_ms = wait_ms
        self._ack = Ack.DURABLE if request.durable else Ack.VISIBLE

    async def one(self, index: int, prompt: bytes) -> batch_pb2.StoreOutcome:
        """What became of one prompt; never raises for it."""
        outcome = batch_pb2.StoreOutcome()
        try:
            await self._store(index * self._pages, prompt, outcome)
        except HicacheError as error:
            outcome.reason, outcome.message = error.code.name, error.message
        return outcome

    async def _store(self, base: int, prompt: bytes, outcome: batch_pb2.StoreOutcome) -> None:
        service, session = self._service, self._session
        room = await service.reserve(
            session, self._namespace, prompt, ttl_ms=RESERVE_TTL_MS, wait_ms=self._wait_ms
        )
        outcome.present_pages = room.present_pages
        if not room.missing_pages:
            return
        missing = range(room.present_pages, room.present_pages + room.missing_pages)
        try:
            result = await service.commit(
                session,
                room.reservation,
                [(page, 1) for page in missing],
                [self._places[base + page] for page in missing],
                checksums=[self._checksums[base + page] for page in missing],
                ack=self._ack,
                last=True,
            )
        except HicacheError:
            service.abort(session, room.reservation)
            raise
        outcome.stored_pages = result.stored_pages + result.already_present_pages
        if result.failed_pages:
            outcome.reason, outcome.message = "CORRUPT", "the bytes are not what their checksum says"
