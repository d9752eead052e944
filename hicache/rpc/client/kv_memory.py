"""Host memory for an engine's KV that the sidecar can map too: one memfd, sealed against shrinking.

A CPU engine makes one, cuts its KV tensors out of it, and registers them with ``Client.register_kv``, which finds the
memory of a tensor by its address.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from hicache.errors import ExhaustedError, InvalidArgumentError
from hicache.rpc.client.buffers import Bytes

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Tensors begin at multiples of this: what any element and any cache line asks for.
ALIGN_BYTES = 256


class KvMemory:
    """Memory that any process may be given the descriptor of, all zeros. Any thread may cut tensors out of it.

    Tensors keep it mapped; ``close`` closes the descriptor only, after which it can be registered no more.
    """

    def __init__(self, size_bytes: int) -> None:
        """Raises InvalidArgumentError for no bytes, ExhaustedError where the system has none."""
        if not isinstance(size_bytes, SupportsIndex):
            raise InvalidArgumentError(f"KV memory: size_bytes must be a whole number, not {size_bytes!r}")
        if size_bytes < 1:
            raise InvalidArgumentError(f"KV memory of {size_bytes} bytes")
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self.fd = -1
        self._lock = threading.Lock()
        try:
            self.fd = os.memfd_create("hicache-kv", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            memory = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            self.close()
            raise ExhaustedError(f"no KV memory of {size_bytes} bytes: {error}") from error
        self.bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)
        self.address = self.bytes.ctypes.data
        with _lock:
            _known.add(self)

    def tensor(self, shape: Sequence[int], dtype: Any) -> Any:
        """A CPU tensor of zeros in memory that no other tensor has. Raises ExhaustedError where too little is left."""
        import torch

        if not isinstance(dtype, torch.dtype):
            raise InvalidArgumentError(f"KV memory: dtype must be a torch.dtype, not {dtype!r}")
        elements = math.prod(shape)
        size_bytes = elements * torch.empty(0, dtype=dtype).element_size()
        if elements < 1 or min(shape) < 1:
            raise InvalidArgumentError(f"a tensor of shape {list(shape)} has no elements")
        with self._lock:
            begin = -(-self.used_bytes // ALIGN_BYTES) * ALIGN_BYTES
            if begin + size_bytes > self.size_bytes:
                raise ExhaustedError(
                    f"{size_bytes} bytes do not fit in KV memory of {self.size_bytes}, of which {begin} are taken",
                    hint=f"make it larger; every tensor begins at a multiple of {ALIGN_BYTES} bytes",
                )
            self.used_bytes = begin + size_bytes
        return torch.from_numpy(self.bytes[begin : begin + size_bytes]).view(dtype).view(*shape)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_lock = threading.Lock()
_known: weakref.WeakSet[KvMemory] = weakref.WeakSet()


def memory_at(address: int) -> KvMemory | None:
    """The KV memory of this process that holds that address, and can still be handed on."""
    with _lock:
        known = list(_known)
    for memory in known:
        if memory.fd >= 0 and memory.address <= address < memory.address + memory.size_bytes:
            return memory
    return None
