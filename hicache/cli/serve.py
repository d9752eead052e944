"""``hicache serve``: the sidecar. Puts service, gRPC server and metrics together on one event loop.

The first SIGTERM or SIGINT drains: no new leases, copies finished, pages saved, all within the grace. A
second one stops at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from hicache.cli import config, publishing, units
from hicache.cli.settings import ClientConfig, ServeConfig, settings_of
from hicache.errors import ConfigError
from hicache.policy import make_admission, make_policy
from hicache.types import TierKind, TierSpec, WritePolicy

if TYPE_CHECKING:
    from hicache.rpc.server import Server, ServerOptions
    from hicache.runtime import Service, ServiceOptions

EPILOG = """\
examples:
  hicache serve                                        1GiB of host memory on the default socket
  hicache serve --host-bytes 64GiB --disk-path /data/hicache --disk-bytes 500GiB
  hicache serve --device cpu --device-bytes 1GiB --host-bytes 8GiB
  hicache serve --device cuda:0,cuda:1 --device-bytes 80GiB --host-bytes 256GiB
  hicache serve --config hicache.toml --print-config   what would be used, as TOML
  hicache serve --tcp-address 0.0.0.0:7070 --tls-cert c.pem --tls-key k.pem --token-file tokens

Settings come from flags, HICACHE_* variables (HICACHE_HOST_BYTES=8GiB), a TOML file and defaults, in this
order. Tiers are used fastest first: device, host, disk; leave one out by leaving out its size. One line on
standard output says when it serves; logs go to standard error. exit codes: 0 drained or stopped; 2 bad
settings.
"""

READY_WORD = "SERVING"
_SETTING_NAME = re.compile(r"(?<![\w/.-])[a-z]+(?:_[a-z]+)+(?![\w/-])")  # not within a path
#: Settings that name one of several, by the last word of their own name.
_NAMED: dict[str, Callable[[str], object]] = {"policy": make_policy, "admission": make_admission}
log = logging.getLogger("hicache.serve")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Run the sidecar in the foreground until SIGTERM or Ctrl-C."
    parser.epilog = EPILOG
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with settings; default: $HICACHE_CONFIG, or none"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings in effect as TOML, and end"
    )
    parser.add_argument(
        "--until-eof",
        action="store_true",
        help="also drain when standard input ends, so that a parent that dies leaves no sidecar behind",
    )
    config.add_flags(parser, ServeConfig)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    settings = config.load_serve(arguments)
    if not settings.socket_path:
        settings = dataclasses.replace(settings, socket_path=config.default_socket_path())
    if arguments.print_config:
        sys.stdout.write(config.to_toml(settings))
        return 0
    if not __debug__:
        raise ConfigError("hicache does not serve under python -O: it relies on its asserts")
    from hicache.runtime.log import setup_logging

    setup_logging(settings.log_level)
    for warning in config.suspicious_variables(
        config.environment(), (*settings_of(ServeConfig), *settings_of(ClientConfig))
    ):
        log.warning(warning)
    config.prepare_socket_dir(settings.socket_path)
    if settings.kv_events:
        publishing.check(settings.kv_events)
    try:
        asyncio.run(_serve(settings, until_eof=arguments.until_eof))
    except ConfigError as error:
        raise ConfigError(_by_flags(error.message), hint=_by_flags(error.hint)) from error
    return 0


def _by_flags(text: str) -> str:
    """The rooms below know settings by the names of their options; people know them by their flags."""
    flags = {found.name: found.flag for found in settings_of(ServeConfig)}
    return _SETTING_NAME.sub(lambda name: flags.get(name[0], name[0]), text)


def service_options(settings: ServeConfig) -> ServiceOptions:
    """The service's part of the settings. Raises ConfigError."""
    from hicache.runtime import ServiceOptions

    for found in settings_of(ServeConfig):
        make = _NAMED.get(found.name.rpartition("_")[2])
        if make is not None and not found.choices:
            check_name(found.flag, make, getattr(settings, found.name))
    return ServiceOptions(
        **_part(settings, ServiceOptions) | {"write_policy": WritePolicy(settings.write_policy)}
    )


