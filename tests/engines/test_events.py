"""What real consumers make of published events: Dynamo's indexer, and the decoder in vLLM's own package."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines_kit import environment

import hicache
from hicache.cli.sidecar import Sidecar

zmq = pytest.importorskip("zmq")

PAGE_TOKENS, PAGE_BYTES = 32, 4096
PATIENCE_S = 30.0


def ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


def tokens(pages: int, salt: int = 0, rest: int = 0) -> list[int]:
    """A prompt of whole pages; those of one salt share their beginning."""
    return [salt * 100_000 + n for n in range(pages * PAGE_TOKENS + rest)]


def store(client: hicache.Client, ids: list[int], model: str = "m") -> Any:
    cache = client.namespace(model=model, page_bytes=PAGE_BYTES, page_tokens=PAGE_TOKENS)
    cache.store(ids, np.zeros((len(ids) // PAGE_TOKENS, PAGE_BYTES), dtype=np.uint8))
    return cache


class Indexer:
    """``python -m dynamo.indexer``, with one worker: ours."""

    def __init__(self, folder: Path, block_size: int) -> None:
        (self.port,) = ports(1)
        self.block_size = block_size
        self.log = folder / "indexer.log"
        command = [str(environment("dynamo")), "-m", "dynamo.indexer", "--block-size", str(block_size)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--threads", "1"], stdout=log, stderr=subprocess.STDOUT
            )

    def ask(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def register(self, endpoint: str, replay: str) -> None:
        """Registering before the indexer listens is tried again."""
        worker = {"instance_id": 7, "endpoint": endpoint, "replay_endpoint": replay, "model_name": "m"}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.ask("/register", worker | {"block_size": self.block_size})
                return
            except urllib.error.URLError:
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)

    def held(self, ids: list[int]) -> tuple[int, int]:
        """How many tokens of a prompt it believes to be in RAM, and in RAM and on disk together."""
        found = self.ask("/query", {"token_ids": ids, "model_name": "m"})["instances"].get("7", {})
        return found.get("cpu", 0), found.get("disk", 0)

    def wait(self, ids: list[int], cpu: int, disk: int) -> None:
        """Until it knows it so."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.held(ids)) != (cpu, disk):
            assert time.monotonic() < deadline, f"{found}, not {(cpu, disk)}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Relay:
    """Hands messages on from the publisher to a port of its own, and drops those that ``drop`` says."""

    def __init__(self, endpoint: str) -> None:
        (port,) = ports(1)
        self.address = f"tcp://127.0.0.1:{port}"
        self.drop: Callable[[], bool] = lambda: False
        self.dropped = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(endpoint,))
        self._thread.start()

    def _run(self, endpoint: str) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as come, context.socket(zmq.PUB) as go:
            come.subscribe(b"")
            come.connect(endpoint)
            go.bind(self.address)
            while not self._over.is_set():
                if not come.poll(20):
                    continue
                frames = come.recv_multipart()
                if self.drop():
                    self.dropped += 1
                else:
                    go.send_multipart(frames)
            go.setsockopt(zmq.LINGER, 0)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Iterator[tuple[Sidecar, Indexer, Relay]]:
    """A sidecar that publishes, a relay, and Dynamo's indexer behind it."""
    options, block_size = request.param
    publish, replay = (f"tcp://127.0.0.1:{port}" for port in ports(2))
    with tempfile.TemporaryDirectory(prefix="hc") as name, contextlib.ExitStack() as stack:
        home = Path(name)
        flags = (
            "--host-bytes", "8MiB", "--host-segment-bytes", "1MiB", "--disk-path", str(home / "disk"),
            "--disk-bytes", "64MiB", "--kv-events", f"{publish},replay={replay}{options}",
        )  # fmt: skip
        sidecar = stack.enter_context(Sidecar(home, flags))
        relay = Relay(publish)
        stack.callback(relay.close)
        indexer = Indexer(home, block_size)
        stack.callback(indexer.close)
        indexer.register(relay.address, replay)
        yield sidecar, indexer, relay


def publisher_pid(sidecar: Sidecar) -> int:
    return int(re.findall(r"events publisher started, pid=(\d+)", sidecar.log_path.read_text())[-1])


