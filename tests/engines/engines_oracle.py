"""What vLLM says without us: cold, and from its own warm prefix cache. One engine for each model and block size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from engines_kit import Answer, Host, Round

#: Batches of another shape may round differently. Of one float32 logprob to another, and of bfloat16.
NEAR = {"float32": 1e-3, "bfloat16": 0.3}


@dataclasses.dataclass(frozen=True, slots=True)
class Truth:
    """Prompt by prompt, alone: computed whole, and with vLLM's own cached prefix."""

    cold: list[Answer]
    warm: list[Answer]

    def certain(self) -> list[int]:
        """Prompts at which vLLM agrees with itself: in bfloat16 two tokens may be too close to call."""
        return [
            place
            for place, (cold, warm) in enumerate(zip(self.cold, self.warm, strict=True))
            if cold.tokens == warm.tokens
        ]


class Oracle:
    """Remembers what it was asked."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[tuple[Path, int, str, int], Truth] = {}

    def __call__(
        self,
        model: Path,
        block_size: int,
        prompts: Sequence[list[int]],
        new_tokens: int,
        dtype: str = "float32",
    ) -> Truth:
        key = (model, block_size, repr(prompts), new_tokens)
        if key not in self._known:
            with self._host.running(model, block_size=block_size, dtype=dtype) as engine:
                rounds: list[Round] = []
                for given in [[one] for one in prompts] * 2:
                    rounds.append(engine.run(given, new_tokens=new_tokens, logprobs=5))
            half = len(prompts)
            assert all(one.local for one in rounds[half:]), "vLLM's own cache was warm"
            self._known[key] = Truth(
                [one.answers[0] for one in rounds[:half]], [one.answers[0] for one in rounds[half:]]
            )
        return self._known[key]


def assert_near(got: Answer, truth: Answer, dtype: str) -> None:
    """The same tokens, and logprobs that differ by rounding only."""
    assert got.tokens == truth.tokens
    for mine, theirs in zip(got.logprobs, truth.logprobs, strict=True):
        known = {int(token): value for token, value in theirs}
        for token, value in mine:
            if int(token) in known:  # the fifth best may be another where two are close
                assert abs(value - known[int(token)]) < NEAR[dtype]
