"""What of a model's configuration decides its KV, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hicache.errors import UnsupportedError

#: What configurations carry that changes no key and no value, but differs between ways to load one model.
NOT_IDENTITY = frozenset({
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
})  # fmt: skip


def config_digest(config: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> str:
    """A digest of all that a configuration says about how KV is computed: rope, norms, sizes, quantisation.

    ``extra``: what else decides it, by names that no configuration has.
    Raises UnsupportedError for a configuration that cannot be told.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY} | dict(extra or {})
    try:
        try:
            text = json.dumps(kept, sort_keys=True, default=str)
        except TypeError:  # keys that JSON has no order or no words for
            text = json.dumps(_spelled(kept), default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"the model's configuration has no digest: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _spelled(value: Any) -> Any:
    """The same with each mapping as a list, in an order that its keys' kinds and words give."""
    if isinstance(value, Mapping):
        rows = [[type(key).__name__, str(key), _spelled(of)] for key, of in value.items()]
        return sorted(rows, key=lambda row: row[:2])
    if isinstance(value, list | tuple):
        return [_spelled(each) for each in value]
    return value
