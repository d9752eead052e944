"""What one replay is made of: sizes of tiers, the machine, the model, and how requests come."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from hicache.engine.pools import KEYED_OVERHEAD_BYTES
from hicache.errors import ConfigError
from hicache.sim.hardware import HARDWARE, Hardware
from hicache.sim.models import MODELS, Model
from hicache.types import LARGE_ALIGN_BYTES, SLOTS_PER_SEGMENT, TierKind, TierSpec, WritePolicy, slot_stride

ORDER = (TierKind.DEVICE, TierKind.HOST, TierKind.DISK)


class Unit(enum.Enum):
    """What a size is told in."""

    SHARE = "share"  # of the trace's unique blocks
    PAGES = "pages"
    BYTES = "bytes"


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """Of one tier."""

    kind: TierKind
    amount: float
    unit: Unit

    def pages(self, unique_blocks: int, bytes_each: int) -> int:
        """How many pages that is, at least one. Raises ConfigError for bytes that hold none."""
        if self.unit is Unit.SHARE:
            return max(1, int(self.amount * unique_blocks))
        pages = int(self.amount) if self.unit is Unit.PAGES else int(self.amount) // bytes_each
        if not pages:
            raise ConfigError(
                f"--capacity: {int(self.amount)} bytes of {self.kind.value} hold no block of {bytes_each} bytes",
                hint="give it more, or name a smaller --model",
            )
        return pages


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """One point of a sweep: the tiers' sizes, fastest first, and how the user wrote them."""

    label: str
    sizes: tuple[Size, ...]

    def __post_init__(self) -> None:
        """Refuse tiers twice or in another order. Raises ConfigError."""
        kinds = [ORDER.index(size.kind) for size in self.sizes]
        if not kinds or kinds != sorted(set(kinds)):
            raise ConfigError(
                f"--capacity: {self.label!r} does not name each tier once, fastest first",
                hint="write for example 5%, 40GiB, or device:8GiB+host:40GiB+disk:1TiB",
            )

    def specs(self, unique_blocks: int, page_bytes: int) -> tuple[TierSpec, ...]:
        """The tiers for the engine. A tier is whole: one pool has it to itself."""
        return tuple(_spec(size, unique_blocks, page_bytes) for size in self.sizes)


def _spec(size: Size, unique_blocks: int, page_bytes: int) -> TierSpec:
    name = size.kind.value
    if size.kind is TierKind.DISK:
        each = -(-page_bytes // LARGE_ALIGN_BYTES) * LARGE_ALIGN_BYTES + KEYED_OVERHEAD_BYTES
        capacity = size.pages(unique_blocks, each) * each
        if size.unit is Unit.BYTES:
            capacity = int(size.amount)
        return TierSpec(name, size.kind, capacity, keyed=True, durable=True)
    stride = slot_stride(page_bytes)
    pages = size.pages(unique_blocks, stride)
    segments = -(-pages // SLOTS_PER_SEGMENT)
    segment_bytes = -(-pages // segments) * stride
    return TierSpec(name, size.kind, segments * segment_bytes, segment_bytes, client_readable=True)


class Arrivals(enum.Enum):
    """When requests come."""

    INSTANT = "instant"  # each is done before the next comes, and nothing takes time: pure hit ratios
    TRACE = "trace"  # when the trace says
    SCALED = "scaled"  # the same, faster or slower
    POISSON = "poisson"  # at random, as many a second as in the trace
    BACK_TO_BACK = "back-to-back"  # whenever a place is free


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    """``speed``: how many times faster than the trace (SCALED, POISSON)."""

    arrivals: Arrivals = Arrivals.INSTANT
    speed: float = 1.0

    @property
    def label(self) -> str:
        """As the command line writes it."""
        return self.arrivals.value if self.speed == 1.0 else f"{self.arrivals.value}:{self.speed:g}"

    @property
    def seeded(self) -> bool:
        """Whether a seed makes a difference."""
        return self.arrivals is Arrivals.POISSON


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What all cells of a sweep share.

    ``warmup``: the share of requests that only warm the cache. ``wait_ms``: how long a request waits for pages from
    lower tiers, at most; never longer than computing them would take. ``store_wait_ms``: how long a store waits for
    room. ``running``: requests that a replica works on at once; ``replicas``: copies of the model that prefill, one
    prompt at a time each. ``stored_ratio``: how many times smaller a page is on disk. ``digest``: of all actions.
    """

    model: Model = MODELS["llama-3-8b"]
    hardware: Hardware = HARDWARE["h100-pcie5-nvme"]
    write_policy: WritePolicy = WritePolicy.SELECTIVE
    selective_hits: int = 2
    admission: str = ""
    warmup: float = 0.0
    wait_ms: int = 10_000
    store_wait_ms: int = 1_000
    running: int = 64
    replicas: int = 1
    stored_ratio: float = 1.0
    digest: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises ConfigError naming the flag."""
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError("--warmup must be a share of the requests below 100%")
        if self.running < 1 or self.replicas < 1 or self.selective_hits < 1:
            raise ConfigError("--running, --replicas and --selective-hits must be at least 1")
        if self.stored_ratio < 1.0:
            raise ConfigError("--stored-ratio must be at least 1")

    def page_bytes(self, block_tokens: int) -> int:
        """Of one block's KV."""
        return self.model.token_bytes * block_tokens

    def prefill_us(self, first: int, end: int) -> int:
        """How long computing positions [first, end) keeps the model busy."""
        rate = self.model.gpus * self.hardware.flops * self.hardware.mfu
        return round(self.model.prefill_flops(first, end) * 1e6 / rate)

    @property
    def token_us(self) -> int:
        """How long one output token takes: the active weights are read once, at 70 % of the memory's bandwidth."""
        return round(
            2 * self.model.active_params * 1e6 / (self.model.gpus * self.hardware.memory_bytes_per_s * 0.7)
        )


def lease_tier(specs: Sequence[TierSpec]) -> int:
    """Where leases are: the first tier that clients can read, else the first."""
    return next((index for index, spec in enumerate(specs) if spec.client_readable), 0)
