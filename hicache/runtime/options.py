"""Settings of a service: checked when made, errors name the flag. Specs of the tiers follow from them."""

from __future__ import annotations

import dataclasses

from hicache.engine import EngineOptions
from hicache.errors import ConfigError
from hicache.policy.admission import NO_ADMISSION
from hicache.tier.codec_names import LOSSLESS, PAGE_CODECS
from hicache.types import LARGE_ALIGN_BYTES, TierKind, TierSpec, WritePolicy

GENERATION_BYTES = 8  # width of the counters that clients read beside each host slot
SEGMENT_GRAIN_BYTES = 2 << 20  # a huge page
SMALL_SEGMENT_BYTES = 1 << 20
SEGMENTS_WANTED = 16
MIN_PROMOTION_COPIES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What a sidecar keeps pages in, and how.

    A tier is left out by leaving its size 0; one must be there. ``device``: "", "cpu", or CUDA devices
    ("cuda:<n>", "cuda:0,cuda:1", "cuda:0-3": evenly), which copy by ``copy_engine`` ("auto": the fastest as
    measured) and are given up after ``device_timeout_ms`` without an answer, 0: never. ``share_device``: clients
    may map its pool. Segment sizes of 0 are
    derived from the tier's capacity (``segment_bytes_for``). ``workers``: threads that copy clients' pages in.
    ``bounce_bytes``: buffers for copies between tiers of which neither can be addressed. ``copy_chunk_bytes``: how
    much of a copy one worker does at a time. ``disk_sync``: fsync each commit, for power cuts. ``disk_codec``: how
    pages of lossless namespaces are compressed; ``disk_quarantine_bytes``: of damaged records that are kept for
    study, within ``disk_bytes``. ``scrub_bytes_per_s``: how fast the disk's contents are verified in the
    background, 0: not. ``digest``: keep a running digest of the engine's actions. ``device_policy``,
    ``disk_admission`` and the like: "" as ``policy``, ``admission``. ``record``: a file for what is looked up and
    stored, of ``record_bytes`` at most; then it moves on, ``record_files`` are kept; ``record_salt``: write the
    salt of its ids into it.
    """

    device: str = ""
    device_bytes: int = 0
    device_segment_bytes: int = 0
    copy_engine: str = "auto"
    share_device: bool = False
    device_timeout_ms: int = 30_000
    host_bytes: int = 0
    host_segment_bytes: int = 0
    disk_path: str = ""
    disk_bytes: int = 0
    disk_sync: bool = False
    disk_readers: int = 2
    disk_compress_workers: int = 2
    disk_codec: str = LOSSLESS
    disk_quarantine_bytes: int = 64 << 20
    scrub_bytes_per_s: int = 8 << 20
    policy: str = "adaptive"
    device_policy: str = ""
    host_policy: str = ""
    disk_policy: str = ""
    admission: str = NO_ADMISSION
    host_admission: str = ""
    disk_admission: str = ""
    write_policy: WritePolicy = WritePolicy.SELECTIVE
    selective_hits: int = 2
    default_ttl_ms: int = 30_000
    max_ttl_ms: int = 600_000
    expiry_grace_ms: int = 2_000
    free_low_fraction: float = 0.05
    max_copy_pages: int = 64
    max_copies: int = 32
    workers: int = 2
    host_workers: int = 1
    prefault: bool = True
    bounce_bytes: int = 64 << 20
    copy_chunk_bytes: int = 4 << 20
    digest: bool = False
    record: str = ""
    record_bytes: int = 256 << 20
    record_files: int = 3
    record_salt: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot work. Raises ConfigError naming the flag."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 0:
                raise ConfigError(f"{flag(field.name)} must not be negative")
        for name in (
            "disk_readers",
            "disk_compress_workers",
            "workers",
            "host_workers",
            "copy_chunk_bytes",
            "record_bytes",
            "record_files",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} must be at least 1")
        if self.bounce_bytes < self.copy_chunk_bytes:
            raise ConfigError("--bounce-bytes must be at least --copy-chunk-bytes")
        self._check_tiers()
        self._check_segments()
        self.engine_options(self.specs())  # its own checks

    def _check_tiers(self) -> None:
        if bool(self.device) != bool(self.device_bytes):
            missing, given = ("--device-bytes", "--device") if self.device else ("--device", "--device-bytes")
            raise ConfigError(f"{given} is set and {missing} is not", hint="they go together")
        if self.share_device and not self.device:
            raise ConfigError("--share-device: there is no device tier to share", hint="set --device, too")
        if bool(self.disk_path) != bool(self.disk_bytes):
            missing, given = (
                ("--disk-bytes", "--disk-path") if self.disk_path else ("--disk-path", "--disk-bytes")
            )
            raise ConfigError(f"{given} is set and {missing} is not", hint="they go together")
        if self.disk_codec not in PAGE_CODECS:
            raise ConfigError(f"--disk-codec: {self.disk_codec!r} is not one of {', '.join(PAGE_CODECS)}")
        if not (self.device_bytes or self.host_bytes or self.disk_bytes):
            raise ConfigError(
                "no tier is configured", hint="set --host-bytes, --device-bytes or --disk-bytes"
            )

    def _check_segments(self) -> None:
        for name in ("device", "host"):
            capacity = getattr(self, f"{name}_bytes")
            segment = getattr(self, f"{name}_segment_bytes")
            if capacity and capacity < LARGE_ALIGN_BYTES:
                raise ConfigError(
                    f"--{name}-bytes: {capacity} bytes hold no memory page of {LARGE_ALIGN_BYTES}"
                )
            if segment > capacity:
                raise ConfigError(
                    f"--{name}-segment-bytes: {segment} is more than --{name}-bytes, {capacity}"
                )
            if segment % LARGE_ALIGN_BYTES:
                raise ConfigError(f"--{name}-segment-bytes: {segment} is no multiple of {LARGE_ALIGN_BYTES}")

    def specs(self, disk_usable_bytes: int | None = None) -> tuple[TierSpec, ...]:
        """The tiers, fastest first. ``disk_usable_bytes``: what the open disk store takes of its capacity."""
        tiers: list[TierSpec] = []
        if self.device_bytes:
            segment = self.device_segment_bytes or segment_bytes_for(self.device_bytes)
            tiers.append(TierSpec("device", TierKind.DEVICE, self.device_bytes, segment))
        if self.host_bytes:
            segment = self.host_segment_bytes or segment_bytes_for(self.host_bytes)
            spec = TierSpec(
                "host", TierKind.HOST, self.host_bytes, segment, GENERATION_BYTES, client_readable=True
            )
            tiers.append(spec)
        if self.disk_bytes:
            usable = self.disk_bytes if disk_usable_bytes is None else disk_usable_bytes
            tiers.append(TierSpec("disk", TierKind.DISK, usable, keyed=True, durable=True))
        return tuple(tiers)

    def engine_options(self, specs: tuple[TierSpec, ...]) -> EngineOptions:
        """The engine's part of the settings."""
        return EngineOptions(
            tiers=specs,
            policy=self.policy,
            tier_policies=self._by_tier(specs, "policy"),
            admission=self.admission,
            tier_admissions=self._by_tier(specs[1:], "admission"),
            write_policy=self.write_policy,
            selective_hits=self.selective_hits,
            default_ttl_ms=self.default_ttl_ms,
            max_ttl_ms=self.max_ttl_ms,
            expiry_grace_ms=self.expiry_grace_ms,
            free_low_fraction=self.free_low_fraction,
            max_copy_pages=self.max_copy_pages,
            max_copies=self.max_copies,
            promotion_copies=max(MIN_PROMOTION_COPIES, 2 * self.disk_readers),
            digest=self.digest,
        )

    def _by_tier(self, specs: tuple[TierSpec, ...], what: str) -> dict[str, str]:
        """The tiers for which a setting of their own is given. One for a tier that is left out means nothing."""
        given = {spec.name: str(getattr(self, f"{spec.name}_{what}", "")) for spec in specs}
        return {name: value for name, value in given.items() if value}


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.removesuffix("_ms").replace("_", "-")


def segment_bytes_for(capacity_bytes: int) -> int:
    """A sixteenth of the capacity in whole huge pages; less for small tiers, which then have fewer segments."""
    segment = capacity_bytes // SEGMENTS_WANTED // SEGMENT_GRAIN_BYTES * SEGMENT_GRAIN_BYTES
    if segment:
        return segment
    whole = capacity_bytes // LARGE_ALIGN_BYTES * LARGE_ALIGN_BYTES
    return min(SMALL_SEGMENT_BYTES, whole)
