"""One gRPC client of a running sidecar, as a contender of ``bench/rpc.py``. Runs in the project's environment.

What is timed is the stub call alone, on one channel: the request object is built inside the timed part, its
``prompt`` bytes exist before. ``empty`` is grpc.health.v1 Check on the same server: what a unary call costs whatever
it does. ``cpu_us`` is client and server together.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import grpc
import numpy as np
from contender import serve
from grpc_health.v1 import health_pb2, health_pb2_grpc

import hicache
from hicache.rpc.pb import cache_pb2, cache_pb2_grpc

PAGE_TOKENS = 64
PAGE_BYTES = 4096
CALLS = 60
LENGTHS = {"2k": 2_048, "8k": 8_192, "32k": 32_768, "131k": 131_072}


def process_cpu_us(pid: int) -> float:
    """CPU time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * 1e4


class Setup:
    """A client with a namespace of tokens and one of hashes, both holding a prompt of 131,072 tokens."""

    def __init__(self, target: str, server_pid: int) -> None:
        self.server_pid = server_pid
        self.client = hicache.Client(target)
        rng = np.random.default_rng(7)
        self.tokens = rng.integers(0, 1 << 17, LENGTHS["131k"], dtype=np.int32).tobytes()
        self.hashes = rng.bytes(32 * (LENGTHS["131k"] // PAGE_TOKENS))
        by_tokens = self.client.namespace(model="bench", page_tokens=PAGE_TOKENS, page_bytes=PAGE_BYTES)
        by_hashes = self.client.namespace(
            model="bench",
            page_tokens=PAGE_TOKENS,
            page_bytes=PAGE_BYTES,
            symbol_kind="hashes",
            symbol_hash_bytes=32,
        )
        page = bytes(PAGE_BYTES)
        for cache, prompt in ((by_tokens, self.tokens), (by_hashes, self.hashes)):
            cache.store(prompt, lambda _number, view: view.__setitem__(slice(None), page))
            assert cache.match(prompt).matched_pages == LENGTHS["131k"] // PAGE_TOKENS
        core = self.client._driver.core
        link = core.session.current()
        assert link is not None
        self.session = link.session_id
        self.channel = grpc.insecure_channel(
            target.replace("unix://", "unix:"), [("grpc.max_send_message_length", -1)]
        )
        self.match = cache_pb2_grpc.CacheServiceStub(self.channel).Match
        self.health = health_pb2_grpc.HealthStub(self.channel).Check
        self.by_tokens, self.by_hashes = self._namespace_id(by_tokens), self._namespace_id(by_hashes)

    def _namespace_id(self, handle: object) -> int:
        return int(handle._state.number)  # type: ignore[attr-defined]

    def sampler(self, call: Callable[[], object]) -> Callable[[], dict[str, object]]:
        """A mean over CALLS calls, with one wall time a call."""

        def sample() -> dict[str, object]:
            taken = []
            cpu = time.process_time_ns() / 1e3 + process_cpu_us(self.server_pid)
            for _ in range(CALLS):
                begin = time.perf_counter_ns()
                call()
                taken.append((time.perf_counter_ns() - begin) / 1e3)
            cpu = time.process_time_ns() / 1e3 + process_cpu_us(self.server_pid) - cpu
            return {
                "cpu_us": cpu / CALLS,
                "wall_us": sum(taken) / CALLS,
                "iterations": CALLS,
                "latencies_us": taken,
            }

        return sample

    def match_call(self, namespace: int, prompt: bytes, pages: int) -> Callable[[], object]:
        """A Match that must find ``pages`` pages."""

        def call() -> object:
            answer = self.match(
                cache_pb2.MatchRequest(session_id=self.session, namespace_id=namespace, prompt=prompt)
            )
            assert answer.matched_pages == pages
            return answer

        return call


def cases(spec: dict) -> dict:
    """The cases, each a function that returns a sampler."""
    setup = Setup(spec["target"], spec["server_pid"])
    empty = health_pb2.HealthCheckRequest()
    found: dict[str, Callable[[], object]] = {"empty": lambda: setup.sampler(lambda: setup.health(empty))}
    for name, length in LENGTHS.items():
        pages = length // PAGE_TOKENS
        tokens, hashes = setup.tokens[: 4 * length], setup.hashes[: 32 * pages]
        found[f"match_{name}_bytes"] = lambda t=tokens, p=pages: setup.sampler(
            setup.match_call(setup.by_tokens, t, p)
        )
        found[f"match_{name}_hashes"] = lambda h=hashes, p=pages: setup.sampler(
            setup.match_call(setup.by_hashes, h, p)
        )
    return found


if __name__ == "__main__":
    serve("hicache", cases, lambda: {"hicache": hicache.__version__, "grpcio": grpc.__version__})
