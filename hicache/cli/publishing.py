"""The publisher that ``hicache serve --kv-events`` starts beside itself, and ends with itself.

A process of its own: encoding for routers is not to take the sidecar's time. Should it end by itself, it is started
again; should the sidecar die, the child sees the end of its standard input and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator

from hicache.cli import config
from hicache.cli.publish import require_packages
from hicache.errors import ConfigError

STOP_S = 5.0
PAUSE_FIRST_S = 0.5
PAUSE_MOST_S = 30.0
#: One that lived for so long had nothing wrong with its settings: it is started again at once.
FINE_S = 60.0
log = logging.getLogger("hicache.serve")


def check(spec: str) -> None:
    """Refuse a wrong --kv-events before anything is started. Raises ConfigError."""
    require_packages()
    from hicache.integrations.kv_events.spec import parse_outlets

    try:
        if not parse_outlets(spec):
            raise ConfigError("it names no endpoint")
    except ConfigError as error:
        raise ConfigError(f"--kv-events: {error.message}", hint=error.hint) from error


@contextlib.asynccontextmanager
async def publisher(spec: str, target: str, log_level: str) -> AsyncIterator[None]:
    """A publisher of the sidecar at ``target``, while this lasts; an empty spec: none."""
    if not spec:
        yield
        return
    command = ["publish", "--until-eof", "--bind", spec, "--target", target, "--log-level", log_level]
    keeping = asyncio.create_task(_keep(command), name="hicache-publisher")
    try:
        yield
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping


async def _keep(command: list[str]) -> None:
    """Run the child, again and again, until cancelled."""
    pause_s, loop = PAUSE_FIRST_S, asyncio.get_running_loop()
    while True:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hicache",
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            env=config.child_environment(),
            start_new_session=True,  # Ctrl-C is for us; we end the child in order
        )
        log.info("events publisher started, pid=%d", child.pid)
        began_s = loop.time()
        try:
            code = await child.wait()
        except asyncio.CancelledError:
            await _end(child)
            raise
        log.error("events publisher ended by itself, exit code %d; the log says why", code)
        pause_s = PAUSE_FIRST_S if loop.time() - began_s > FINE_S else min(2 * pause_s, PAUSE_MOST_S)
        await asyncio.sleep(pause_s)


async def _end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await child.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
