"""Prefixes of Hugging Face transformers models: computed once, stored as pages, loaded by any process.

    model = AutoModelForCausalLM.from_pretrained(...).eval()
    with hicache.Client("unix:///run/hicache.sock") as client:
        prefixes = PrefixStore(client, model)
        done = prefixes.prefill(input_ids)  # loads what is cached, computes the rest, stores it
        model.generate(input_ids, past_key_values=prefixes.load(input_ids).cache)

For decoder-only text models whose cache keeps every token (``DynamicCache`` of ``DynamicLayer``), one sequence at a
time, without padding; everything else is refused with the reason. What the sidecar loses, or fails to do, costs
recomputing and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from hicache.errors import ErrorCode, HicacheError, InvalidArgumentError, UnavailableError
from hicache.integrations import transformers_identity as identity
from hicache.integrations import transformers_support as support
from hicache.integrations.transformers_pages import PagePacker, PageReader
from hicache.rpc.client import CommitResult, StoreResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hicache.rpc.client import Client

logger = logging.getLogger(__name__)

DEFAULT_PAGE_TOKENS = 64
WAIT_MS = 5_000

#: Failures that are the caller's to mend; all others pass, or cost recomputing.
CALLERS = frozenset({
    ErrorCode.INVALID,
    ErrorCode.DENIED,
    ErrorCode.UNAUTHENTICATED,
    ErrorCode.UNSUPPORTED,
})  # fmt: skip


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
    failed_loads: int = 0
    failed_stores: int = 0


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
        self._client = client
        self._model = model
        self._shape = support.shape_of(
            model.config, page_tokens, model.dtype if kv_dtype is None else kv_dtype
        )
        self._adapters = identity.active_adapters(model)
        fields = identity.namespace_fields(model, self._shape, revision=revision, adapter=adapter, salt=salt)
        self.namespace = client.namespace(**fields)
        self.counts = Counts()
        self._durable = durable
        self._wait_ms = wait_ms
        self._timeout_s = timeout_s

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self._shape.page_tokens

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._shape.page_bytes

    # --- the three calls

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
        self._check_ready()
        return self._store(support.prompt_of(input_ids, attention_mask), past_key_values)

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, logits_to_keep: int = 0
    ) -> Prefilled:
        """Load what is cached of a prompt, compute the rest, store its new pages.

        A sidecar that fails, or is not there, costs time and nothing else; see ``counts``.
        """
        self._check_ready()
        prompt = support.prompt_of(input_ids, attention_mask)
        cache, cached_tokens = self._load(prompt)
        kept = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        suffix = prompt[cached_tokens:].unsqueeze(0).to(self._model.device)
        with torch.no_grad():
            outputs = self._model(input_ids=suffix, past_key_values=cache, use_cache=True, **kept)
        computed_tokens = len(prompt) - cached_tokens
        self.counts.computed_tokens += computed_tokens
        return Prefilled(outputs, cached_tokens, computed_tokens, self._try_store(prompt, cache))

    # --- how

    def _load(self, prompt: Tensor) -> Loaded:
        cache: Any = DynamicCache(config=self._model.config)
        most_pages = (len(prompt) - 1) // self._shape.page_tokens
        if not most_pages:
            return Loaded(cache, 0)
        reader = PageReader(self._shape, self._model.device)
        tokens = prompt[: most_pages * self._shape.page_tokens]
        try:
            with self.namespace.fetch(tokens, wait_ms=self._wait_ms, timeout_s=self._timeout_s) as lease:
                reader.read(lease)
        except HicacheError as error:
            _let_pass(error, f"loading ended after {reader.pages} pages; the rest is recomputed")
            self.counts.failed_loads += 1
        for layer, (keys, values) in zip(cache.layers, reader.layers(), strict=reader.pages > 0):
            layer.update(keys, values)
        cached_tokens = reader.pages * self._shape.page_tokens
        assert cached_tokens < len(prompt), "the last token is always computed"
        self.counts.cached_tokens += cached_tokens
        return Loaded(cache, cached_tokens)

    def _try_store(self, prompt: Tensor, cache: Any) -> StoreResult | None:
        try:
            if not self._client.attached:
                raise UnavailableError("the sidecar is out of reach")  # loading has waited for it already
            return self._store(prompt, cache)
        except HicacheError as error:
            _let_pass(error, "the prompt's pages were not stored")
            self.counts.failed_stores += 1
            return None

    def _store(self, prompt: Tensor, cache: Any) -> StoreResult:
        layers = support.layers_of(cache, self._shape)
        pages = min(len(prompt), layers[0][0].shape[-2]) // self._shape.page_tokens
        if not pages:
            return StoreResult(0, CommitResult())
        packer = PagePacker(layers, self._shape, pages)
        tokens = prompt[: pages * self._shape.page_tokens]
        with self.namespace.reserve(tokens, wait_ms=self._wait_ms, timeout_s=self._timeout_s) as reservation:
            return reservation.store(packer, durable=self._durable)

    def _check_adapters(self) -> None:
        if (now := identity.active_adapters(self._model)) != self._adapters:
            raise InvalidArgumentError(
                f"the model's active adapters are {now!r}, and were {self._adapters!r} when this PrefixStore was made",
                hint="make one PrefixStore for each",
            )

    def _check_ready(self) -> None:
        self._check_adapters()
        if self._model.training:
            raise InvalidArgumentError(
                "the model is in training mode, where KV is random (dropout)", hint="call model.eval() first"
            )


def _let_pass(error: HicacheError, what: str) -> None:
    """Report a failure that costs recomputing; raise one that the caller must mend."""
    if error.code in CALLERS:
        raise error
    logger.warning("hicache: %s (%s)", what, error)
