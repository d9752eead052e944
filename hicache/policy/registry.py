"""Policies by name, their parameters in the name, and a user's own."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping

from hicache.errors import ConfigError
from hicache.policy.adaptive import AdaptivePolicy
from hicache.policy.arc import ArcPolicy
from hicache.policy.base import Policy
from hicache.policy.fifo import FifoPolicy
from hicache.policy.frequency import FrequencyPolicy
from hicache.policy.gdsf import GdsfPolicy, PgdsfPolicy
from hicache.policy.lfu import LfuPolicy
from hicache.policy.lru import LruPolicy
from hicache.policy.marconi import MarconiPolicy
from hicache.policy.mq import MqPolicy
from hicache.policy.priority import PriorityPolicy
from hicache.policy.random_order import RandomPolicy
from hicache.policy.s3fifo import S3FifoPolicy
from hicache.policy.sieve import SievePolicy
from hicache.policy.slru import SlruPolicy
from hicache.policy.tail_lru import TailLruPolicy
from hicache.policy.two_queue import TwoQueuePolicy
from hicache.policy.workload import WorkloadPolicy
from hicache.policy.wtinylfu import WTinyLfuPolicy


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One policy of the zoo."""

    make: Callable[..., Policy]
    source: str
    state: str  # what it keeps for each run

    def parameters(self) -> dict[str, object]:
        """Names and defaults."""
        return _parameters(self.make)


def _parameters(make: Callable[..., Policy]) -> dict[str, object]:
    return {name: each.default for name, each in inspect.signature(make).parameters.items()}


ZOO: Mapping[str, Entry] = {
    "adaptive": Entry(
        AdaptivePolicy, "ours: hazard by kind and age, Gittins index", "uses, last use, size, kind"
    ),
    "arc": Entry(ArcPolicy, "Megiddo & Modha, FAST'03", "segment, last use"),
    "fifo": Entry(FifoPolicy, "Belady, IBM Systems Journal 1966", "arrival"),
    "gdsf": Entry(GdsfPolicy, "Cherkasova, HPL-98-69R1", "uses, cost, last use"),
    "lfu": Entry(LfuPolicy, "Arlitt et al., PER 2000 (LFU-DA)", "uses, last use"),
    "lru": Entry(LruPolicy, "Mattson et al., IBM Systems Journal 1970", "last use"),
    "marconi": Entry(MarconiPolicy, "Pan et al., MLSys'25", "last use, depth"),
    "mq": Entry(MqPolicy, "Zhou, Philbin & Li, ATC'01", "uses, last use, expiry"),
    "pgdsf": Entry(PgdsfPolicy, "Jin et al., RAGCache 2024", "uses, cost by depth, last use"),
    "priority": Entry(PriorityPolicy, "retention priorities of serving engines", "class, last use"),
    "random": Entry(RandomPolicy, "baseline", "a draw"),
    "recency-frequency": Entry(FrequencyPolicy, "after Lee et al., LRFU, IEEE ToC 2001", "uses, last use"),
    "s3fifo": Entry(S3FifoPolicy, "Yang et al., SOSP'23", "segment, arrival, 2 bits of uses"),
    "sieve": Entry(SievePolicy, "Zhang et al., NSDI'24", "arrival, 1 bit"),
    "slru": Entry(SlruPolicy, "Karedla, Love & Wherry, IEEE Computer 1994", "segment, last use"),
    "tail-lru": Entry(TailLruPolicy, "Zhang et al., T-LRU 2025", "segment, last use"),
    "2q": Entry(TwoQueuePolicy, "Johnson & Shasha, VLDB'94", "segment, arrival or last use"),
    "workload": Entry(WorkloadPolicy, "Wang et al., KVCache in the wild, ATC'25", "category, last use"),
    "wtinylfu": Entry(WTinyLfuPolicy, "Einziger, Friedman & Manes, ToS 2017", "segment, uses, last use"),
}

#: Every eviction policy by the name it has in settings.
POLICIES: dict[str, Callable[..., Policy]] = {name: entry.make for name, entry in ZOO.items()}


def make_policy(name: str) -> Policy:
    """A new, empty policy: ``name``, ``name:key=value,...`` or ``py:module:Class`` for one's own.

    Raises ConfigError for a name, a parameter or a value that does not exist.
    """
    if name.startswith("py:"):
        return _own(name)
    kind, _, settings = name.partition(":")
    if kind not in POLICIES:
        raise ConfigError(f"unknown eviction policy {kind!r}", hint=f"one of {', '.join(sorted(POLICIES))}")
    return POLICIES[kind](**_arguments(kind, settings))


def _arguments(kind: str, settings: str) -> dict[str, object]:
    defaults = _parameters(POLICIES[kind]) if settings else {}
    arguments: dict[str, object] = {}
    for setting in settings.split(",") if settings else ():
        key, equals, text = setting.partition("=")
        if not equals or key not in defaults:
            known = ", ".join(f"{each}={value}" for each, value in defaults.items()) or "none"
            raise ConfigError(f"policy {kind}: no parameter {setting!r}", hint=f"its parameters: {known}")
        try:
            value = type(defaults[key])(text)  # type: ignore[call-arg]  # int, float or str
        except ValueError as error:
            raise ConfigError(f"policy {kind}: {key}={text!r} is not a number") from error
        if not isinstance(value, str) and not 0 <= value < 1 << 40:  # type: ignore[operator]  # a number
            raise ConfigError(f"policy {kind}: {key}={text} is out of range")
        arguments[key] = value
    return arguments


def _own(name: str) -> Policy:
    _, _, rest = name.partition(":")
    module, _, attribute = rest.partition(":")
    if not module or not attribute:
        raise ConfigError(f"policy {name!r} does not name a class", hint="write py:module:Class")
    try:
        made: Policy = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"policy {name!r} cannot be loaded: {error}", hint="is its folder in PYTHONPATH?"
        ) from error
    return made
