"""Pages as records: compressed where it pays, checked always. Pure functions, and one small memory a namespace.

``PageCodec`` encodes the pages of a namespace, ``decode`` reads any record. What a record looks like is in
``record``, what is done to floats in ``forms`` and ``exponents``, the lossy codecs are in ``lossy``; ``estimate``
chooses.
"""

from __future__ import annotations

from hicache.tier.codec.estimate import Codec
from hicache.tier.codec.pages import PageCodec, encode
from hicache.tier.codec.record import HEADER_BYTES, Decoded, Encoded, Kind, decode

__all__ = ["HEADER_BYTES", "Codec", "Decoded", "Encoded", "Kind", "PageCodec", "decode", "encode"]
