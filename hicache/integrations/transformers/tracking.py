"""Which token stands in which column of a cache, row by row, and whether that is certain.

The model is watched, not the caller: what counts is what was fed into it. Tokens of the prompt are checked before they
are computed; of those that follow one by one, a doubt is only noted, on the device, so that no step waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hicache.errors import InvalidArgumentError, UnsupportedError
from hicache.integrations.transformers.loading import Row

#: What a forward call may be given without touching keys and values. Anything else that is not None is refused.
HARMLESS = frozenset({
    "attention_mask",
    "input_ids",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
})  # fmt: skip


class Tracker:
    """The tokens of a cache's columns. A row's first real token stands, or will stand, in column ``starts[row]``."""

    def __init__(self) -> None:
        self.columns = 0
        self.starts: list[int] = []
        self._pieces: list[Tensor] = []
        self._doubts: list[Tensor] = []

    # --- what is fed

    def look(self, call: Mapping[str, Any]) -> Tensor:
        """The ids that a forward call feeds, ``[rows, tokens]``, checked. Raises UnsupportedError with the reason."""
        ids = call.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
            raise UnsupportedError(
                "the model must be fed input_ids [rows, tokens]: embeddings name no tokens"
            )
        foreign = sorted(name for name in call if name not in HARMLESS and call[name] is not None)
        if foreign:
            raise UnsupportedError(f"{', '.join(foreign)} may change keys and values, and no page tells how")
        if call.get("use_cache") is False:
            raise InvalidArgumentError("use_cache=False leaves nothing to load or to store")
        if self.columns and len(ids) != len(self.starts):
            raise InvalidArgumentError(f"{len(ids)} rows are fed to a cache of {len(self.starts)}")
        if self.columns and ids.shape[1] == 1:
            self._note_doubts(call, ids)
        else:
            self._check(call, ids)
        return ids

    def feed(self, ids: Tensor) -> None:
        """The ids go into the cache."""
        self._pieces.append(ids.detach().clone())
        self.columns += ids.shape[1]

    def rows(self, more: Tensor | None = None) -> list[Row]:
        """The rows' tokens, and those of ``more`` behind them."""
        ids = self.ids() if more is None else torch.cat([*self._pieces, more], dim=1)
        return [Row(row[start:], start) for row, start in zip(ids.cpu(), self.starts, strict=True)]

    def ids(self) -> Tensor:
        """What is in the columns, ``[rows, columns]``, padding included."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, dim=1)]
        return self._pieces[0]

    def is_certain(self) -> bool:
        """Whether every token stood where its row puts it. Waits for the device."""
        return not any(bool(doubt) for doubt in self._doubts)

    # --- what becomes of the cache

    def crop(self, columns: int) -> None:
        """The last ``columns`` are gone."""
        if columns and self._pieces:
            self._pieces = [self.ids()[:, :-columns]]
            self.columns -= columns

    def select(self, indices: Tensor) -> None:
        """Rows are now those of ``indices``."""
        if self._pieces:
            ids = self.ids()
            self._pieces = [ids.index_select(0, indices.to(ids.device))]
            self.starts = [self.starts[index] for index in indices.tolist()]

    # --- how

    def _check(self, call: Mapping[str, Any], ids: Tensor) -> None:
        starts = _starts(call.get("attention_mask"), len(ids), self.columns + ids.shape[1])
        for old, new in zip(self.starts, starts, strict=bool(self.columns)):
            if new != old and not (old == self.columns < new):  # a row may still consist of padding alone
                raise InvalidArgumentError(f"rows begin in columns {starts}, and began in {self.starts}")
        self.starts = starts
        if bool(self._misplaced(call, ids)):
            raise UnsupportedError(
                "position_ids do not count each row's tokens from 0: keys of other positions are other keys",
                hint="leave position_ids out; generate makes them",
            )

    def _note_doubts(self, call: Mapping[str, Any], ids: Tensor) -> None:
        self._doubts.append(self._misplaced(call, ids))
        mask = call.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2 or mask.shape[1] != self.columns + 1:
                raise UnsupportedError(f"an attention mask {list(mask.shape)} for {self.columns + 1} columns")
            starts = torch.tensor(self.starts, device=mask.device).unsqueeze(1)
            seen = torch.arange(mask.shape[1], device=mask.device) >= starts
            self._doubts.append((mask.bool() != seen).any())
        elif any(self.starts):
            raise UnsupportedError("rows are padded, and the attention mask that says so is missing")
        if len(self._doubts) > 64:
            self._doubts = [torch.stack(self._doubts).any()]

    def _misplaced(self, call: Mapping[str, Any], ids: Tensor) -> Tensor:
        """Whether a token's position is another than its distance from its row's first one."""
        given = call.get("position_ids")
        if given is None:
            # the model counts columns then
            return torch.tensor(any(self.starts), device=ids.device)
        if given.dim() != 2 or given.shape[1] != ids.shape[1]:
            raise UnsupportedError(f"position_ids {list(given.shape)} for input_ids {list(ids.shape)}")
        starts = torch.tensor(self.starts, device=given.device).unsqueeze(1)
        columns = torch.arange(self.columns, self.columns + ids.shape[1], device=given.device)
        wanted = columns - starts
        misplaced: Tensor = ((given != wanted) & (wanted >= 0)).any()
        return misplaced


def _starts(mask: Tensor | None, rows: int, columns: int) -> list[int]:
    """The column of each row's first token. Raises UnsupportedError for masks that are no left padding."""
    if mask is None:
        return [0] * rows
    if mask.dim() != 2 or tuple(mask.shape) != (rows, columns):
        raise UnsupportedError(
            f"an attention mask {list(mask.shape)}, not [{rows}, {columns}]: it does not tell plainly who sees whom"
        )
    seen = mask.detach().bool().cpu()
    starts: list[int] = (~seen).sum(dim=1).tolist()
    if bool((torch.arange(columns) >= torch.tensor(starts).unsqueeze(1)).ne(seen).any()):
        raise UnsupportedError(
            "the attention mask has holes, or padding on the right: keys behind a hole depend on where it is",
            hint="pad on the left (tokenizer.padding_side = 'left')",
        )
    return starts
