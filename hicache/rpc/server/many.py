"""FetchMany: many look-ups, and the leases to release and renew, in one call.

The whole call is bounded as one Fetch is: its prompts together have no more bytes and pages than one prompt may have.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from hicache.errors import HicacheError, InvalidArgumentError
from hicache.rpc.pb import cache_pb2
from hicache.rpc.server import convert
from hicache.rpc.server.edge import Edge, ttl_ms, wait_ms
from hicache.rpc.server.identity import Context
from hicache.rpc.server.sessions import Session
from hicache.runtime.many import Chores, ManyResult, Query
from hicache.runtime.service import Service

MAX_LEASES_PER_CALL = 65_536


async def fetch_many(
    service: Service, edge: Edge, session: Session, request: cache_pb2.FetchManyRequest, context: Context
) -> cache_pb2.FetchManyResponse:
    """Serve one call. Raises InvalidArgumentError for one that asks too much."""
    prompts = [query.prompt for query in request.queries]  # each access copies: once
    chores = Chores(leases(request.release_lease_ids), leases(request.renew_lease_ids))
    queries = _queries(edge, session, request, prompts)
    ttl, wait = ttl_ms(request.ttl_ms), wait_ms(request.wait_ms, context)

    async def work() -> cache_pb2.FetchManyResponse:
        result = await service.fetch_many(session.number, queries, ttl_ms=ttl, wait_ms=wait, chores=chores)
        return _response(service, result)

    answer: cache_pb2.FetchManyResponse = await session.answers.answer(
        request.request_id, lambda: _digest(request, prompts), work
    )
    return answer


def leases(lease_ids: Sequence[int]) -> list[int]:
    """The leases of one call. Raises InvalidArgumentError for too many."""
    if len(lease_ids) > MAX_LEASES_PER_CALL:
        raise InvalidArgumentError(f"{len(lease_ids)} leases in one call, at most {MAX_LEASES_PER_CALL}")
    return list(lease_ids)


def _queries(
    edge: Edge, session: Session, request: cache_pb2.FetchManyRequest, prompts: Sequence[bytes]
) -> list[Query | HicacheError]:
    options = edge.options
    if len(prompts) > options.max_queries_per_call:
        raise InvalidArgumentError(
            f"{len(prompts)} queries in one call, at most {options.max_queries_per_call}",
            hint="ask in several calls",
        )
    prompts_bytes = sum(map(len, prompts))
    if prompts_bytes > options.max_prompt_bytes:
        raise InvalidArgumentError(
            f"the prompts of one call have {prompts_bytes} bytes, at most {options.max_prompt_bytes} are taken",
            hint="ask in several calls",
        )
    found: list[Query | HicacheError] = []
    pages = 0
    for query, prompt in zip(request.queries, prompts, strict=True):
        try:
            whole = edge.prompt(session, query.namespace_id, prompt)
            found.append(Query(query.namespace_id, whole, query.max_pages, convert.use(query), query.device))
            pages += len(whole) // session.namespaces[query.namespace_id].symbol_bytes
        except HicacheError as error:
            found.append(error)
    if pages > options.max_prompt_pages:
        raise InvalidArgumentError(
            f"the prompts of one call have {pages} pages, at most {options.max_prompt_pages} are taken",
            hint="ask in several calls",
        )
    return found


def _response(service: Service, result: ManyResult) -> cache_pb2.FetchManyResponse:
    response = cache_pb2.FetchManyResponse()
    if result.renewed is not None:
        response.lost_lease_ids.extend(result.renewed.lost)
        response.renewed_expires_in_ms = convert.expires_in(service, result.renewed.expires_ms)
    for outcome in result.outcomes:
        message = response.outcomes.add()
        if isinstance(outcome, HicacheError):
            refusal = message.refusal
            refusal.reason, refusal.message = outcome.code.name, outcome.message
            refusal.hint, refusal.retry_after_ms = outcome.hint, max(outcome.retry_after_ms, 0)
        else:
            convert.put_fetch(message.fetch, service, outcome)
    return response


def _digest(request: cache_pb2.FetchManyRequest, prompts: Sequence[bytes]) -> bytes:
    """Of the whole request; the prompts, which were taken out, are removed from it so that none is copied again."""
    digest = xxhash.xxh3_128(b"FetchMany")
    for query, prompt in zip(request.queries, prompts, strict=True):
        digest.update(len(prompt).to_bytes(8, "little"))
        digest.update(prompt)
        query.ClearField("prompt")
    digest.update(request.SerializeToString())
    return digest.digest()
