"""What the end-to-end tests share: sidecars, client processes, and waiting with a bound."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nursery
from sidecars import Sidecar
from waiting import wait_until

from hicache.rpc.client import Client
from hicache.rpc.client.results import Stats

ANSWER_S = 60.0


def tiers(folder: Path, host: str = "32MiB", disk: str = "256MiB", *more: str) -> tuple[str, ...]:
    """Flags of a sidecar; no disk tier where ``disk`` is empty."""
    flags = ["--host-bytes", host, "--no-prefault", *more]
    if disk:
        flags += ["--disk-path", str(folder / "disk"), "--disk-bytes", disk]
    return tuple(flags)


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Sidecar]:
    """A sidecar that is killed at the end, whatever happened; its log is shown where a test fails."""
    sidecar = Sidecar(folder, flags)
    try:
        yield sidecar.start()
    except BaseException:
        print(f"the sidecar's log ends with:\n{sidecar.log_tail()}")
        raise
    finally:
        sidecar.kill()


def assert_sound(client: Client) -> None:
    """The engine's own check finds nothing."""
    check = client.admin.check()
    assert check.ok, check.problem


def assert_idle(client: Client, timeout_s: float = 10.0) -> Stats:
    """Nobody holds anything any more, and the engine's own check finds nothing."""
    stats = client.admin.stats()

    def idle() -> bool:
        nonlocal stats
        stats = client.admin.stats()
        return not (stats.leases or stats.reservations or stats.waiting or stats.copies_in_flight)

    wait_until("no leases, no reservations, nobody waiting, no copies", idle, timeout_s)
    assert_sound(client)
    return stats


def within_capacity(stats: Stats) -> None:
    for tier in stats.tiers:
        assert tier.used_bytes <= tier.capacity_bytes, tier


def wait_recovered(client: Client) -> None:
    wait_until("recovery is over", lambda: not client.admin.stats().counters["recovering"])


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def metric(port: int, name: str, **labels: str) -> float:
    """One sample of a sidecar's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
    line = re.escape(name + (f"{{{shown}}}" if shown else ""))
    found = re.search(rf"^{line} (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {name} {labels}"
    return float(found.group(1))


class Failed(Exception):
    """A worker answered with an error."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"{answer['error']}: {answer['message']}")
        self.kind: str = answer["error"]


class WorkerProcess:
    """One client process, ended by its own pid."""

    def __init__(self, target: str, **options: Any) -> None:
        words = [target, json.dumps(options)]
        self._child = nursery.sidecars().fork("e2e_worker:main", words, environ=os.environ)
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def _read(self) -> None:
        for line in self._child.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def send(self, do: str, **how: Any) -> None:
        self._child.stdin.write(json.dumps({"do": do, **how}).encode() + b"\n")
        self._child.stdin.flush()

    def get(self, timeout_s: float = ANSWER_S) -> Any:
        """What it says next. Raises Failed."""
        answer = self._answers.get(timeout=timeout_s)
        assert answer is not None, f"worker {self.pid} ended with {self._child.poll()}"
        if "error" in answer:
            raise Failed(answer)
        return answer.get("ok", answer)

    def ask(self, do: str, timeout_s: float = ANSWER_S, **how: Any) -> Any:
        self.send(do, **how)
        return self.get(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._child.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._child.kill()
        self._child.wait(10)

    def close(self) -> None:
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(5)
        self._child.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None and self._child.poll() is None:
            self._child.kill()
        self.close()


def data_file(disk: Path) -> Path:
    """The file that holds the pages of a disk folder too small for more than one shard."""
    (found,) = disk.glob("shards/*/data.mdb")
    return found
