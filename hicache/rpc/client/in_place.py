"""Leased pages in a device tier's shared pool on a GPU, as tensors in place: steps."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from hicache.errors import HicacheError, UnsupportedError
from hicache.rpc.client.core import Core, linked
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.client.results import PoolInfo
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import Steps, Work
from hicache.rpc.common import fdproto

if TYPE_CHECKING:
    from hicache.device.pools import GpuPool


def tensors(core: Core, lease: LeaseState) -> Steps[list[Any]]:
    """The pages of a lease in a pool on a GPU: one tensor for pages that follow each other."""
    lease.check()
    if lease.granted_pages and lease.runs:
        raise UnsupportedError("these pages are in host memory", hint="read them with views() or numpy()")
    known = {extent.region_id for extent in lease.extents} <= core.pools.ids
    if lease.granted_pages and not (lease.extents and known):
        raise UnsupportedError(
            "these pages lie in no GPU memory that is shared",
            hint="fetch with device=True, from a sidecar with --share-device; or let it copy (Lease.load)",
        )
    deadline_ns = core.now_ns() + int(core.options.timeout_s * 1e9)
    link = yield from linked(core, deadline_ns, lease.terms.incarnation)
    found, page_bytes = [], lease.terms.page_bytes
    for extent in lease.extents:
        info, pool = core.pools.find(extent, page_bytes)
        if pool is None:
            pool = yield Work(functools.partial(_open, core, link, info))
        found.append(pool.rows(extent.offset, extent.pages, page_bytes, info.region.slot_stride))
    lease.check()
    return found


def _open(core: Core, link: Link, info: PoolInfo) -> GpuPool:
    if info.handle:
        return core.pools.open(info, link.incarnation)
    answer = exchange(link.fd_path, fdproto.Get(link.session_id, info.region.region_id))
    if len(answer.fds) != 1:
        for fd in answer.fds:
            os.close(fd)
        raise HicacheError(
            f"the server sent {len(answer.fds)} descriptors for region {info.region.region_id}"
        )
    return core.pools.open(info, link.incarnation, answer.fds[0])
