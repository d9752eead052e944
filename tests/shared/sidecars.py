"""Sidecars for tests: ``hicache serve`` forked from a nursery, and one without the command line around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

import nursery

from hicache.cli import config, sidecar
from hicache.cli.main import main as hicache_main


class Sidecar(sidecar.Sidecar):
    """``hicache serve``, forked. A real start where a library is to be loaded before it."""

    def _launch(self, words: list[str], errors: BinaryIO) -> Any:
        if "LD_PRELOAD" in os.environ:
            return super()._launch(words, errors)
        environ = config.child_environment()
        return nursery.sidecars().fork("sidecars:serve", words, stderr=errors.fileno(), environ=environ)


def serve() -> int:
    """In the child."""
    return hicache_main(sys.argv[1:])


class BareSidecar:
    """A service and its server on a socket of its own; it can be stopped, killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.socket = str(home / "hc.sock")
        self.target = f"unix://{self.socket}"
        self.service: dict[str, Any] = {"host_bytes": 64 << 20, "host_segment_bytes": 8 << 20}
        self.server: dict[str, Any] = {"socket_path": self.socket}
        self.process: nursery.Child | None = None
        self.addresses: list[str] = []

    def start(self) -> BareSidecar:
        settings = json.dumps({"service": self.service, "server": self.server})
        self.process = nursery.sidecars().fork("sidecars:serve_bare", [settings], environ=os.environ)
        line = self.process.stdout.readline()
        assert line, "the sidecar started"
        self.addresses = json.loads(line)
        return self

    def send_signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()


def serve_bare() -> None:
    """In the child: serves until SIGTERM; the first line says where."""
    asyncio.run(_serve_bare(json.loads(sys.argv[1])))


async def _serve_bare(settings: dict[str, Any]) -> None:
    from hicache.rpc.server import ServerOptions, serve
    from hicache.runtime import Service, ServiceOptions

    service = Service(ServiceOptions(**settings["service"]))
    await service.start()
    server = await serve(service, ServerOptions(**settings["server"]))
    done = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, done.set)
    print(json.dumps(server.addresses), flush=True)
    await done.wait()
    await server.stop(500)
    await service.close()
