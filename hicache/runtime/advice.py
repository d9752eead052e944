"""Advice of a running cache: what other sizes and other policies would have done with what was just asked of it.

A look-up costs next to nothing here: of each prompt only pages whose content folds to certain bytes are noted, about
one in 256, in a ring of bounded size. Everything else is worked out when somebody asks.
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections.abc import Sequence

from hicache.policy import POLICIES, make_policy
from hicache.policy.curve import SampledCurve, shadow_ratio
from hicache.types import TierSpec, slot_stride

#: Uses that the ring holds: four columns of 8 bytes each, 2 MiB together.
RING_USES = 1 << 16
#: A tier should hold at least so many watched pages.
WANTED_PAGES = 256
#: Of 256 byte values, how many at most mark a page as watched.
MOST_BYTES = 64
#: The lowest of them; not near zero, to which whatever is padded or counted from the start folds.
FIRST_BYTE = 0x9B
#: The first uses of a window fill the caches that advice is about.
SKIP_SHARE = 0.25
#: Shadows replay no more than the newest uses of the window: an answer should not take seconds.
SHADOW_USES = 1 << 14
#: Fewer uses than this after the start of the window say nothing.
LEAST_USES = 400
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
#: Never run as a shadow: they know things of a run that a sample does not have.
_BLIND = frozenset({"priority", "workload"})


@dataclasses.dataclass(frozen=True, slots=True)
class SizeAdvice:
    """A tier at ``factor`` of its size: what share of pages it, and the faster ones, would serve."""

    tier: str
    factor: float
    capacity_bytes: int
    hit_ratio: float


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyAdvice:
    """A policy's share of hits with the room of all tiers together; comparable with each other only."""

    name: str
    hit_ratio: float
    current: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """``uses`` of watched pages noted, ``rate`` of all pages watched, over ``span_ms``. Empty columns: too few yet."""

    uses: int
    rate: float
    span_ms: int
    unbounded: float
    sizes: tuple[SizeAdvice, ...] = ()
    policies: tuple[PolicyAdvice, ...] = ()


class Window:
    """The last uses of watched pages."""

    def __init__(self, specs: Sequence[TierSpec]) -> None:
        self._specs = specs
        self._idents = array("q", bytes(8 * RING_USES))
        self._depths = array("q", bytes(8 * RING_USES))
        self.count = 0  # noted so far
        self._when_ms = array("q", bytes(8 * RING_USES))
        self._asked = array("q", bytes(8 * RING_USES))  # pages asked for before each
        self._pages = 0  # asked for, watched or not
        self._page_bytes = 0
        self._values = 1
        self._pattern = _pattern(1)

    @property
    def rate(self) -> float:
        """The share of pages that is watched."""
        return self._values / 256

    def open(self, page_bytes: int) -> None:
        """A namespace was opened: the first one's pages decide how many are watched, so that small tiers are seen."""
        if self._page_bytes:
            return
        self._page_bytes = page_bytes
        least = min(spec.capacity_bytes // slot_stride(page_bytes) for spec in self._specs)
        self._values = min(MOST_BYTES, max(1, 256 * WANTED_PAGES // max(least, 1)))
        self._pattern = _pattern(self._values)

    def saw(self, namespace: int, prompt: bytes, width: int, now_ms: int) -> None:
        """A prompt was looked up. Pages deepest first, as a tree evicts them."""
        fold = folded(prompt, width)
        asked = self._pages
        self._pages += len(fold)
        for found in reversed(list(self._pattern.finditer(fold))):
            page = found.start()
            at = self.count % RING_USES
            # What differs before the page shows in the fold of what is before it, but for one chance in 256 a page.
            self._idents[at] = hash((namespace, fold[:page], prompt[page * width : (page + 1) * width]))
            self._depths[at] = page
            self._when_ms[at] = now_ms
            self._asked[at] = asked
            self.count += 1

    def uses(self) -> list[tuple[int, int]]:
        """(page, depth) of what is in the ring, oldest first."""
        pairs = list(zip(self._idents, self._depths, strict=True))
        if self.count <= RING_USES:
            return pairs[: self.count]
        at = self.count % RING_USES
        return pairs[at:] + pairs[:at]

    def advise(self, policy: str, now_ms: int) -> Advice:
        """What the window says. Takes about a second when the ring is full: not on the loop's thread."""
        uses = self.uses()
        oldest = self.count % RING_USES if self.count > RING_USES else 0
        span_ms = now_ms - self._when_ms[oldest] if uses else 0
        skip = int(len(uses) * SKIP_SHARE)
        if len(uses) - skip < LEAST_USES:
            return Advice(len(uses), self.rate, span_ms, 0.0)
        asked = self._pages - self._asked[(oldest + skip) % RING_USES]
        curve = SampledCurve([page for page, _ in uses], self.rate, skip=skip, asked=asked)
        pages = [spec.capacity_bytes // slot_stride(self._page_bytes) for spec in self._specs]
        return Advice(
            len(uses),
            self.rate,
            span_ms,
            curve.bound,
            tuple(self._sizes(curve, pages)),
            tuple(self._policies(policy, uses[-SHADOW_USES:], sum(pages))),
        )

    def _sizes(self, curve: SampledCurve, pages: Sequence[int]) -> list[SizeAdvice]:
        found = []
        for index, spec in enumerate(self._specs):
            above = sum(pages[:index])
            for factor in FACTORS:
                ratio = curve.ratio(above + int(pages[index] * factor))
                found.append(SizeAdvice(spec.name, factor, int(spec.capacity_bytes * factor), ratio))
        return found

    def _policies(self, current: str, uses: list[tuple[int, int]], pages: int) -> list[PolicyAdvice]:
        room = max(1, round(pages * self.rate))
        skip = int(len(uses) * SKIP_SHARE)
        found = []
        for name in dict.fromkeys((current, *sorted(set(POLICIES) - _BLIND))):
            policy = make_policy(name)
            resize = getattr(policy, "resize", None)
            if resize is not None:
                resize(room)
            found.append(PolicyAdvice(name, shadow_ratio(policy, uses, room, skip=skip), name == current))
        return sorted(found, key=lambda each: -each.hit_ratio)


def _pattern(values: int) -> re.Pattern[bytes]:
    return re.compile(
        b"[" + re.escape(bytes([FIRST_BYTE])) + b"-" + re.escape(bytes([FIRST_BYTE + values - 1])) + b"]"
    )


def folded(prompt: bytes, width: int) -> bytes:
    """One byte a page, of some bytes of its symbol spread over its width, all pages at once as long numbers."""
    pages = len(prompt) // width
    half = width // 2
    total = 0
    for offset in (0, 1, half):
        total ^= int.from_bytes(prompt[offset::width], "little")
    return total.to_bytes(pages, "little")
