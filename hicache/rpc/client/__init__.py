"""The clients: ``Client`` here, its asyncio twin in ``hicache.rpc.client.aio``."""

from __future__ import annotations

from hicache.rpc.client.client import Client, NamespaceHandle
from hicache.rpc.client.held import Lease, Reservation
from hicache.rpc.client.many import FetchQuery
from hicache.rpc.client.options import ClientOptions, DataPlane, Tls, Verify
from hicache.rpc.client.results import (
    Advice,
    CheckResult,
    CommitResult,
    EvictResult,
    MatchResult,
    OperationResult,
    PinResult,
    PrefetchResult,
    Stats,
    StoreResult,
    Tree,
)
from hicache.rpc.client.staging import ForeignMemory, Staging, StagingRun
from hicache.rpc.client.ticket import LeaseTicket, TicketReader, TicketRun

__all__ = [
    "Advice",
    "CheckResult",
    "Client",
    "ClientOptions",
    "CommitResult",
    "DataPlane",
    "EvictResult",
    "FetchQuery",
    "ForeignMemory",
    "Lease",
    "LeaseTicket",
    "MatchResult",
    "NamespaceHandle",
    "OperationResult",
    "PinResult",
    "PrefetchResult",
    "Reservation",
    "Staging",
    "StagingRun",
    "Stats",
    "StoreResult",
    "TicketReader",
    "TicketRun",
    "Tls",
    "Tree",
    "Verify",
]
