"""Memory of engines between messages and the words of ``hicache.device.kv``.

Descriptors come over the descriptor socket before; a message names them by their tokens. Each token is good once: from
then on its descriptor is here, and closed wherever the message turns out to be wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from hicache.device.kv import MemoryKind, PagedKv, SharedMemory
from hicache.errors import InvalidArgumentError, NotFoundError
from hicache.rpc.pb import region_pb2

MAX_MEMORIES = 4096
MAX_NUMBER = 1 << 62
#: ``cuMemExportToShareableHandle`` gives descriptors of this character device (its number is fixed).
NVIDIA_MAJOR = 195

Redeem = Callable[[bytes], int | None]


def paged_kv(message: region_pb2.PagedKv, redeem: Redeem) -> PagedKv:
    """What a session says of its engine's KV; its descriptors are the caller's.

    Raises NotFoundError for a token that is not good, InvalidArgumentError; every descriptor is closed then.
    """
    if not 1 <= len(message.memories) <= MAX_MEMORIES:
        raise InvalidArgumentError(
            f"paged KV in {len(message.memories)} memories", hint=f"name 1 to {MAX_MEMORIES} allocations"
        )
    with contextlib.ExitStack() as opened:
        memories = tuple(_memory(each, redeem, opened) for each in message.memories)
        numbers = (message.blocks, message.page_offset, *message.plane_offset)
        if max(numbers) > MAX_NUMBER or len(message.strides) != 4:
            raise InvalidArgumentError(
                f"paged KV: {len(message.strides)} strides, the largest number {max(numbers)}",
                hint="four strides; numbers of bytes and blocks that memory can have",
            )
        made = PagedKv(
            memories,
            tuple(message.plane_memory),
            tuple(message.plane_offset),
            message.planes_per_layer,
            message.blocks,
            message.block_tokens,
            message.heads,
            message.head_size,
            message.element_bytes,
            (message.strides[0], message.strides[1], message.strides[2], message.strides[3]),
            message.page_offset,
        )
        opened.pop_all()
    return made


def _memory(message: region_pb2.Memory, redeem: Redeem, opened: contextlib.ExitStack) -> SharedMemory:
    if message.size_bytes > MAX_NUMBER:
        raise InvalidArgumentError(f"memory of {message.size_bytes} bytes")
    match message.WhichOneof("handle"):
        case "fd_token":
            kind, token = MemoryKind.MEMFD, message.fd_token
        case "cuda_fd_token":
            kind, token = MemoryKind.CUDA_FD, message.cuda_fd_token
        case "cuda_ipc":
            return SharedMemory(
                MemoryKind.CUDA_IPC,
                message.size_bytes,
                handle=message.cuda_ipc,
                device_uuid=message.device_uuid,
            )
        case _:
            raise InvalidArgumentError(
                "memory without a handle", hint="set fd_token, cuda_ipc or cuda_fd_token"
            )
    fd = redeem(token)
    if fd is None:
        raise NotFoundError("the fd token is unknown, used or expired", hint="PUT the descriptor again")
    opened.callback(os.close, fd)
    return SharedMemory(kind, message.size_bytes, fd=fd, device_uuid=message.device_uuid)


def put_memory(message: region_pb2.Memory, memory: SharedMemory) -> None:
    """Memory of ours that a client may map; a descriptor is asked for over the descriptor socket."""
    message.size_bytes = memory.size_bytes
    message.device_uuid = memory.device_uuid
    if memory.kind is MemoryKind.CUDA_IPC:
        message.cuda_ipc = memory.handle
    elif memory.kind is MemoryKind.CUDA_FD:
        message.cuda_fd_token = b""
    else:
        message.fd_token = b""