@pytest.mark.parametrize("scene", [("", 32), (",block_size=16,format=map", 16)], indirect=True)
def test_dynamo_answers_prefix_queries_rightly(scene: tuple[Sidecar, Indexer, Relay]) -> None:
    """Through stores, branches, eviction, a gap, and restarts of publisher and sidecar."""
    sidecar, indexer, relay = scene
    with hicache.Client(sidecar.target) as client:
        store(client, tokens(10))
        indexer.wait(tokens(10, rest=5), 320, 320)
        branch = tokens(4) + tokens(3, salt=1)
        cache = store(client, branch)
        store(client, tokens(6, salt=9), model="another")  # the indexer is asked of "m" only
        indexer.wait(branch, 224, 224)
        assert indexer.held(tokens(2)) == (64, 64)
        assert indexer.held(tokens(4) + tokens(3, salt=2)) == (128, 128)
        assert indexer.held(tokens(3, salt=4)) == (0, 0)
        client.admin.evict(cache, branch[: 5 * PAGE_TOKENS])  # and what is below it
        indexer.wait(branch, 128, 128)
        assert indexer.held(tokens(10)) == (320, 320)

        relay.drop = lambda: True
        store(client, tokens(5, salt=5))
        store(client, tokens(7, salt=6))
        deadline = time.monotonic() + PATIENCE_S
        while relay.dropped < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert indexer.held(tokens(5, salt=5)) == (0, 0)
        relay.drop = lambda: False  # the next message, a beat at the latest, shows the gap
        indexer.wait(tokens(5, salt=5), 160, 160)
        indexer.wait(tokens(7, salt=6), 224, 224)

        os.kill(publisher_pid(sidecar), signal.SIGKILL)
        store(client, tokens(12, salt=7))
        indexer.wait(tokens(12, salt=7), 384, 384)
        assert indexer.held(tokens(10)) == (320, 320)
        assert indexer.held(branch) == (128, 128)
    sidecar.stop()
    indexer.wait(tokens(10), 0, 0)  # nothing can be fetched from what is not there
    sidecar.start()
    indexer.wait(tokens(10), 0, 320)  # saved at the stop
    indexer.wait(tokens(12, salt=7), 0, 384)
    assert indexer.held(branch) == (0, 128)
    sidecar.kill()
    sidecar.start()
    with hicache.Client(sidecar.target) as client:
        store(client, tokens(3, salt=8))
        indexer.wait(tokens(3, salt=8), 96, 96)
        indexer.wait(tokens(10), 0, 320)
        with client.namespace(model="m", page_bytes=PAGE_BYTES, page_tokens=PAGE_TOKENS).fetch(
            tokens(10), wait_ms=5000
        ) as lease:
            assert len(lease) == 10
        indexer.wait(tokens(10), 320, 320)  # promoted


DECODE = """
import json, sys
import msgspec
from vllm.distributed.kv_events import KVEventBatch
for line in sys.stdin:
    batch = msgspec.msgpack.Decoder(KVEventBatch).decode(bytes.fromhex(line))
    rows = [dict(msgspec.structs.asdict(event), kind=type(event).__name__) for event in batch.events]
    print(json.dumps([batch.ts, batch.data_parallel_rank, rows], default=lambda b: b.hex()))
"""


@pytest.mark.parametrize("form", ["int", "bytes"])
def test_vllms_own_decoder_reads_them(form: str) -> None:
    python = environment("vllm")
    (port,) = ports(1)
    with tempfile.TemporaryDirectory(prefix="hc") as name:
        spec = f"tcp://127.0.0.1:{port},hash={form},rank=3,topic=kv@{{pod}}@{{model}}"
        with Sidecar(Path(name), ("--host-bytes", "8MiB", "--kv-events", spec)) as sidecar:
            frames = listen(f"tcp://127.0.0.1:{port}", sidecar)
    answer = subprocess.run(
        [str(python), "-c", DECODE],
        input="\n".join(payload.hex() for _, _, payload in frames),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    batches = [json.loads(line) for line in answer.stdout.splitlines()]
    assert {rank for _, rank, _ in batches} == {3}
    rows = [row for _, _, batch in batches for row in batch]
    stored = next(row for row in rows if row["kind"] == "BlockStored")
    assert stored["token_ids"] == tokens(3) and stored["block_size"] == PAGE_TOKENS
    assert (stored["medium"], stored["parent_block_hash"], len(stored["block_hashes"])) == ("CPU", None, 3)
    gone = [row for row in rows if row["kind"] == "BlockRemoved"]
    assert sorted(h for row in gone for h in row["block_hashes"]) == sorted(stored["block_hashes"])
    assert all(topic == f"kv@{socket.gethostname()}@m".encode() for topic, _, _ in frames)


def listen(endpoint: str, sidecar: Sidecar) -> list[list[bytes]]:
    """What is published of a prompt that is stored and dropped again."""
    frames: list[list[bytes]] = []
    with zmq.Context() as context, context.socket(zmq.SUB) as listener:
        listener.subscribe(b"")
        listener.connect(endpoint)
        with hicache.Client(sidecar.target) as client:
            deadline = time.monotonic() + PATIENCE_S
            while not any(b"BlockStored" in each[2] for each in frames):
                assert time.monotonic() < deadline
                store(client, tokens(3))  # again, if it was before anybody listened
                if listener.poll(500):
                    frames.append(listener.recv_multipart())
                elif not frames:
                    client.admin.clear()
            client.admin.clear()
            while not any(b"BlockRemoved" in each[2] for each in frames):
                assert listener.poll(int(PATIENCE_S * 1000))
                frames.append(listener.recv_multipart())
    return [each for each in frames if b"Block" in each[2]]
