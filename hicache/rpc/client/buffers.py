"""Callers' buffers (bytes, arrays, CPU tensors) as flat arrays of bytes over the same memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache.errors import InvalidArgumentError

Bytes = npt.NDArray[np.uint8]


def readable(data: Any) -> Bytes:
    """The bytes of a buffer, without a copy. Raises InvalidArgumentError for what is no contiguous buffer."""
    if type(data).__module__.partition(".")[0] == "torch":
        data = _tensor_bytes(data)
    if isinstance(data, np.ndarray) and data.flags.c_contiguous:  # any dtype: some have no buffer format
        return data.reshape(-1).view(np.uint8)
    try:
        return np.frombuffer(memoryview(data).cast("B"), dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidArgumentError(
            f"{type(data).__name__} is not a contiguous buffer: {error}",
            hint="give bytes, a contiguous array, or a contiguous CPU tensor",
        ) from error


def writable(data: Any) -> Bytes:
    """As ``readable``, and refuses memory that must not be written."""
    found = readable(data)
    if not found.flags.writeable:
        raise InvalidArgumentError(f"{type(data).__name__} is read-only and cannot be copied into")
    return found


def capacity_pages(into: Any, page_bytes: int) -> int:
    """How many pages a buffer, or a sequence of buffers, has room for."""
    return len(into) if isinstance(into, list | tuple) else readable(into).nbytes // page_bytes


def page_rows(into: Any, page_bytes: int, count: int) -> Sequence[Bytes] | npt.NDArray[np.uint8]:
    """Where ``count`` pages go: an array of shape (count, page_bytes), or a list where ``into`` is one.

    Raises InvalidArgumentError for buffers that are too few, too small or read-only.
    """
    if isinstance(into, list | tuple):
        if len(into) < count:
            raise InvalidArgumentError(f"{len(into)} buffers for {count} pages")
        rows = [writable(buffer) for buffer in into[:count]]
        for index, row in enumerate(rows):
            if row.nbytes < page_bytes:
                raise InvalidArgumentError(f"buffer {index} has {row.nbytes} bytes, a page has {page_bytes}")
        return [row[:page_bytes] for row in rows]
    flat = writable(into)
    if flat.nbytes < count * page_bytes:
        raise InvalidArgumentError(
            f"a buffer of {flat.nbytes} bytes is too small for {count} pages of {page_bytes} bytes"
        )
    return flat[: count * page_bytes].reshape(count, page_bytes)


def _tensor_bytes(tensor: Any) -> Any:
    torch = sys.modules["torch"]  # there is a tensor, so it is loaded
    if tensor.device.type != "cpu":
        raise InvalidArgumentError(
            f"a tensor on {tensor.device} is not host memory",
            hint="copy through a CPU tensor (pinned, for speed)",
        )
    if not tensor.is_contiguous():
        raise InvalidArgumentError("the tensor is not contiguous", hint="call .contiguous() first")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def new_tensor(pages: int, page_bytes: int, dtype: Any) -> tuple[Any, npt.NDArray[np.uint8]]:
    """An empty CPU tensor of shape (pages, elements of a page), and its bytes, one row a page."""
    import torch

    dtype = torch.uint8 if dtype is None else dtype
    itemsize = torch.empty(0, dtype=dtype).element_size()
    if page_bytes % itemsize:
        raise InvalidArgumentError(f"a page of {page_bytes} bytes is no whole number of {dtype}")
    raw = torch.empty((pages, page_bytes), dtype=torch.uint8)
    return raw.view(dtype), raw.numpy()


def as_arrays(views: Sequence[memoryview], dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
    """One array a view, over the same memory. Raises InvalidArgumentError for a dtype that does not divide it."""
    kind = np.dtype(dtype)
    if views and views[0].nbytes % kind.itemsize:
        raise InvalidArgumentError(f"a page of {views[0].nbytes} bytes is no whole number of {kind}")
    return [np.frombuffer(view, kind) for view in views]
