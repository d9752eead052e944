"""The clients: ``Client`` here, its asyncio twin in ``hicache.rpc.client.aio``."""

from __future__ import annotations

from hicache.rpc.client.client import Client, NamespaceHandle
from hicache.rpc.client.copier import Copier, Packing
from hicache.rpc.client.held import Lease, Reservation
from hicache.rpc.client.kv import Loaded
from hicache.rpc.client.kv_held import KvRegion, Load, Store
from hicache.rpc.client.kv_memory import KvMemory
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
from hicache.rpc.client.watch import EventBatch, PageEvents, WatchedNamespace, WatchKind

__all__ = [
    "Advice",
    "CheckResult",
    "Client",
    "ClientOptions",
    "CommitResult",
    "Copier",
    "DataPlane",
    "EventBatch",
    "EvictResult",
    "FetchQuery",
    "ForeignMemory",
    "KvMemory",
    "KvRegion",
    "Lease",
    "LeaseTicket",
    "Load",
    "Loaded",
    "MatchResult",
    "NamespaceHandle",
    "OperationResult",
    "Packing",
    "PageEvents",
    "PinResult",
    "PrefetchResult",
    "Reservation",
    "Staging",
    "StagingRun",
    "Stats",
    "Store",
    "StoreResult",
    "TicketReader",
    "TicketRun",
    "Tls",
    "Tree",
    "Verify",
    "WatchKind",
    "WatchedNamespace",
]
