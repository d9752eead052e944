"""An engine's paged KV: its planes, what its pages look like, and where their tokens lie.

The words are those of ``kernels/paged.py``. A page's bytes do not depend on the engine's layout, so engines with
different ones, or with other block sizes, share pages; a quantised page is another format, under another name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from hicache.device import kernels
from hicache.device.kv import Places
from hicache.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: ``Namespace.layout`` of pages made here, by planes a layer; the codec's name follows a quantised one's.
PAGE_LAYOUTS = {1: "latent-token-head-dim", 2: "kv-token-head-dim"}


@dataclasses.dataclass(frozen=True, slots=True)
class EngineKv:
    """Planes ``[blocks, block_tokens, heads, head_size]``, all alike, in the order of a page.

    ``codec``: empty, or what pages are quantised with.
    """

    planes: tuple[Tensor, ...]
    planes_per_layer: int
    page_tokens: int
    codec: str = ""

    @classmethod
    def of(
        cls, layers: Sequence[Any], *, layout: str, page_tokens: int, codec: str | None = None
    ) -> EngineKv:
        """Of an engine's tensors: one a layer, or keys and values apart: two a layer.

        Raises InvalidArgumentError for tensors, a layout or a codec that do not go together.
        """
        if not isinstance(page_tokens, SupportsIndex):
            raise InvalidArgumentError(f"page_tokens must be a whole number, not {page_tokens!r}")
        if page_tokens < 1:
            raise InvalidArgumentError(f"page_tokens must be at least 1, not {page_tokens}")
        try:
            each = [_planes(layer, layout) for layer in layers]
        except (ValueError, AttributeError) as error:
            raise InvalidArgumentError(f"KV tensors: {error}") from error
        if not each or len({len(planes) for planes in each}) != 1 or len(each[0]) not in PAGE_LAYOUTS:
            raise InvalidArgumentError("KV tensors: every layer has keys and values, or one latent")
        planes = tuple(plane.detach() for layer in each for plane in layer)
        first = planes[0]
        alike = (first.shape, first.dtype, first.stride(), first.device)
        if any((p.shape, p.dtype, p.stride(), p.device) != alike for p in planes):
            raise InvalidArgumentError("KV tensors: layers differ in shape, dtype, strides or device")
        if first.element_size() not in {1, 2, 4, 8} or not first.numel():
            raise InvalidArgumentError(f"KV tensors: {first.dtype} {list(first.shape)} cannot be moved")
        found = cls(planes, len(each[0]), page_tokens, codec or "")
        if codec:
            found._check_codec()
        return found

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.planes[0].device

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.planes) // self.planes_per_layer

    @property
    def block_tokens(self) -> int:
        """Tokens of the engine's block."""
        return int(self.planes[0].shape[1])

    @property
    def unit_tokens(self) -> int:
        """Tokens of the units that block numbers make: of a page and in one block."""
        return math.gcd(self.block_tokens, self.page_tokens)

    @property
    def plane_bytes(self) -> int:
        """A page's bytes in one plane, before it is quantised."""
        _, _, heads, dim = self.planes[0].shape
        return self.page_tokens * heads * dim * self.planes[0].element_size()

    @property
    def raw_bytes(self) -> int:
        """A page's bytes before it is quantised."""
        return self.plane_bytes * len(self.planes)

    @property
    def page_bytes(self) -> int:
        """A page's bytes as stored."""
        if not self.codec:
            return self.raw_bytes
        return kernels.quantised_bytes(self.raw_bytes // self.planes[0].element_size(), self.codec)

    def namespace_fields(self) -> dict[str, Any]:
        """Fields of the namespace that such pages belong to: equal pages meet, others never do."""
        _, _, heads, dim = self.planes[0].shape
        dtype, layout = str(self.planes[0].dtype).removeprefix("torch."), PAGE_LAYOUTS[self.planes_per_layer]
        return {
            "page_bytes": self.page_bytes,
            "page_tokens": self.page_tokens,
            # a quantised page is bytes to lower tiers: they must not take it for numbers and quantise it again
            "kv_dtype": f"{self.codec} of {dtype}" if self.codec else dtype,
            "layout": f"{layout} {self.codec}" if self.codec else layout,
            "codec": "lossless",
            "layers": self.layers,
            "kv_heads": int(heads),
            "head_size": int(dim),
        }

    # --- where

    def places_of_blocks(self, blocks: Any) -> Places:
        """int64 ``[pages, units]`` of blocks in token order; whole pages only. A negative block is not copied.

        Block and page may have any sizes: a unit is what both are made of. Raises InvalidArgumentError.
        """
        numbers = _integers("blocks", blocks).reshape(-1)
        tokens, unit = self.block_tokens, self.unit_tokens
        pages = len(numbers) * tokens // self.page_tokens
        at = np.arange(pages * self.page_tokens // unit, dtype=np.int64) * unit
        found = numbers[at // tokens] * tokens + at % tokens
        found[numbers[at // tokens] < 0] = -1
        return self.check(found.reshape(pages, self.page_tokens // unit))

    def check(self, places: Any) -> Places:
        """The places themselves. Raises InvalidArgumentError for what does not lie in the planes."""
        found = np.ascontiguousarray(_integers("places", places))
        units = found.shape[1] if found.ndim == 2 else 0
        tokens = self.block_tokens
        if not units or self.page_tokens % units or self.page_tokens // units > tokens:
            raise InvalidArgumentError(
                f"places must be [pages, units] with units that divide {self.page_tokens} tokens and fit a block"
                f" of {tokens}, not {list(found.shape)}"
            )
        unit = self.page_tokens // units
        used = found[found >= 0]
        if len(used) and int(used.max()) >= self.planes[0].shape[0] * tokens:
            raise InvalidArgumentError(f"place {int(used.max())} is outside {self.planes[0].shape[0]} blocks")
        if tokens % unit or (len(used) and int((used % tokens).max()) + unit > tokens):
            raise InvalidArgumentError(f"a unit of {unit} tokens does not lie in one block of {tokens}")
        if self.codec and unit * self._token_numbers % 64:
            raise InvalidArgumentError(
                f"{self.codec} takes whole groups of 64 numbers: units of {unit} tokens are too small"
            )
        return found

    @property
    def _token_numbers(self) -> int:
        return int(self.planes[0].shape[2] * self.planes[0].shape[3])

    def _check_codec(self) -> None:
        try:
            kernels.check_quantised(self.planes[0].dtype, self.codec, self.page_tokens * self._token_numbers)
        except ValueError as error:
            raise InvalidArgumentError(f"codec {self.codec!r}: {error}") from error


def _planes(layer: Any, layout: str) -> list[Tensor]:
    parts = layer if isinstance(layer, list | tuple) else [layer]
    for part in parts:
        if not hasattr(part, "data_ptr"):
            raise InvalidArgumentError(
                f"KV tensors: a layer must be torch tensors, not {type(part).__name__}"
            )
    return [plane for part in parts for plane in kernels.planes(part, layout)]


def _integers(name: str, values: Any) -> npt.NDArray[np.int64]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    found = np.asarray(values)
    if not found.size:
        return np.zeros(found.shape if found.ndim > 1 else (0,), np.int64)
    if not np.issubdtype(found.dtype, np.integer):
        raise InvalidArgumentError(f"{name} must be integers, not {found.dtype}")
    return found.astype(np.int64)
