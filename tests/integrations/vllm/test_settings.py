"""What a user may set, and what workers report."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from hicache.errors import ConfigError
from hicache.integrations.vllm import settings
from hicache.integrations.vllm.messages import StepOrders, StepReport, WorkerCounts
from hicache.integrations.vllm.settings import AckAt, Save, VllmSettings
from hicache.integrations.vllm.stats import Tally, added, summary

GOOD = {"endpoint": "unix:///run/hicache.sock"}


def test_settings_have_the_types_that_their_fields_say() -> None:
    made = settings.parse(
        {**GOOD, "save": "prompt", "ack": "durable", "load_async": False, "page_tokens": 64}
    )
    assert made == VllmSettings(
        GOOD["endpoint"], save=Save.PROMPT, ack=AckAt.DURABLE, load_async=False, page_tokens=64
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "endpoint is missing"),
        ({"endpoint": "localhost:1"}, "unix socket of this host"),
        ({**GOOD, "lookup_timeout": 1}, "did you mean 'lookup_timeout_ms'"),
        ({**GOOD, "load_async": "yes"}, "load_async must be true or false"),
        ({**GOOD, "staging_bytes": 0}, "staging_bytes must be positive"),
        ({**GOOD, "staging_bytes": True}, "staging_bytes must be a whole number"),
        ({**GOOD, "save": "some"}, "save is one of all, prompt, off"),
        ({**GOOD, "flush_ms": -1}, "flush_ms must not be negative"),
        ({**GOOD, "load_wait_ms": 5000}, "exceeds lookup_timeout_ms"),
        ({**GOOD, "lease_ttl_ms": 1000, "load_timeout_ms": 900}, "half of lease_ttl_ms"),
    ],
)
def test_a_wrong_setting_is_named(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings.parse(extra)


def test_a_page_is_the_least_multiple_of_a_block_from_32_tokens_on() -> None:
    made = VllmSettings("unix:x")
    assert [settings.page_tokens(made, block) for block in (8, 16, 32, 48, 128)] == [32, 32, 32, 48, 128]
    assert settings.page_tokens(VllmSettings("unix:x", page_tokens=128), 32) == 128
    with pytest.raises(ConfigError, match="multiple of vLLM's block size 32"):
        settings.page_tokens(VllmSettings("unix:x", page_tokens=48), 32)


def test_reports_of_all_ranks_add_up() -> None:
    one = StepReport(saved={1: 1}, loaded={"a": 1}, corrupt=(("a", 3),), stats=WorkerCounts(saved_pages=2))
    other = StepReport(saved={1: 1, 2: 1}, void=frozenset({2}), failed=frozenset({"a"}), loaded={"a": 1})
    both = pickle.loads(pickle.dumps(one)).merged(other)
    assert both.saved == {1: 2, 2: 1} and both.loaded == {"a": 2}
    assert both.void == {2} and both.failed == {"a"} and both.corrupt == (("a", 3),)
    assert both.stats.saved_pages == 2
    assert both and not StepReport() and not StepOrders(page_blocks=1) and StepOrders(1, flush=(1,))


def test_counters_add_up_and_gauges_do_not() -> None:
    tally = Tally()
    tally.add("scheduler_steps")
    assert not tally.eventful
    tally.add_workers(WorkerCounts(loaded_bytes=1 << 20, load_ns=10))
    assert tally.eventful
    taken = tally.take()
    assert not tally.take()
    total = added({**taken, "online": 1}, {"loaded_bytes": 1, "online": 0})
    assert total["loaded_bytes"] == (1 << 20) + 1 and total["online"] == 0
    assert summary(total)["loaded MiB"] == 1.0
