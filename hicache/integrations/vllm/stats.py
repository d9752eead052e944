"""Counters of the connector, as vLLM carries them from where they are counted to where they are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hicache.integrations.vllm.messages import WorkerCounts

Numbers = dict[str, int]

#: What is told, and what it means: Prometheus names are ``vllm:hicache_<name>``.
COUNTERS: Mapping[str, str] = {
    "lookups": "Look-ups sent to the sidecar.",
    "lookup_timeouts": "Requests computed because the sidecar did not answer in time.",
    "lookups_offline": "Requests computed because the sidecar was absent.",
    "lookup_ns": "Nanoseconds from a question to its answer, of answers that were taken.",
    "hit_tokens": "Tokens offered to vLLM out of the sidecar, of offers that were taken.",
    "failed_requests": "Requests whose load failed and that were computed instead.",
    "save_jobs": "Jobs given to the workers.",
    "void_jobs": "Jobs that came to nothing before their commit.",
    "stored_pages": "Pages stored by this engine.",
    "present_pages": "Pages of this engine that others had stored before.",
    "behind_jobs": "Jobs dropped because a page before them was gone.",
    "refused_jobs": "Jobs dropped because the sidecar had no room or did not want them.",
    "lost_jobs": "Jobs dropped because the sidecar was lost.",
    "dropped_pages": "Complete pages for which there was no staging memory while their request lived.",
    "scheduler_ns": "Nanoseconds spent in the connector's scheduler hooks.",
    "scheduler_steps": "Engine steps.",
    "idle_ns": "Nanoseconds that steps with nothing to compute have waited.",
    **{field.name: f"Workers: {field.name.replace('_', ' ')}." for field in dataclasses.fields(WorkerCounts)},
}


#: What is so this moment.
GAUGES: Mapping[str, str] = {
    "online": "Whether the sidecar is asked: 0 while it is absent or does not answer.",
    "leases": "Leases that this engine holds.",
    "staged_bytes": "Staging memory in use.",
}
#: Counters that move in every step; they alone are not worth a report.
ALWAYS = frozenset({"scheduler_ns", "scheduler_steps", "idle_ns"})


class Tally:
    """Counters since they were last taken."""

    def __init__(self) -> None:
        self._numbers: Numbers = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Count."""
        assert name in COUNTERS, f"no counter {name}"
        self._numbers[name] = self._numbers.get(name, 0) + amount

    def add_workers(self, counts: WorkerCounts) -> None:
        """Count what workers have told."""
        for field in dataclasses.fields(counts):
            amount = getattr(counts, field.name)
            if amount:
                self.add(field.name, amount)

    @property
    def eventful(self) -> bool:
        """Whether anything has moved that does not always move."""
        return not self._numbers.keys() <= ALWAYS

    def take(self) -> Numbers:
        """All counters, which start again."""
        taken, self._numbers = self._numbers, {}
        return taken


def added(one: Mapping[str, int], other: Mapping[str, int]) -> Numbers:
    """Both as one; of gauges the later."""
    total = dict(one)
    for name, amount in other.items():
        total[name] = amount if name in GAUGES else total.get(name, 0) + amount
    return total


def summary(numbers: Mapping[str, int]) -> dict[str, int | float]:
    """What vLLM's log line says of an interval."""
    load_s, save_s = numbers.get("load_ns", 0) / 1e9, numbers.get("save_ns", 0) / 1e9
    steps = numbers.get("scheduler_steps", 0)
    return {
        "hicache hit tokens": numbers.get("hit_tokens", 0),
        "loaded MiB": round(numbers.get("loaded_bytes", 0) / 2**20, 1),
        "load s": round(load_s, 3),
        "saved MiB": round(numbers.get("saved_bytes", 0) / 2**20, 1),
        "save s": round(save_s, 3),
        "stored pages": numbers.get("stored_pages", 0),
        "failed loads": numbers.get("failed_requests", 0),
        "dropped pages": numbers.get("dropped_pages", 0),
        "scheduler us per step": round(numbers.get("scheduler_ns", 0) / 1e3 / steps, 1) if steps else 0.0,
    }
