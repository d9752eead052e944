"""Cache layers that keep every token, and the cache made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class WholeSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding-window layer that forgets nothing: the model sees its window, the store sees all.

    What ``DynamicSlidingWindowLayer`` drops as the window moves on is the beginning of the prompt, which is what
    others share. Costs the memory of a layer of full attention.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; returns what the new tokens may look at, as the mask expects it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        self.cumulative_length += key_states.shape[-2]
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return self.keys[:, :, -visible:], self.values[:, :, -visible:]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; never the first ones."""
        DynamicLayer.crop(self, tokens_to_remove)
        if self.keys is not None:
            self.cumulative_length = self.keys.shape[-2]


def whole_layers(cache: DynamicCache) -> DynamicCache:
    """The cache, with layers that keep every token in place of those that would not. It must be empty."""
    cache.layers = [
        WholeSlidingLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache
