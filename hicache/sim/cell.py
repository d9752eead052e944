"""One cell of a sweep: a policy, a capacity, a way of arriving and a seed; run, and told as plain values."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable

from hicache.engine import EngineOptions
from hicache.engine import events as ev
from hicache.keys import fingerprint
from hicache.sim.instant import NAMESPACE, SESSION, Instant, Prices
from hicache.sim.links import Agenda
from hicache.sim.options import Arrivals, Capacity, Mode, Settings
from hicache.sim.packed import SYMBOL_BYTES, PackedTrace
from hicache.sim.serving import Serving
from hicache.sim.shell import Shell
from hicache.sim.tally import COLUMNS, Tally
from hicache.sim.wires import Wires
from hicache.types import Namespace, SymbolKind
from hicache.version import __version__

#: Of the results below; a result of another one is computed anew.
RESULT_FORMAT = 1
SEED_WORD = "{seed}"
EVERYTHING = "always"  # the admission that refuses nothing


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """``policy`` may hold ``{seed}``, in whose place the seed goes."""

    policy: str
    capacity: Capacity
    mode: Mode
    seed: int

    @property
    def seeded(self) -> bool:
        """Whether another seed can give another result."""
        return self.mode.seeded or SEED_WORD in self.policy

    def config(self, settings: Settings) -> dict[str, object]:
        """Everything that the result depends on, beside the trace and the version."""
        return {
            "policy": self.policy,
            "capacity": self.capacity.label,
            "mode": self.mode.label,
            "seed": self.seed,
            "model": settings.model.name,
            "hardware": settings.hardware.name,
            "write_policy": settings.write_policy.value,
            **{
                name: getattr(settings, name)
                for name in (
                    "selective_hits", "admission", "warmup", "wait_ms", "store_wait_ms", "running", "replicas",
                    "stored_ratio",
                )
            },
            "constants": {
                name: dataclasses.asdict(getattr(settings.hardware, name))
                for name in ("to_gpu", "from_gpu", "disk_read", "disk_write")
            } | {"flops": settings.hardware.flops, "mfu": settings.hardware.mfu},
        }  # fmt: skip

    def key(self, settings: Settings, trace_sha256: str, block_tokens: int) -> str:
        """Names the result: equal exactly when everything that it depends on is."""
        parts = [RESULT_FORMAT, __version__, trace_sha256, block_tokens, self.config(settings)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def run_cell(
    cell: Cell, settings: Settings, trace: PackedTrace, now_ns: Callable[[], int]
) -> dict[str, object]:
    """Replay the trace once. ``now_ns``: any clock; it says how long the replay took, nothing else."""
    began_ns = now_ns()
    world = World(cell, settings, trace)
    world.run()
    return world.result() | {"took_s": round((now_ns() - began_ns) / 1e9, 3)}


class World:
    """An engine with its shell, ready for a trace."""

    def __init__(self, cell: Cell, settings: Settings, trace: PackedTrace) -> None:
        facts = trace.facts
        self.cell, self.settings, self.trace = cell, settings, trace
        self.page_bytes = settings.page_bytes(facts.block_tokens)
        specs = cell.capacity.specs(facts.unique_blocks, self.page_bytes)
        options = EngineOptions(
            tiers=specs,
            policy=cell.policy.replace(SEED_WORD, str(cell.seed)),
            write_policy=settings.write_policy,
            selective_hits=settings.selective_hits,
            story_events=8,
            digest=settings.digest,
            admission=settings.admission or EVERYTHING,
        )
        self.instant = cell.mode.arrivals is Arrivals.INSTANT
        self.agenda = Agenda()
        kinds = [spec.kind for spec in specs]
        self.wires = Wires(self.agenda, settings.hardware, kinds, settings.stored_ratio)
        carry = None if self.instant else self.wires.carry
        self.shell = Shell(options, carry=carry, stored_ratio=settings.stored_ratio)
        self.prices = Prices(settings, self.wires, self.shell, facts.block_tokens)
        self.warmup = int(settings.warmup * facts.requests)
        self.tally = Tally(facts.requests, self.warmup, len(specs))
        self.serving = Serving(
            self.shell, self.wires, self.agenda, settings=settings, prices=self.prices, tally=self.tally
        )
        self._open(facts.block_tokens)

    def _open(self, block_tokens: int) -> None:
        space = Namespace(
            self.settings.model.name,
            block_tokens,
            self.page_bytes,
            symbol_kind=SymbolKind.HASHES,
            symbol_hash_bytes=SYMBOL_BYTES,
        )
        self.shell.handle(ev.SessionOpened(SESSION, space.tenant))
        self.shell.handle(ev.NamespaceOpened(NAMESPACE, space, fingerprint(space)))

    def run(self) -> None:
        """The whole trace."""
        facts, cell = self.trace.facts, self.cell
        if self.instant:
            request = Instant(self.shell, self.prices, self.tally, self.trace.classes).request
            for row in self.trace:
                request(row)
            return
        gap_us = facts.span_ms * 1000 / max(facts.requests - 1, 1)
        rows = iter(self.trace)
        self.serving.run(rows, self.trace.classes, cell.mode, seed=cell.seed, mean_gap_us=gap_us)

    # --- what came of it

    def result(self) -> dict[str, object]:
        """Plain values; see docs/SIMULATOR.md."""
        facts, settings, tally = self.trace.facts, self.settings, self.tally
        asked, hits = tally.total("asked"), tally.total("hits")
        return {
            "format": RESULT_FORMAT,
            "key": self.cell.key(settings, facts.sha256, facts.block_tokens),
            "version": __version__,
            "trace": dataclasses.asdict(facts),
            "config": self.cell.config(settings),
            "seeded": self.cell.seeded,
            "warmup": {"rule": f"the first {settings.warmup:.0%} of the requests are not counted",
                       "requests": self.warmup},
            "tiers": [
                {"name": spec.name, "capacity_bytes": spec.capacity_bytes, "pages": self._tier_pages(index)}
                for index, spec in enumerate(self.shell.specs)
            ],
            "requests": tally.total("requests"),
            "asked_pages": asked,
            "hit_pages": hits,
            "hit_ratio": hits / asked if asked else 0.0,
            "late_pages": tally.late_pages,
            "refused_stores": tally.refused_stores,
            "hits_by_tier": tally.hits_by_tier,
            "prefill": self._prefill(),
            "ttft_ms": self._ttft(),
            "moved": self._moved(),
            "columns": list(COLUMNS),
            "rows": tally.rows,
            "load": self._load(),
            "digest": self.shell.engine.action_digest(),
        }  # fmt: skip

    def _tier_pages(self, index: int) -> int:
        spec = self.shell.specs[index]
        return spec.capacity_bytes // (
            self.shell.stored_bytes(self.page_bytes) if spec.keyed else self.page_bytes
        )

    def _prefill(self) -> dict[str, float]:
        saved_s, computed_s = self.tally.total("saved_us") / 1e6, self.tally.total("computed_us") / 1e6
        rate = self.settings.model.gpus * self.settings.hardware.flops * self.settings.hardware.mfu
        return {"saved_s": saved_s, "computed_s": computed_s, "saved_flops": saved_s * rate}

    def _ttft(self) -> dict[str, float]:
        requests = self.tally.total("requests")
        mean = self.tally.total("ttft_us") / requests / 1000 if requests else 0.0
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        return {"mean": mean} | {
            name: self.tally.ttft.quantile_us(share) / 1000 for name, share in shares.items()
        }

    def _moved(self) -> dict[str, object]:
        """Bytes over the whole replay, the warm-up included; a disk's as they are stored."""
        counters, specs = self.shell.engine.stats().counters, self.shell.specs
        copied = {
            f"{specs[src].name}>{specs[dst].name}": counters.copied_bytes[src][dst]
            for src, dst in itertools.permutations(range(len(specs)), 2)
            if counters.copied_bytes[src][dst]
        }
        disks = [index for index, spec in enumerate(specs) if spec.keyed]
        written = sum(counters.copied_bytes[src][disk] for disk in disks for src in range(len(specs)))
        if disks == [0]:
            written += counters.committed_bytes
        return {
            "stored_bytes": counters.committed_bytes,
            "copied_bytes": copied,
            "disk_write_bytes": round(written / self.settings.stored_ratio),
            "evicted_pages": sum(counters.evicted_pages),
            "dropped_pages": sum(counters.dropped_pages),
            "unsaved_dropped_pages": counters.unsaved_dropped_pages,
        }

    def _load(self) -> dict[str, object]:
        """How busy the modelled machine was; empty where nothing took time."""
        if self.instant:
            return {}
        span_us = max(self.agenda.now_us, 1)
        busy = {
            name: round(link.server.busy_us / link.spec.lanes / span_us, 4)
            for name, link in sorted(self.wires.links.items())
        }
        prefills = self.serving.prefills
        return {
            "span_s": span_us / 1e6,
            "gpu_busy": round(prefills.busy_us / self.settings.replicas / span_us, 4),
            "links_busy": busy,
            "waited_s": {
                name: link.server.waited_us / 1e6 for name, link in sorted(self.wires.links.items())
            },
            "most_waiting": self.serving.most_waiting,
        }
