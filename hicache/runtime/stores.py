"""Opens the stores of the configured tiers. What a tier needs (torch, lmdb) is imported only where it is configured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hicache.errors import ConfigError
from hicache.runtime.options import ServiceOptions
from hicache.runtime.ports import TierPort
from hicache.types import Notify, TierKind, TierSpec

if TYPE_CHECKING:
    from hicache.tier.disk import DiskStore


@dataclasses.dataclass(frozen=True, slots=True)
class Stores:
    """The open tiers, fastest first. ``disk`` once more, for what only it has (namespaces, recovery)."""

    ports: tuple[TierPort, ...]
    disk: DiskStore | None

    @property
    def specs(self) -> tuple[TierSpec, ...]:
        """Of all tiers."""
        return tuple(port.spec for port in self.ports)


def open_stores(
    options: ServiceOptions,
    notify: Notify,
    wall_ms: Callable[[], int] = lambda: 0,
    now_ns: Callable[[], int] = lambda: 0,
) -> Stores:
    """Open every configured tier, or none: what was opened before a failure is closed again.

    ``wall_ms``: unix time. ``now_ns``: the clock by which a device is given up.

    Raises ConfigError (a folder in use, a missing package), ExhaustedError, UnavailableError.
    """
    with contextlib.ExitStack() as opened:
        disk = _open_disk(options, notify, wall_ms) if options.disk_bytes else None
        if disk is not None:
            opened.callback(disk.close)
        ports: list[TierPort] = []
        for index, spec in enumerate(options.specs(disk.usable_bytes if disk is not None else None)):
            if spec.kind is TierKind.DISK:
                assert disk is not None, "a disk tier without a disk store"
                ports.append(TierPort(index, spec, disk))
                continue
            if spec.kind is TierKind.DEVICE:
                ports.append(_open_device(index, spec, options, notify, now_ns=now_ns))
            else:
                ports.append(_open_host(index, spec, options, notify))
            opened.callback(ports[-1].store.close)
        _pin(ports)
        opened.pop_all()
    return Stores(tuple(ports), disk)


def _open_disk(options: ServiceOptions, notify: Notify, wall_ms: Callable[[], int]) -> DiskStore:
    try:
        from hicache.tier.disk import DiskStore, Layout
    except ImportError as error:
        raise ConfigError(f"--disk-path: the disk tier needs lmdb and zstandard: {error}") from error
    try:
        return DiskStore(
            options.disk_path,
            options.disk_bytes,
            notify,
            layout=Layout(
                quarantine_bytes=options.disk_quarantine_bytes,
                scrub_bytes_per_s=options.scrub_bytes_per_s,
            ),
            page_codec=options.disk_codec,
            sync=options.disk_sync,
            readers=options.disk_readers,
            compress_workers=options.disk_compress_workers,
            wall_ms=wall_ms,
        )
    except ConfigError as error:
        raise ConfigError(f"--disk-path: {error.message}", hint=error.hint) from error


def _open_device(
    index: int, spec: TierSpec, options: ServiceOptions, notify: Notify, *, now_ns: Callable[[], int]
) -> TierPort:
    from hicache.device import DeviceOptions, open_device

    settings = DeviceOptions(
        copy_engine=options.copy_engine, share=options.share_device, timeout_ms=options.device_timeout_ms
    )
    store = open_device(options.device, spec, notify, settings, now_ns=now_ns)
    return TierPort(index, spec, store, shared=store if options.share_device else None)


def _pin(ports: Sequence[TierPort]) -> None:
    """Let a device that copies out of host memory by itself know the host tier's."""
    pins = next((port.store.pins for port in ports if hasattr(port.store, "pins")), None)
    for port in ports:
        if pins is not None and hasattr(port.store, "on_memory"):
            port.store.on_memory(pins.add, pins.remove)


def _open_host(index: int, spec: TierSpec, options: ServiceOptions, notify: Notify) -> TierPort:
    from hicache.tier.host import HostStore

    store = HostStore(spec, notify, workers=options.host_workers, prefault=options.prefault)
    return TierPort(index, spec, store, addressable=store, mappable=store)
