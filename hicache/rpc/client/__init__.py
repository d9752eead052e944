"""The clients: ``Client`` here, its asyncio twin in ``hicache.rpc.client.aio``."""

from __future__ import annotations

from hicache.rpc.client.client import Client, Lease, NamespaceHandle, Reservation
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
from hicache.rpc.client.watch import EventBatch, PageEvents, WatchedNamespace, WatchKind

__all__ = [
    "Advice",
    "CheckResult",
    "Client",
    "ClientOptions",
    "CommitResult",
    "DataPlane",
    "EventBatch",
    "EvictResult",
    "Lease",
    "MatchResult",
    "NamespaceHandle",
    "OperationResult",
    "PageEvents",
    "PinResult",
    "PrefetchResult",
    "Reservation",
    "Stats",
    "StoreResult",
    "Tls",
    "Tree",
    "Verify",
    "WatchKind",
    "WatchedNamespace",
]
