"""``hicache publish``: tells routers over ZMQ which blocks a sidecar holds, in the formats of vLLM and SGLang."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hicache.cli import config, link
from hicache.cli.settings import ClientConfig, PublishConfig
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from hicache.integrations.kv_events import Publisher
    from hicache.rpc.client.aio import Client

EPILOG = """\
examples:
  hicache publish --bind 'tcp://*:5557'                      for Dynamo, and whoever reads vLLM's events
  hicache publish --bind 'tcp://*:5557,replay=tcp://*:5558'  with replay for those who missed something
  hicache publish --bind 'tcp://*:5557,topic=kv@{pod}@{model}' --pod 10.0.0.7
  hicache publish --bind 'tcp://*:5557;tcp://*:5559,format=array,block_size=16'
  hicache serve --kv-events 'tcp://*:5557'                   the same, started and ended with the sidecar

An endpoint is its address and, after commas, what differs from the defaults:
  replay=ADDRESS        where missed messages can be asked for again; default nowhere
  format=map|array      events as maps (vLLM and SGLang since 2026), or positional; default map
  topic=TEMPLATE        may name {pod}, {model}, {adapter}, {namespace}; default empty
  hash=int|bytes        block hashes as 64-bit numbers, or whole; default int
  block_size=N          the engine's block, where it is smaller than a page; default the page
  model=NAME            only this model; default all
  rank=N                data parallel rank; default 0
  gpu=, cpu=, disk=     what media are called; default GPU, CPU, DISK
  connect=1             connect to a consumer that listens at ADDRESS, instead of listening
  buffer=N, hwm=N       messages kept for replay (10000), messages waiting for a slow reader (5000)
  sequence=clock|zero   first number: the time in microseconds, so that a restart is seen as a gap; default clock
Several endpoints are separated by semicolons. Needs: pip install 'hicache[events]'. See docs/EVENTS.md.

It waits for a sidecar that is not there, and says AllBlocksCleared while one is gone. SIGTERM or Ctrl-C ends it.
exit codes: 0 ended; 2 bad settings; 3 the sidecar refused.
"""

READY_WORD = "PUBLISHING"
COUNT_EVERY_S = 60.0
log = logging.getLogger("hicache.publish")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Publish which blocks a running sidecar holds, for routers, until SIGTERM or Ctrl-C."
    parser.epilog = EPILOG
    parser.add_argument(
        "--until-eof",
        action="store_true",
        help="also end when standard input does, as a child process should",
    )
    config.add_flags(parser, PublishConfig)
    link.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Publish until told to end."""
    settings = config.load(
        PublishConfig,
        flags=config.flags_given(arguments, PublishConfig),
        variables=config.environment(),
    )
    require_packages()
    from hicache.runtime.log import setup_logging

    setup_logging(settings.log_level)
    asyncio.run(_publish(settings, link.load(arguments), until_eof=arguments.until_eof))
    return 0


def require_packages() -> None:
    """Raise ConfigError where the extra is not installed."""
    missing = [name for name in ("zmq", "msgspec") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"publishing events needs the package {' and '.join(missing)}",
            hint="pip install 'hicache[events]'",
        )


async def _publish(settings: PublishConfig, client_settings: ClientConfig, *, until_eof: bool) -> None:
    from hicache.integrations.kv_events import Publisher, parse_outlets
    from hicache.runtime.clock import Clock

    specs = parse_outlets(settings.bind)
    if not specs:
        raise ConfigError("--bind names no endpoint", hint="for example --bind tcp://*:5557")
    pod = settings.pod or socket.gethostname()
    publisher = Publisher(specs, pod=pod, now_s=Clock().wall_s)
    client = _client(client_settings)
    new_watch = functools.partial(client.watch, all_tenants=settings.all_tenants, lost_ms=settings.lost_ms)
    try:
        with _metrics(publisher, settings.metrics_port):
            _announce(publisher)
            work = asyncio.create_task(publisher.run(new_watch))
            count = asyncio.create_task(_count(publisher))
            _end_with(work, until_eof=until_eof)
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    await work
            finally:
                count.cancel()
    finally:
        await client.close()
    log.info("ended")


def _client(settings: ClientConfig) -> Client:
    from hicache.rpc.client.aio import Client

    target = settings.target or f"unix://{config.default_socket_path()}"
    return Client(target, **link.client_fields(settings, "publish"))


def _end_with(work: asyncio.Task[None], *, until_eof: bool) -> None:
    """End the work on signals, and at the end of standard input."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)

    def read() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            work.cancel()

    if until_eof:
        loop.add_reader(sys.stdin.fileno(), read)


def _announce(publisher: Publisher) -> None:
    """One line for people and scripts, one for the log."""
    places = [
        outlet.address + (f" (replay {outlet.replay_address})" if outlet.replay_address else "")
        for outlet in publisher.outlets
    ]
    print(f"hicache {READY_WORD} on {', '.join(places)}", flush=True)
    log.info("publishing pid=%d endpoints=%s", os.getpid(), ",".join(places))


async def _count(publisher: Publisher) -> None:
    """A line in the log now and then, where something happened."""
    before = -1
    while True:
        await asyncio.sleep(COUNT_EVERY_S)
        messages = sum(outlet.messages for outlet in publisher.outlets)
        if messages != before:
            counts = publisher.counts
            log.info(
                "published messages=%d stored_blocks=%d removed_blocks=%d resets=%d replayed=%d revision=%d",
                messages,
                counts.stored_blocks,
                counts.removed_blocks,
                counts.resets,
                sum(outlet.replayed for outlet in publisher.outlets),
                counts.revision,
            )
        before = messages


@contextlib.contextmanager
def _metrics(publisher: Publisher, port: int) -> Iterator[None]:
    """Prometheus metrics while this lasts; port 0: none."""
    if not port:
        yield
        return
    from hicache.integrations.kv_events.metrics import start_http

    try:
        stop, port = start_http(publisher, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--metrics-port: cannot listen on 127.0.0.1:{port}: {error}") from error
    log.info("metrics url=http://127.0.0.1:%d/metrics", port)
    try:
        yield
    finally:
        stop()
