"""The WritePages stream: chunks into whole, checksummed pages, with at most one page in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import xxhash

from hicache.errors import ExistsError, InvalidArgumentError
from hicache.rpc.pb import cache_pb2
from hicache.rpc.server import convert
from hicache.rpc.server.idempotency import Claim, StreamAnswer
from hicache.rpc.server.sessions import Session
from hicache.runtime.service import Service
from hicache.types import Ack

Chunks = AsyncIterator[cache_pb2.WritePagesRequest]


class PageAssembler:
    """Puts the chunks of one page after another together. The service checks what the checksums say."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._buffer = bytearray()
        self._page = -1

    def add(self, chunk: cache_pb2.PageChunk) -> bytearray | None:
        """Take a chunk; the whole page when this was its last.

        Raises InvalidArgumentError for a chunk that does not follow the one before.
        """
        data = chunk.data
        if not self._buffer:
            if chunk.page <= self._page:
                raise InvalidArgumentError(f"WritePages: page {chunk.page} comes after page {self._page}")
            self._page = chunk.page
        if chunk.page != self._page or chunk.offset != len(self._buffer) or not data:
            raise InvalidArgumentError(
                f"WritePages: page {self._page} continues at offset {len(self._buffer)}, "
                f"not with {len(data)} bytes of page {chunk.page} at {chunk.offset}"
            )
        if chunk.offset + len(data) > self._page_bytes:
            raise InvalidArgumentError(
                f"WritePages: page {chunk.page} has more than {self._page_bytes} bytes"
            )
        self._buffer += data
        if len(self._buffer) < self._page_bytes:
            return None
        whole, self._buffer = self._buffer, bytearray()
        return whole

    def end(self) -> None:
        """Raise InvalidArgumentError where the stream ended within a page."""
        if self._buffer:
            raise InvalidArgumentError(f"WritePages: the stream ended within page {self._page}")


async def write_pages(
    service: Service, session: Session, opening: cache_pb2.WritePagesRequest.Open, chunks: Chunks
) -> cache_pb2.CommitResponse:
    """Serve one stream after its Open message; a retried one is read to its end and answered as the first."""
    digest = xxhash.xxh3_128(opening.SerializeToString())
    while True:
        claim = session.answers.claim(opening.request_id)
        if claim is None:
            return await _write(service, session, opening, _digesting(chunks, digest))
        if isinstance(claim, Claim):
            break
        first: StreamAnswer | None = await asyncio.shield(claim)
        if first is not None:
            return await _repeat(first, opening, _digesting(chunks, digest), digest)
    try:
        response = await _write(service, session, opening, _digesting(chunks, digest))
        claim.finish(StreamAnswer(digest.digest(), response))
        return response
    finally:
        claim.fail()


async def _write(
    service: Service,
    session: Session,
    opening: cache_pb2.WritePagesRequest.Open,
    chunks: AsyncIterator[cache_pb2.PageChunk],
) -> cache_pb2.CommitResponse:
    writer = service.begin_write(session.number, opening.reservation_id)
    try:
        pages = PageAssembler(writer.page_bytes)
        async for chunk in chunks:
            whole = pages.add(chunk)
            if whole is not None:
                await writer.put(chunk.page, whole, chunk.checksum)
        pages.end()
        ack = Ack.DURABLE if opening.durable else Ack.VISIBLE
        return convert.commit_response(await writer.commit(ack, last=opening.last))
    finally:
        writer.close()


async def _repeat(
    first: StreamAnswer,
    opening: cache_pb2.WritePagesRequest.Open,
    chunks: AsyncIterator[cache_pb2.PageChunk],
    digest: xxhash.xxh3_128,
) -> cache_pb2.CommitResponse:
    async for _ in chunks:
        pass
    if digest.digest() != first.digest:
        raise ExistsError(f"request id {opening.request_id.hex()} was used with another payload")
    response: cache_pb2.CommitResponse = first.response
    return response


async def _digesting(chunks: Chunks, digest: xxhash.xxh3_128) -> AsyncIterator[cache_pb2.PageChunk]:
    async for message in chunks:
        if message.WhichOneof("event") != "chunk":
            raise InvalidArgumentError("WritePages: after Open come chunks")
        chunk = message.chunk
        # the checksum on a page's last chunk stands for its bytes
        digest.update(b"%d %d %d " % (chunk.page, chunk.offset, chunk.checksum))
        yield chunk
