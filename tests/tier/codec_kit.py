"""Pages for the codec tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from hicache.types import Namespace

KEY = bytes(range(32))
LOSSLESS_DTYPES = (
    "",
    "bfloat16",
    "float16",
    "half",
    "float32",
    "float8_e4m3fn",
    "int8",
    "uint8",
    "no such type",
)


def normal(count: int, dtype: str = "bfloat16", seed: int = 0, scale: float = 1.0) -> bytes:
    """Normally distributed numbers; every 32nd is ten times as large, as some channels are."""
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32) * np.float32(scale)
    values[::32] *= 10
    if dtype in {"float16", "half"}:
        return values.astype(np.float16).tobytes()
    if dtype == "float32":
        return values.tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def words(data: bytes | bytearray | memoryview, dtype: str = "bfloat16") -> npt.NDArray[np.float64]:
    """The numbers of a page of 16-bit floats."""
    raw = np.frombuffer(data, np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        if dtype in {"float16", "half"}:
            return raw.view(np.float16).astype(np.float64)
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def namespace(page_bytes: int, dtype: str = "bfloat16", codec: str = "lossless", **fields: int) -> Namespace:
    counts = {"page_tokens": 16, "layers": 2, "kv_heads": 2, "head_size": 32} | fields
    return Namespace("m", page_bytes=max(1, page_bytes), kv_dtype=dtype, codec=codec, **counts)


any_page = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda data, times: data * times, st.binary(min_size=1, max_size=9), st.integers(1, 900)),
    st.builds(
        normal,
        st.integers(0, 5000),
        st.sampled_from(["bfloat16", "float16", "float32"]),
        st.integers(0, 9),
    ),
    st.builds(lambda n, seed: normal(n, seed=seed)[1:], st.integers(1, 3000), st.integers(0, 9)),
    st.builds(lambda n, zeros: normal(n) + bytes(zeros), st.integers(1, 3000), st.integers(0, 3000)),
)
