"""Namespaces by adapter and salt, made off the step path: digests of weights and adapters are taken in threads."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable
from pathlib import Path

from hicache.errors import UnsupportedError
from hicache.integrations.vllm.identity import adapter_digest
from hicache.integrations.vllm.requests import Adapter, Identity
from hicache.rpc.client import aio
from hicache.rpc.client.arguments import NamespaceFields

log = logging.getLogger(__name__)

#: The namespace's fields for an adapter's identity and a salt. May read files, and take long the first time.
FieldsOf = Callable[[str, str], NamespaceFields]

#: Salts are often one a user; the sidecar itself bounds namespaces per tenant.
HANDLES_MOST = 1024
Signature = tuple[tuple[str, int, int, int], ...]


class Namespaces:
    """Handles of one client. Belongs to the agent's event loop."""

    def __init__(self, client: aio.Client, fields_of: FieldsOf) -> None:
        self._client = client
        self._fields_of = fields_of
        self._handles: collections.OrderedDict[Identity, aio.NamespaceHandle] = collections.OrderedDict()
        self._adapters: dict[Adapter, tuple[Signature, str]] = {}
        self._making: dict[Identity, asyncio.Task[aio.NamespaceHandle]] = {}
        self._private = ""

    def all(self) -> list[aio.NamespaceHandle]:
        """Every namespace that is in use."""
        return list(self._handles.values())

    def leave(self, nonce: str) -> None:
        """From now on other namespaces, of this process alone: what its pages are computed with may have changed."""
        self._private = nonce
        self._handles.clear()
        self._making.clear()  # who waits for one of them gets what it asked for; nobody else does

    def ready(self, identity: Identity) -> aio.NamespaceHandle | None:
        """The namespace where it is known; None where it must be made first.

        Raises UnsupportedError for adapters that are not what they were when they were first seen.
        """
        handle = self._handles.get(identity)
        if handle is None:
            return None
        if identity.adapter is not None:
            self._check(identity.adapter)
        self._handles.move_to_end(identity)
        return handle

    async def get(self, identity: Identity) -> aio.NamespaceHandle:
        """The namespace, made if need be. Raises HicacheError where its identity cannot be told."""
        handle = self.ready(identity)
        if handle is not None:
            return handle
        task = self._making.get(identity)
        if task is None:
            task = self._making[identity] = asyncio.create_task(self._make(identity))
            task.add_done_callback(lambda done: self._made(identity, done))
        return await asyncio.shield(task)

    def _made(self, identity: Identity, task: asyncio.Task[aio.NamespaceHandle]) -> None:
        if self._making.get(identity) is task:
            del self._making[identity]
        if not task.cancelled():
            task.exception()  # it was told to whoever waited

    async def _make(self, identity: Identity) -> aio.NamespaceHandle:
        private = self._private
        adapter = ""
        if identity.adapter is not None:
            adapter = await asyncio.to_thread(self._adapter_identity, identity.adapter)
        fields = dict(await asyncio.to_thread(self._fields_of, adapter, identity.salt))
        if private:
            fields["revision"] = f"{fields.get('revision', '')} since:{private}"
        handle = self._client.namespace(**fields)  # type: ignore[arg-type]
        if private == self._private:
            self._handles[identity] = handle
            while len(self._handles) > HANDLES_MOST:
                self._handles.popitem(last=False)
        return handle

    # --- adapters

    def _adapter_identity(self, adapter: Adapter) -> str:
        """The adapter's name and a digest of its files. Raises UnsupportedError."""
        if adapter.changing:
            raise UnsupportedError(f"adapter {adapter.name!r} is reloaded in place: its pages are not cached")
        known = self._adapters.get(adapter)
        if known is None:
            signature = _signature(adapter)
            known = self._adapters[adapter] = signature, adapter_digest(adapter.name, adapter.path)
        self._check(adapter)
        return known[1]

    def _check(self, adapter: Adapter) -> None:
        """The engine may still compute with what the files were before: such pages have no name."""
        known = self._adapters.get(adapter)
        if known is not None and _signature(adapter) != known[0]:
            raise UnsupportedError(
                f"the files of adapter {adapter.name!r} in {adapter.path} have changed since it was first used: "
                "its pages are not cached",
                hint="give a changed adapter a new name",
            )


def _signature(adapter: Adapter) -> Signature:
    """What changes when an adapter's files do. Raises UnsupportedError where there are none to look at."""
    try:
        found = []
        for path in sorted(Path(adapter.path).iterdir()):
            about = path.stat()
            found.append((path.name, about.st_size, about.st_mtime_ns, about.st_ino))
        return tuple(found)
    except OSError as error:
        raise UnsupportedError(
            f"adapter {adapter.name!r}: its files in {adapter.path!r} cannot be read ({error.strerror}), "
            "so its pages are not cached",
            hint="load adapters from a local folder",
        ) from error
