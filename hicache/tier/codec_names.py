"""The names under which codecs are chosen: by a namespace, and by the disk tier's setting.

A namespace whose codec is lossless or raw gets back the bytes that it stored. One that names a lossy codec gets
pages within that codec's error bound (docs/CODECS.md). The name is part of the namespace's fingerprint, and so of
every page key: a lossy page never answers a request of another namespace.
"""

from __future__ import annotations

LOSSLESS = "lossless"
FAST = "lossless-fast"
RAW = "raw"
FP8, INT8, INT4 = "fp8-e4m3", "int8-g64", "int4-g64"

LOSSY = (FP8, INT8, INT4)
#: What ``Namespace.codec`` may be.
NAMESPACE_CODECS = (LOSSLESS, RAW, *LOSSY)
#: What the disk tier's ``page_codec`` may be: how pages of "lossless" namespaces are stored.
PAGE_CODECS = (LOSSLESS, FAST, RAW)
#: Lossy codecs quantise these.
LOSSY_DTYPES = ("bfloat16", "float16", "half")
