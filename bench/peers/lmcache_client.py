"""One client of LMCache's MP server over ZMQ, as a contender. Runs in ``bench/.venvs/lmcache``.

``lmcache_server.py`` starts the server and this. What is timed, per call, as the peer's own vLLM adapter does it:

lookup RPC (the server hashes the chunks and submits the prefetch) until it is acknowledged, then
``wait_prefetch_status`` until the number of hit chunks is known. ``ack_*`` figures are the first part alone.

The key with its tuple of token ids exists before. Releasing the read locks that a hit takes, and ending the
session, is not timed. CPU is that of client and server together.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import workloads
from contender import serve
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
)
from lmcache.v1.multiprocess.transfer_context.base import EngineDrivenContextMetadata
from lmcache.v1.multiprocess.transfer_context.pickle import EngineDrivenContextPickle
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

MODEL = "bench-model"
LENGTHS = {"2k": 2_048, "8k": 8_192, "32k": 32_768, "131k": 131_072}
CALLS_PER_SAMPLE = {"2k": 100, "8k": 60, "32k": 30, "131k": 12}
TIMEOUT_S = 30.0
LAYERS, HIDDEN = 1, 8  # small pages: the lookup does not depend on their size
_serial = itertools.count()


def make_key(ids: tuple[int, ...], worker_id: int | None) -> IPCCacheServerKey:
    """A key for the whole chunks of a prompt, with a request id of its own."""
    return IPCCacheServerKey(
        model_name=MODEL,
        world_size=1,
        worker_id=worker_id,
        token_ids=ids,
        start=0,
        end=len(ids),
        request_id=f"bench-{next(_serial)}",
        num_kv_readers=1,
    )


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue
    return total


class Client:
    """The connection, and what was stored over it."""

    def __init__(self, url: str, server_pid: int) -> None:
        self.rpc = RequestClientFactory.create(url)
        self.server_pid = server_pid
        self.chunk = self.rpc.get_chunk_size().result(timeout=TIMEOUT_S)
        payload = RegisterEngineDrivenContextPayload(
            instance_id=os.getpid(),
            model_name=MODEL,
            world_size=1,
            block_size=16,
            num_layers=LAYERS,
            hidden_dim_size=HIDDEN,
            dtype_str="bfloat16",
            use_mla=False,
            num_physical_slots=self.chunk,
        )
        self.rpc.register_kv_cache_engine_driven_context(payload).result(timeout=TIMEOUT_S)

    def store(self, ids: tuple[int, ...]) -> None:
        """Store the pages of a prompt by the engine-driven path. Raises RuntimeError if the server declines."""
        key = make_key(ids, worker_id=0)
        pages = [
            torch.full((2, LAYERS, self.chunk, HIDDEN), float(i), dtype=torch.bfloat16)
            for i in range(len(ids) // self.chunk)
        ]
        context = EngineDrivenContextPickle(
            EngineDrivenContextMetadata(layout_desc=None, block_size=16, use_mla=False), self.rpc, TIMEOUT_S
        )
        context.prepare_store(key, os.getpid())
        if not context.commit_store(key, os.getpid(), pages):
            raise RuntimeError("the server declined the store")
        self.rpc.end_session(key.request_id).result(timeout=TIMEOUT_S)

    def lookup(self, key: IPCCacheServerKey) -> tuple[float, float, int]:
        """One look-up: microseconds to the acknowledgement, to the answer, and the chunks hit."""
        start = time.perf_counter()
        self.rpc.lookup(key, 1).result(timeout=TIMEOUT_S)
        acknowledged = time.perf_counter()
        chunks = self.rpc.wait_prefetch_status(key.request_id, TIMEOUT_S).result(timeout=TIMEOUT_S)
        end = time.perf_counter()
        if chunks is None:
            raise RuntimeError("the look-up did not end in time")
        return (acknowledged - start) * 1e6, (end - start) * 1e6, chunks

    def release(self, key: IPCCacheServerKey) -> None:
        """Give back the read locks of a hit and forget the request."""
        self.rpc.free_lookup_locks(key, 1).result(timeout=TIMEOUT_S)
        self.rpc.end_session(key.request_id).result(timeout=TIMEOUT_S)

    def sample(self, ids: tuple[int, ...], calls: int, expected_chunks: int) -> dict[str, Any]:
        """A batch of look-ups of one prompt, one after the other."""
        whole, acks, cpu, wall = [], [], 0, 0.0
        for key in [make_key(ids, worker_id=None) for _ in range(calls)]:
            server, mine = cpu_ns(self.server_pid), time.process_time_ns()
            ack_us, answer_us, chunks = self.lookup(key)
            mine = time.process_time_ns() - mine
            cpu += cpu_ns(self.server_pid) - server + mine
            wall += answer_us
            whole.append(answer_us)
            acks.append(ack_us)
            if chunks != expected_chunks:
                raise RuntimeError(f"{chunks} chunks hit, {expected_chunks} expected")
            self.release(key)
        return {
            "cpu_us": cpu / calls / 1e3,
            "wall_us": wall / calls,
            "iterations": calls,
            "latencies_us": whole,
            "ack_latencies_us": acks,
        }


def prepare(raw: dict[str, Any]) -> dict[str, Callable[[], Callable[[], dict[str, Any]]]]:
    """Connect, store the hit prompts, and give the cases."""
    client = Client(raw["url"], raw["server_pid"])
    stored = tuple(workloads.tokens(raw["seed"], max(LENGTHS.values())))
    unknown = tuple(workloads.tokens(raw["seed"] + 1, max(LENGTHS.values())))
    client.store(stored)

    def case(ids: tuple[int, ...], calls: int, chunks: int) -> Callable[[], Callable[[], dict[str, Any]]]:
        return lambda: lambda: client.sample(ids, calls, chunks)

    cases = {}
    for label, length in LENGTHS.items():
        calls = CALLS_PER_SAMPLE[label]
        cases[f"lookup_hit_{label}"] = case(stored[:length], calls, length // client.chunk)
        cases[f"lookup_miss_{label}"] = case(unknown[:length], calls, 0)
    return cases


def versions() -> dict[str, str]:
    """What is measured."""
    names = ("lmcache", "torch", "numpy", "pyzmq", "msgspec", "blake3")
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}


if __name__ == "__main__":
    serve("lmcache", prepare, versions, {"transport": "zmq over loopback tcp", "chunk_tokens": 256})
