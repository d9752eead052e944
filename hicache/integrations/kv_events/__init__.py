"""KV events for routers: what a sidecar holds, published over ZMQ in the formats of vLLM and SGLang.

``hicache publish`` and ``hicache serve --kv-events`` run it; docs/EVENTS.md tells what consumers get. Needs the extra
``events`` (pyzmq, msgspec).
"""

from __future__ import annotations

from hicache.integrations.kv_events.publisher import Publisher
from hicache.integrations.kv_events.spec import OutletSpec, parse_outlet, parse_outlets

__all__ = ["OutletSpec", "Publisher", "parse_outlet", "parse_outlets"]
