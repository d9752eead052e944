"""`hicache publish` and `hicache serve --kv-events`, with a subscriber of our own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zmq")
pytest.importorskip("msgspec")

import msgspec
import zmq
from events_kit import FLAGS, store, tokens

import hicache
from hicache.cli import main
from hicache.cli.sidecar import Sidecar

PATIENCE_S = 20.0


class Listener:
    """Applies map events: medium -> block hashes."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(b"")
        self.socket.connect(address)
        self.held: dict[str, set[int]] = {}
        self.cleared = 0
        self.last = -1

    def hear(self) -> None:
        if not self.socket.poll(50):
            return
        _, sequence, payload = self.socket.recv_multipart()
        assert int.from_bytes(sequence, "big") > self.last
        self.last = int.from_bytes(sequence, "big")
        for event in msgspec.msgpack.decode(payload)[1]:
            if event["type"] == "AllBlocksCleared":
                self.held.clear()
                self.cleared += 1
                continue
            at = self.held.setdefault(event["medium"], set())
            (at.update if event["type"] == "BlockStored" else at.difference_update)(event["block_hashes"])

    def until(self, test: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not test():
            assert time.monotonic() < deadline, (self.held, self.cleared)
            self.hear()

    def close(self) -> None:
        self.context.destroy(0)


def test_a_publisher_of_its_own(sidecar: Sidecar, home: Path) -> None:
    with hicache.Client(sidecar.target) as client:
        store(client, tokens(3))
        command = [sys.executable, "-m", "hicache", "publish", "--target", sidecar.target, "--until-eof"]
        address = f"ipc://{home}/kv"
        flags = ["--bind", f"{address},replay=ipc://{home}/re", "--lost", "200ms", "--metrics-port", "0"]
        log = (home / "publisher.log").open("wb")
        with subprocess.Popen(
            [*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as child:
            assert child.stdout is not None and b"PUBLISHING" in child.stdout.readline()
            listener = Listener(address)
            store(client, tokens(4))
            listener.until(lambda: listener.held.get("CPU"))
            sidecar.stop()
            listener.until(lambda: listener.cleared and not listener.held)
            sidecar.start()
            listener.until(lambda: len(listener.held.get("DISK", ())) == 4)
            child.send_signal(signal.SIGTERM)
            listener.until(lambda: not listener.held)  # who publishes no more knows nothing any more
            assert child.wait(PATIENCE_S) == 0
            listener.close()
    log.close()
    said = (home / "publisher.log").read_text()
    assert (
        "the sidecar is out of reach" in said
        and "the sidecar was restarted" in said
        and "Traceback" not in said
    )


def test_the_sidecar_starts_and_ends_one(home: Path) -> None:
    address = f"ipc://{home}/kv"
    with Sidecar(home, (*FLAGS, "--kv-events", address)) as sidecar, hicache.Client(sidecar.target) as client:
        listener = Listener(address)
        store(client, tokens(3))
        listener.until(lambda: len(listener.held.get("CPU", ())) == 3 or listener.last > 0)
        pid = int(re.findall(r"events publisher started, pid=(\d+)", sidecar.log_path.read_text())[0])
        sidecar.stop()
        assert not Path(f"/proc/{pid}").exists(), "it ended with the sidecar"
        listener.until(lambda: listener.cleared and not listener.held)
        listener.close()
    assert "Traceback" not in sidecar.log_path.read_text()


def test_wrong_settings_are_said_before_anything_starts(
    capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    assert main.main(["publish", "--bind", ""]) == 2
    assert "names no endpoint" in capsys.readouterr().err
    assert main.main(["publish", "--bind", "tcp://127.0.0.1:1,form=map"]) == 2
    assert "no option" in capsys.readouterr().err
    assert main.main(["serve", "--socket-path", str(home / "s"), "--kv-events", "5557"]) == 2
    assert "--kv-events" in capsys.readouterr().err