def check_name(flag: str, make: Callable[[str], object], name: str) -> None:
    """Refuse an unknown policy or admission by its flag, of a tier that is not configured, too. Raises ConfigError."""
    if not name:
        return
    try:
        make(name)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error.message}", hint=error.hint) from error


def server_options(settings: ServeConfig) -> ServerOptions:
    """The gRPC server's part of the settings. Raises ConfigError."""
    from hicache.rpc.server import ServerOptions

    return ServerOptions(**_part(settings, ServerOptions))


def _part(settings: ServeConfig, options: type) -> dict[str, Any]:
    theirs = {field.name for field in dataclasses.fields(options)}
    return {
        found.name: getattr(settings, found.name)
        for found in settings_of(ServeConfig)
        if found.name in theirs
    }


class _Stop:
    """What signals, and the end of standard input, ask for: first to drain, then to stop at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.asked = asyncio.Event()
        self.now = asyncio.Event()

    def listen(self, *, until_eof: bool) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signal, number)
        if until_eof:
            self._loop.add_reader(sys.stdin.fileno(), self._read)

    def _signal(self, number: signal.Signals) -> None:
        log.info(
            "%s: %s", signal.Signals(number).name, "stopping at once" if self.asked.is_set() else "draining"
        )
        (self.now if self.asked.is_set() else self.asked).set()

    def _read(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            self._loop.remove_reader(sys.stdin.fileno())
            log.info("standard input ended: draining")
            self.asked.set()


async def _serve(settings: ServeConfig, *, until_eof: bool) -> None:
    from hicache.rpc.server import serve
    from hicache.runtime import Service

    stop = _Stop(asyncio.get_running_loop())
    stop.listen(until_eof=until_eof)
    service = Service(service_options(settings))
    options = server_options(settings)
    await service.start()
    try:
        with _metrics(service, settings.metrics_port):
            server = await serve(service, options)
            try:
                target = f"unix://{settings.socket_path}"
                async with publishing.publisher(settings.kv_events, target, settings.log_level):
                    gc.freeze()  # what was imported stays: to look through it takes a collection 0.1 s
                    _announce(settings, service, server)
                    await _first(stop.asked.wait(), server.wait_drained())
                    server.drain(settings.grace_ms)
                    await _first(stop.now.wait(), server.wait_drained())
            finally:
                await server.stop(0 if stop.now.is_set() else settings.grace_ms)
    finally:
        await service.close()


@contextlib.contextmanager
def _metrics(service: Service, port: int) -> Iterator[None]:
    """Prometheus metrics while this lasts; port 0: none."""
    if not port:
        yield
        return
    from hicache.runtime.metrics import start_http

    try:
        metrics = start_http(service, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--metrics-port: cannot listen on 127.0.0.1:{port}: {error}") from error
    log.info("metrics url=http://127.0.0.1:%d/metrics", metrics.port)
    try:
        yield
    finally:
        metrics.close()


async def _first(*waits: Coroutine[None, None, object]) -> None:
    """Return when the first of them does; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _tier_words(spec: TierSpec, settings: ServeConfig) -> str:
    """A tier's size; of a bound on real disk use, also how much of it pages can take."""
    pages = units.human_size(spec.capacity_bytes)
    if spec.kind is not TierKind.DISK:
        return f"{spec.name} {pages}"
    return f"{spec.name} {units.human_size(settings.disk_bytes)} (pages take up to {pages})"


def _announce(settings: ServeConfig, service: Service, server: Server) -> None:
    """One line for people and scripts, one for the log."""
    tiers = [_tier_words(spec, settings) for spec in service.specs]
    addresses = " ".join(server.addresses)
    print(f"hicache {READY_WORD} on {addresses} with {', '.join(tiers)}", flush=True)
    log.info(
        "serving pid=%d addresses=%s tiers=%s policy=%s write_policy=%s",
        os.getpid(),
        ",".join(server.addresses),
        ",".join(f"{spec.name}:{spec.capacity_bytes}" for spec in service.specs),
        settings.policy,
        settings.write_policy,
    )
