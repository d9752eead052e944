"""Whether it is worth asking the sidecar: after a call that went wrong, a probe has to go right first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from hicache.errors import HicacheError, UnavailableError
from hicache.integrations.vllm.namespaces import Namespaces
from hicache.integrations.vllm.requests import Identity
from hicache.rpc.client import aio

log = logging.getLogger(__name__)

#: How often ``tell`` looks whether there is something to say.
LOOK_S = 0.5


class Circuit:
    """``suspect`` opens it, from any thread; a probe closes it. ``call`` has the agent's loop do something."""

    def __init__(
        self,
        client: aio.Client,
        namespaces: Namespaces,
        call: Callable[[Callable[[], object]], object],
        *,
        target: str,
        timeout_s: float,
        pause_s: float,
    ) -> None:
        self._client = client
        self._target = target
        self._namespaces = namespaces
        self._call = call
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._suspect = False
        self._doubt = asyncio.Event()
        self._told = False

    @property
    def closed(self) -> bool:
        """Whether there is a session, and nothing speaks against asking."""
        return self._client.attached and not (self._suspect or self._client.draining)

    def suspect(self) -> None:
        """An answer did not come in time, or was no answer."""
        if not self._suspect:
            self._suspect = True
            self._call(self._doubt.set)

    async def watch(self) -> None:
        """Probe whenever there is doubt, until a probe goes right."""
        while True:
            await self._doubt.wait()
            self._doubt.clear()
            while self._suspect:
                try:
                    await self.probe()
                    self._suspect = False
                except HicacheError:
                    await asyncio.sleep(self._pause_s)

    async def tell(self) -> None:
        """One line whenever the sidecar was found or lost. What lasts shorter than two looks is not worth one."""
        before = False
        while True:
            closed = self.closed
            if closed is before is not self._told:
                if closed:
                    with contextlib.suppress(HicacheError):  # whoever asks is told why
                        await self.introduce()
                else:
                    self._told = False
                    log.warning(
                        "hicache: the sidecar at %s is lost, or stops; requests are computed until one is back",
                        self._target,
                    )
            before = closed
            await asyncio.sleep(LOOK_S)

    async def introduce(self) -> None:
        """Probe, and say what is used. Raises HicacheError."""
        self._told = True
        try:
            await self.probe()  # the namespace has its fingerprint from its first use on
            offered = await self._client.connect()
            handle = await self._namespaces.get(Identity())
        except HicacheError:
            self._told = self.closed  # attached, and of no use: not asked again and again
            raise
        log.info(
            "hicache: uses the sidecar at %s (%s), pages of %d tokens and %d bytes, namespace %s",
            self._target,
            ", ".join(f"{tier.name} {tier.capacity_bytes / 2**30:.2f} GiB" for tier in offered.tiers),
            handle.page_tokens,
            handle.spec.page_bytes,
            handle.fingerprint.hex()[:16],
        )

    async def probe(self) -> None:
        """The smallest question there is, about a page that nobody stored. Raises HicacheError."""
        if not self._client.attached:
            raise UnavailableError("the sidecar is absent")
        handle = await self._namespaces.get(Identity())
        keys = [b""] if handle.spec.extra_key_bytes else None
        await handle.match(bytes(4 * handle.page_tokens), extra_keys=keys, timeout_s=self._timeout_s)
