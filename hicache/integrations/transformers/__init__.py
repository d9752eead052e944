"""Prefixes of Hugging Face transformers models: computed once, stored as pages, loaded by any process.

    model = AutoModelForCausalLM.from_pretrained(...).eval()
    with hicache.Client("unix:///run/hicache.sock") as client:
        prefixes = PrefixStore(client, model)
        prefixes.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=100)

``generate`` is the model's own, with a cache that loads what the sidecar has of the prompts and stores what it lacks,
answers included. ``HiCacheCache`` is that cache, to be used with ``model.generate``, pipelines and loops of your own.
``prefill``, ``load`` and ``store`` are the steps one by one, for one sequence at a time.

For decoder-only text models whose layers attend to all tokens, or to a sliding window of them; everything else is
refused with the reason. What the sidecar loses, or fails to do, costs recomputing and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from hicache.errors import HicacheError, InvalidArgumentError, UnavailableError
from hicache.integrations.transformers import identity, support
from hicache.integrations.transformers.cache import NOTHING, HiCacheCache, add, kept_of
from hicache.integrations.transformers.layers import whole_layers
from hicache.integrations.transformers.loading import Columns, Row, Source, let_pass
from hicache.integrations.transformers.pages import KeysValues, PagePacker
from hicache.rpc.client import StoreResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hicache.rpc.client import Client

logger = logging.getLogger(__name__)

DEFAULT_PAGE_TOKENS = 64
WAIT_MS = 5_000


class Loaded(NamedTuple):
    """A cache that holds the KV of the first ``cached_tokens`` tokens of a prompt, never of all."""

    cache: DynamicCache
    cached_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Prefilled:
    """What ``prefill`` did.

    ``outputs`` are the model's, for the tokens after the first ``cached_tokens``; ``outputs.past_key_values`` holds
    the whole prompt. ``stored`` is None where storing failed.
    """

    outputs: Any
    cached_tokens: int
    computed_tokens: int
    stored: StoreResult | None


@dataclasses.dataclass(slots=True)
class Counts:
    """What a PrefixStore has done. ``failed_loads`` and ``failed_stores`` cost recomputing, nothing else."""

    cached_tokens: int = 0
    computed_tokens: int = 0
    stored_pages: int = 0
    failed_loads: int = 0
    failed_stores: int = 0


__all__ = ["Counts", "HiCacheCache", "Loaded", "Prefilled", "PrefixStore"]


class PrefixStore:
    """The prefixes of one model in one sidecar.

    Its namespace holds a digest of the weights (or the model's name and ``revision``, where that is given), of the
    configuration, the adapter, the dtype, the page size and the layout: what differs in any of them never meets.
    ``adapter`` names what the model itself does not tell, such as merged LoRA weights under a ``revision``. Make a
    new one after changing the model's weights.

    ``wait_ms`` bounds the wait for pages from lower tiers, and for room; ``timeout_s`` (None: the client's) the wait
    for the sidecar itself. ``durable``: the new pages of ``store`` and ``prefill`` are safe from a crash when these
    return. Raises UnsupportedError for models that cannot be cached by prefix, InvalidArgumentError for arguments
    that do not go together.
    """

    def __init__(
        self,
        client: Client,
        model: PreTrainedModel,
        *,
        page_tokens: int = DEFAULT_PAGE_TOKENS,
        revision: str | None = None,
        adapter: str | None = None,
        salt: str = "",
        kv_dtype: torch.dtype | None = None,
        durable: bool = False,
        wait_ms: int = WAIT_MS,
        timeout_s: float | None = None,
    ) -> None:
        support.check_model(model)
        self.model: Any = model
        self.counts = Counts()
        self._client = client
        self._shape = support.shape_of(
            model.config, page_tokens, model.dtype if kv_dtype is None else kv_dtype
        )
        self._adapters = identity.active_adapters(model)
        fields = identity.namespace_fields(model, self._shape, revision=revision, adapter=adapter, salt=salt)
        self.namespace = client.namespace(**fields)
        self._source = Source(self.namespace, self._shape, model.device, wait_ms, timeout_s)
        self._durable = durable

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self._shape.page_tokens

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._shape.page_bytes

    # --- generate, and what HiCacheCache is made of

    def generate(
        self, inputs: Tensor | None = None, *, cache: HiCacheCache | None = None, **kwargs: Any
    ) -> Any:
        """``model.generate`` with the same arguments and the same answer.

        What the sidecar has of the prompts is loaded, what it lacks of prompts and answers is stored. Batches may be
        padded on the left; sampling, several sequences, beams, assistants and chunked prefill work as ever. ``cache``,
        an unused one, tells afterwards what was loaded and stored. Raises UnsupportedError for what no prefix
        determines: masks with holes, embeddings, positions of your own, caches of other kinds.
        """
        support.check_generate(self.model, kwargs)
        if kwargs.get("cache_implementation") is not None:
            kwargs = {**kwargs, "cache_implementation": None}  # given with a cache, transformers refuses it
        cache = HiCacheCache(self) if cache is None else cache
        with cache.watching():
            answer = self.model.generate(inputs, past_key_values=cache, **kwargs)
        found = getattr(answer, "sequences", answer)
        cache.store(found if isinstance(found, Tensor) and found.dim() == 2 else None)
        return answer

    def load_columns(self, rows: Sequence[Row], begin: int, end: int) -> Columns:
        """The cached columns of ``rows``. Raises only for what the caller must mend."""
        self._check_adapters()
        found = self._source.columns(rows, begin, end)
        self.counts.failed_loads += found.failures
        return found

    def store_cache(self, cache: HiCacheCache, sequences: Tensor | None = None) -> StoreResult | None:
        """Store the rows of a cache that was watched; None where that failed."""
        self.check_ready()
        rows = cache.sequences()
        if rows is None:
            logger.warning("hicache: what was fed to the model is not certain; nothing is stored")
            self.counts.failed_stores += 1
            return None
        layers = support.layers_of(cache, self._shape, len(rows)) if rows else []
        done = NOTHING
        known: set[bytes] = set()
        for number, ((tokens, start), kept) in enumerate(zip(rows, kept_of(rows, sequences), strict=True)):
            name = tokens[: kept // self.page_tokens * self.page_tokens].numpy().tobytes()
            if name in known:
                continue
            known.add(name)
            end = start + kept
            stored = self._try_store(
                tokens[:kept],
                [
                    (k[number : number + 1, :, start:end], v[number : number + 1, :, start:end])
                    for k, v in layers
                ],
            )
            if stored is None:
                return None
            done = add(done, stored)
        return done

    # --- step by step, for one sequence

    def load(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Loaded:
        """The cached prefix of a prompt: whole pages, never its last token.

        Every byte is checked; what is missing, corrupt or lost on the way ends the prefix. Raises only for what the
        caller must mend.
        """
        self._check_adapters()
        return self._load(support.prompt_of(input_ids, attention_mask))

    def store(
        self, input_ids: Tensor, past_key_values: Any, attention_mask: Tensor | None = None
    ) -> StoreResult:
        """Store the whole pages of a prompt that the sidecar lacks.

        ``past_key_values`` must be this model's, from exactly these tokens; tokens of the prompt beyond it (the last
        one generated) are left out. Raises HicacheError where the sidecar does not take them.
        """
        self.check_ready()
        support.check_cache(past_key_values)
        prompt = support.prompt_of(input_ids, attention_mask)
        return self._store(prompt, support.layers_of(past_key_values, self._shape))

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, logits_to_keep: int = 0
    ) -> Prefilled:
        """Load what is cached of a prompt, compute the rest, store its new pages.

        A sidecar that fails, or is not there, costs time and nothing else; see ``counts``.
        """
        self.check_ready()
        prompt = support.prompt_of(input_ids, attention_mask)
        cache, cached_tokens = self._load(prompt)
        kept = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        suffix = prompt[cached_tokens:].unsqueeze(0).to(self.model.device)
        with torch.no_grad():
            outputs = self.model(input_ids=suffix, past_key_values=cache, use_cache=True, **kept)
        computed_tokens = len(prompt) - cached_tokens
        self.counts.computed_tokens += computed_tokens
        layers = support.layers_of(cache, self._shape)
        return Prefilled(outputs, cached_tokens, computed_tokens, self._try_store(prompt, layers))

    # --- how

    def _load(self, prompt: Tensor) -> Loaded:
        cache: Any = whole_layers(DynamicCache(config=self.model.config))
        most_pages = (len(prompt) - 1) // self.page_tokens
        if not most_pages:
            return Loaded(cache, 0)
        tokens = prompt[: most_pages * self.page_tokens]
        found = self.load_columns([Row(tokens, 0)], 0, len(tokens))
        for layer, (keys, values) in zip(cache.layers, found.layers, strict=found.end > 0):
            layer.update(keys, values)
        assert found.end < len(prompt), "the last token is always computed"
        self.counts.cached_tokens += found.end
        return Loaded(cache, found.end)

    def _try_store(self, tokens: Tensor, layers: Sequence[KeysValues]) -> StoreResult | None:
        try:
            if not self._client.attached:
                raise UnavailableError("the sidecar is out of reach")  # loading has waited for it already
            return self._store(tokens, layers)
        except HicacheError as error:
            let_pass(error, "the prompt's pages were not stored")
            self.counts.failed_stores += 1
            return None

    def _store(self, tokens: Tensor, layers: Sequence[KeysValues]) -> StoreResult:
        pages = min(len(tokens), layers[0][0].shape[-2]) // self.page_tokens
        if not pages:
            return NOTHING
        packer = PagePacker(layers, self._shape, pages)
        wait_ms, timeout_s = self._source.wait_ms, self._source.timeout_s
        tokens = tokens[: pages * self.page_tokens]
        with self.namespace.reserve(tokens, wait_ms=wait_ms, timeout_s=timeout_s) as reservation:
            stored = reservation.store(packer, durable=self._durable)
        self.counts.stored_pages += stored.committed.stored_pages
        return stored

    def _check_adapters(self) -> None:
        if (now := identity.active_adapters(self.model)) != self._adapters:
            raise InvalidArgumentError(
                f"the model's active adapters are {now!r}, and were {self._adapters!r} when this PrefixStore was made",
                hint="make one PrefixStore for each",
            )

    def check_ready(self) -> None:
        """Raise InvalidArgumentError where the model is not as it was, or in training mode."""
        self._check_adapters()
        if self.model.training:
            raise InvalidArgumentError(
                "the model is in training mode, where KV is random (dropout)", hint="call model.eval() first"
            )
