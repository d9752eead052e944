"""What machines can do: presets, each with its source, and constants of a bench result in their place.

The figures are what a link gives in practice where we know it, else a stated share of the published peak. Prices are
list prices or plain assumptions, and there to be replaced by one's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hicache.errors import ConfigError
from hicache.sim.links import LinkSpec
from hicache.types import TierKind

GB = 1e9
#: A GPU takes and gives pages at about a third of its memory's bandwidth: each byte is read, written, and in a stride.
DEVICE_SHARE = 1 / 3
#: List prices of memory and local SSD: Google Cloud, us-central1, N2 custom memory and local SSD, 2025.
RAM_USD_PER_GIB_HOUR = 0.0042
DISK_USD_PER_GIB_HOUR = 0.00011


@dataclasses.dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU of a server, its host and its disk.

    ``flops``: dense bf16, a second, at the peak; ``mfu``: the share of it that prefill reaches. ``to_gpu`` and
    ``from_gpu``: between host memory and the GPU. ``memory_bytes_per_s``: of the GPU's own memory.
    """

    name: str
    flops: float
    mfu: float
    memory_bytes_per_s: float
    to_gpu: LinkSpec
    from_gpu: LinkSpec
    disk_read: LinkSpec
    disk_write: LinkSpec
    source: str
    gpu_usd_per_hour: float = 0.0
    ram_usd_per_gib_hour: float = RAM_USD_PER_GIB_HOUR
    disk_usd_per_gib_hour: float = DISK_USD_PER_GIB_HOUR

    def link(self, src: TierKind | None, dst: TierKind | None) -> tuple[str, LinkSpec]:
        """The way between two tiers, by name; None stands for the model at work on the GPU."""
        if src is TierKind.DISK:
            return "disk_read", self.disk_read
        if dst is TierKind.DISK:
            return "disk_write", self.disk_write
        if src is TierKind.HOST:
            return "to_gpu", self.to_gpu
        if dst is TierKind.HOST:
            return "from_gpu", self.from_gpu
        return "device", LinkSpec(self.memory_bytes_per_s * DEVICE_SHARE)


def _pcie(gb_per_s: float) -> LinkSpec:
    return LinkSpec(gb_per_s * GB, 20)


def _disk(read_gb_per_s: float, write_gb_per_s: float) -> tuple[LinkSpec, LinkSpec]:
    return LinkSpec(read_gb_per_s * GB, 100, 4), LinkSpec(write_gb_per_s * GB, 50, 2)


HARDWARE: Mapping[str, Hardware] = {
    each.name: each
    for each in (
        Hardware(
            "h100-pcie5-nvme", 989e12, 0.5, 3350 * GB, _pcie(50), _pcie(50), *_disk(13, 6.6),
            "NVIDIA H100 SXM datasheet (989 TFLOPS dense bf16, 3.35 TB/s, PCIe 5.0 x16 at 78 %); Samsung PM1743 "
            "product brief (13 and 6.6 GB/s sequential); GPU price: an assumption", 3.0,
        ),
        Hardware(
            "h200", 989e12, 0.5, 4800 * GB, _pcie(50), _pcie(50), *_disk(13, 6.6),
            "NVIDIA H200 datasheet (989 TFLOPS dense bf16, 4.8 TB/s, PCIe 5.0 x16 at 78 %); disk as "
            "h100-pcie5-nvme; GPU price: an assumption", 3.5,
        ),
        Hardware(
            "a100-pcie4-nvme", 312e12, 0.5, 2039 * GB, _pcie(25), _pcie(25), *_disk(6.8, 4.0),
            "NVIDIA A100 80 GB datasheet (312 TFLOPS dense bf16, 2.0 TB/s, PCIe 4.0 x16 at 78 %); Samsung PM9A3 "
            "product brief (6.8 and 4.0 GB/s sequential); GPU price: an assumption", 1.8,
        ),
        Hardware(
            "a10g", 70e12, 0.5, 600 * GB, _pcie(20), _pcie(20), *_disk(2.0, 1.0),
            "NVIDIA A10G datasheet (70 TFLOPS dense bf16, 600 GB/s, PCIe 4.0 x16); instance storage and GPU price: "
            "assumptions", 1.0,
        ),
        Hardware(
            "cpu-laptop", 0.5e12, 0.5, 50 * GB, _pcie(10), _pcie(10), *_disk(3.0, 1.5),
            "assumptions: a laptop's memcpy, matrix units and NVMe disk", 0.0,
        ),
    )
}  # fmt: skip

LINKS = ("to_gpu", "from_gpu", "disk_read", "disk_write")


def find_hardware(name: str) -> Hardware:
    """By its name. Raises ConfigError."""
    if name not in HARDWARE:
        raise ConfigError(
            f"--hardware: unknown hardware {name!r}", hint=f"one of {', '.join(sorted(HARDWARE))}"
        )
    return HARDWARE[name]


def with_constants(hardware: Hardware, constants: Mapping[str, object], name: str) -> Hardware:
    """The hardware with what a bench result measured in the place of the preset.

    Understood: ``links``: ``{name: {"bytes_per_s", "latency_us", "lanes"}}`` for any of ``LINKS``; and what
    ``bench/host.py`` writes (``mib``, ``copy_verified_s``): one verified copy out of host memory, both ways.
    Raises ConfigError where neither is there.
    """
    changes: dict[str, Any] = {}
    links = constants.get("links")
    try:
        if isinstance(links, Mapping):
            for link, fields in links.items():
                if link not in LINKS:
                    raise ConfigError(
                        f"--constants: {name}: no link {link!r}", hint=f"one of {', '.join(LINKS)}"
                    )
                changes[link] = dataclasses.replace(getattr(hardware, link), **fields)
        elif "mib" in constants and "copy_verified_s" in constants:
            mib, copy_s = constants["mib"], constants["copy_verified_s"]
            rate = float(str(mib)) * (1 << 20) / float(str(copy_s))
            changes = {
                link: dataclasses.replace(getattr(hardware, link), bytes_per_s=rate) for link in LINKS[:2]
            }
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--constants: {name}: {error}") from None
    if not changes:
        raise ConfigError(
            f"--constants: {name} holds neither `links` nor a copy time", hint="name a file of bench/results"
        )
    source = f"{', '.join(sorted(changes))}: {name}; otherwise {hardware.source}"
    return dataclasses.replace(hardware, source=source, **changes)
