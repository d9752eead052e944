"""A ``DynamicCache`` that fills itself from a sidecar and gives back what it lacks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hicache.errors import InvalidArgumentError
from hicache.integrations.transformers.layers import whole_layers
from hicache.integrations.transformers.tracking import Tracker
from hicache.rpc.client import CommitResult, StoreResult

if TYPE_CHECKING:
    from hicache.integrations.transformers import PrefixStore


class HiCacheCache(DynamicCache):
    """The cache of one ``generate`` call, or of one conversation.

        with HiCacheCache(prefixes) as cache:
            model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        # here the prompt's and the answer's new pages are stored

    Within the ``with`` block it watches the calls of the model that carry it. Tokens that the sidecar has are put into
    the cache and taken out of the call, so the model computes the rest; a call's last tokens, whose logits are asked
    for (``logits_to_keep``, which ``generate`` sets), are always computed, and a call that wants all of them (or hidden
    states, attentions, a loss) is computed whole. Batches may be padded on the left. What cannot be cached by prefix is
    refused with the reason, before it is computed.

    On leaving the block without an exception all rows are stored, as far as they were computed; ``store`` does it
    earlier. ``loaded_tokens`` counts for each row what came from the sidecar.
    """

    def __init__(self, prefixes: PrefixStore) -> None:
        super().__init__(config=prefixes.model.config)
        whole_layers(self)
        self.loaded_tokens: list[int] = []
        self.stored: StoreResult | None = None
        self._prefixes = prefixes
        self._tracker = Tracker()
        self._block: contextlib.AbstractContextManager[HiCacheCache]
        self._is_watching = self._was_watched = False
        self._may_hit = True

    def __enter__(self) -> HiCacheCache:
        block = self.watching()
        block.__enter__()
        self._block = block
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, trace)
        if kind is None:
            self.store()

    @contextlib.contextmanager
    def watching(self) -> Iterator[HiCacheCache]:
        """As the ``with`` block of the cache itself, without storing at its end."""
        if self._is_watching:
            raise InvalidArgumentError("this cache is in use")
        self._prefixes.check_ready()
        model = watched(self._prefixes.model)
        names = list(inspect.signature(model.forward).parameters)

        def watch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = dict(zip(names, args, strict=False)) | kwargs
            return ((), self._take(call)) if call.get("past_key_values") is self else None

        hook = model.register_forward_pre_hook(watch, with_kwargs=True)
        self._is_watching = self._was_watched = True
        try:
            yield self
        finally:
            hook.remove()
            self._is_watching = False

    def store(self, sequences: Tensor | None = None) -> StoreResult | None:
        """Store the rows' whole pages that the sidecar lacks; None where that failed.

        ``sequences``, as ``generate`` returns them: of each row only what one of them begins with (beams that were
        given up are not worth their room).
        """
        self.stored = self._prefixes.store_cache(self, sequences)
        return self.stored

    def sequences(self) -> list[tuple[Tensor, int]] | None:
        """Each row's tokens that are in the cache, and the column of the first; None where that is not certain."""
        columns = self._tracker.columns
        layers: list[Any] = self.layers
        lengths = {layer.get_seq_length() for layer in layers}
        if not columns or lengths != {columns} or not self._tracker.is_certain():
            return [] if not columns else None
        return [(row.tokens, row.start) for row in self._tracker.rows()]

    # --- what transformers does to a cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values."""
        if not self._was_watched:
            raise InvalidArgumentError(
                "a HiCacheCache works within its `with` block: it must see what is fed"
            )
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        super().crop(tokens_to_remove)
        self._tracker.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows become those of ``beam_idx``."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows become those of ``indices``."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` rows."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self._tracker.starts)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.loaded_tokens = []
        self._tracker = Tracker()
        self._may_hit = True

    # --- how

    def _select(self, indices: Tensor) -> None:
        rows = torch.arange(len(self._tracker.starts))[indices.cpu()]  # a mask selects as well
        self._tracker.select(rows)
        if self.loaded_tokens:
            self.loaded_tokens = [self.loaded_tokens[row] for row in rows.tolist()]

    def _take(self, call: dict[str, Any]) -> dict[str, Any]:
        """A forward call with this cache: what is cached is put in here, and taken out of the call."""
        if self.get_seq_length() != self._tracker.columns:
            raise InvalidArgumentError(
                f"the cache holds {self.get_seq_length()} columns, of which {self._tracker.columns} were seen fed"
            )
        ids = self._tracker.look(call)
        loaded = self._load(ids, call)
        self._tracker.feed(ids)
        self._prefixes.counts.computed_tokens += ids.numel() - loaded * len(ids)
        if not loaded:
            return call
        taken = {"input_ids": ids[:, loaded:].clone(memory_format=torch.contiguous_format)}
        if call.get("position_ids") is not None:
            taken["position_ids"] = call["position_ids"][:, loaded:]
        return call | taken

    def _load(self, ids: Tensor, call: Mapping[str, Any]) -> int:
        """Put cached columns of what is fed into the cache. Returns how many."""
        begin = self._tracker.columns
        end = begin + ids.shape[1] - _wanted_logits(call, ids.shape[1])
        if not self.loaded_tokens:
            self.loaded_tokens = [0] * len(ids)
        if not self._may_hit or end - begin < 1:
            return 0
        rows = self._tracker.rows(ids)
        found = self._prefixes.load_columns(rows, begin, end)
        self._may_hit = found.whole
        for number, (keys, values) in enumerate(found.layers):
            self.update(keys, values, number)
        gained = [max(0, found.end - max(begin, row.start)) for row in rows]
        self.loaded_tokens = [old + new for old, new in zip(self.loaded_tokens, gained, strict=True)]
        self._prefixes.counts.cached_tokens += sum(gained)
        return found.end - begin


def watched(model: Any) -> Any:
    """The module whose calls carry the cache: within PEFT's wrapper, where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _wanted_logits(call: Mapping[str, Any], tokens: int) -> int:
    """How many of the last tokens must be computed because their outputs are asked for."""
    keep = call.get("logits_to_keep")
    asks_more = any(call.get(name) for name in ("output_attentions", "output_hidden_states"))
    if asks_more or call.get("labels") is not None or not isinstance(keep, int) or keep < 1:
        return tokens
    return keep


def kept_of(rows: Sequence[tuple[Tensor, int]], sequences: Tensor | None) -> list[int]:
    """How many tokens of each row to store: those that one of ``sequences`` begins with, without an end of padding.

    A row that is done before the others goes on with the padding token; of an end of equal tokens one is kept.
    """
    kept = []
    for tokens, start in rows:
        length = len(tokens)
        if sequences is not None and length:
            theirs = sequences[:, start : start + length].cpu()
            same = (theirs == tokens[: theirs.shape[1]]).long().cumprod(dim=1)
            length = int(same.sum(dim=1).max())
        if len(rows) > 1 and length:
            ends = (tokens[:length] != tokens[length - 1]).nonzero()
            length = min(length, int(ends[-1]) + 2) if len(ends) else 1
        kept.append(length)
    return kept


def add(first: StoreResult, second: StoreResult) -> StoreResult:
    """Both together."""
    return StoreResult(first.present_pages + second.present_pages, first.committed + second.committed)


NOTHING = StoreResult(0, CommitResult())
