"""The sidecar is absent, hangs, is killed in the middle of things, comes back: every request is right and in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from engines_kit import Engine, Host, Round, SidecarBox, hicache_connector, wait_until
from engines_models import Models, prompt

TOKENS, NEW_TOKENS = 1000, 12
PROMPTS = [prompt(seed, TOKENS) for seed in range(8)]
HIT = len(PROMPTS) * 992
#: What requests may take longer while the sidecar does not answer, and what a loaded test machine needs besides.
LOOKUP_TIMEOUT_MS, LOAD_TIMEOUT_MS, SLACK_S = 500, 1500, 3.0
TIMES = {
    "lookup_timeout_ms": LOOKUP_TIMEOUT_MS,
    "load_wait_ms": 300,
    "load_timeout_ms": LOAD_TIMEOUT_MS,
    "rpc_timeout_ms": 1000,
    "reconnect_ms": 100,
}


def in_time(got: Round, usual_s: float) -> None:
    assert got.seconds < usual_s + (LOOKUP_TIMEOUT_MS + LOAD_TIMEOUT_MS) / 1000 + SLACK_S


def connected(box: SidecarBox, engines: int = 1) -> None:
    """So many engines hold a session (our own is one more), and not ones of ours that are just ending."""
    looks = 0
    with box.client() as client:

        def there() -> bool:
            nonlocal looks
            looks = looks + 1 if client.admin.stats().sessions > engines else 0
            return looks >= 5

        wait_until("the engine has found the sidecar", there, 15)


@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_killed_in_the_middle_of_a_load(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox], load_async: bool
) -> None:
    """At several moments after eight requests came: before, while and after pages are asked for and copied."""
    model, box = models("llama"), sidecar(disk="256MiB")
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    connector = hicache_connector(box.target, load_async=load_async, ack="durable", **TIMES)
    with vllm_host.running(model, connector=connector) as engine:
        usual = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        assert usual.tokens == truth
    box.wait_idle()
    external = []
    with vllm_host.running(model, connector=connector) as engine:
        for moment_s in (0.0, 0.003, 0.01, 0.03, 0.1):
            connected(box)
            kill = {"what": "signal", "pid": box.pid, "signal": "SIGKILL", "seconds": moment_s}
            got = engine.run(PROMPTS, new_tokens=NEW_TOKENS, at=[kill])
            assert got.tokens == truth
            in_time(
                got, 2 * usual.seconds
            )  # what was not loaded is computed, in other batches, after the wait
            external.append(got.external)
            assert engine.reset()
            box.restart()
        connected(box)
        finds_all_again(engine, box, truth)
    print(f"external tokens by the moment of the kill: {external} of {HIT}")
    box.wait_idle()


def test_killed_in_the_middle_of_a_save(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """While pages are copied, reserved and committed. What survives is right; the rest is stored next time."""
    model, box = models("llama"), sidecar(disk="256MiB")
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    with vllm_host.running(model) as engine:
        usual = engine.run(PROMPTS, new_tokens=NEW_TOKENS, at=[])
    connector = hicache_connector(box.target, ack="durable", **TIMES)
    with vllm_host.running(model, connector=connector, max_num_batched_tokens=512) as engine:
        for step in (1, 4, 9):
            connected(box)
            kill = {"what": "signal", "pid": box.pid, "signal": "SIGKILL", "step": step}
            got = engine.run(PROMPTS, new_tokens=NEW_TOKENS, at=[kill])
            assert got.tokens == truth
            in_time(got, 2 * usual.seconds)
            assert engine.reset()
            box.restart()
        connected(box)
        engine.run(PROMPTS, new_tokens=NEW_TOKENS)
    box.wait_idle()
    with vllm_host.running(model, connector=connector) as engine:
        finds_all_again(engine, box, truth)


def finds_all_again(engine: Engine, box: SidecarBox, truth: list[list[int]]) -> None:
    """By itself, after a few rounds at most: what has to come up from disk may not come in time at first."""
    external = []
    while HIT not in external:
        assert len(external) < 6, f"external tokens round by round: {external} of {HIT}"
        assert engine.reset()
        got = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        assert got.tokens == truth
        external.append(got.external)
        box.wait_idle()


def test_a_sidecar_that_hangs_costs_one_deadline(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """SIGSTOP: it accepts and says nothing. Requests wait once, then not at all, until it answers again."""
    model, box = models("llama"), sidecar()
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    with vllm_host.running(model, connector=hicache_connector(box.target, **TIMES)) as engine:
        usual = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        box.wait_idle()
        assert engine.reset()
        os.kill(box.pid, signal.SIGSTOP)
        try:
            first = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
            assert engine.reset()
            second = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        finally:
            os.kill(box.pid, signal.SIGCONT)
        in_time(first, usual.seconds)
        in_time(second, usual.seconds)
        wait_until("the engine asks again", lambda: asks_again(engine, box))
        assert engine.reset()
        back = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
    assert usual.tokens == first.tokens == second.tokens == back.tokens == truth
    assert (first.external, second.external, back.external) == (0, 0, HIT)
    box.wait_idle()


def asks_again(engine: Engine, box: SidecarBox) -> bool:
    """Whether a request is offered what the sidecar has."""
    engine.reset()
    return bool(engine.run(PROMPTS[:1], new_tokens=1).external)


def test_absent_at_the_start_and_there_later(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    model, box = models("llama"), sidecar(start=False)
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    with vllm_host.running(model) as engine:
        usual = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
    with vllm_host.running(model, connector=hicache_connector(box.target, **TIMES)) as engine:
        alone = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        in_time(alone, usual.seconds)
        box.process.start()
        connected(box)
        own = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        assert own.local == HIT
        wait_until("what vLLM holds itself is stored", lambda: stored(engine, box) >= 8 * 31)
        assert engine.reset()
        found = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
    assert alone.tokens == own.tokens == found.tokens == truth
    assert (alone.external, found.external) == (0, HIT)
    box.wait_idle()


def stored(engine: Engine, box: SidecarBox) -> int:
    engine.run([prompt(99, 8)], new_tokens=1)  # steps, for what is told in them
    return box.stats().tree_pages


@pytest.mark.parametrize("disk", ["", "256MiB"], ids=["memory", "disk"])
def test_restarted_in_the_middle(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox], disk: str
) -> None:
    """The engine goes on; an empty sidecar is filled again out of vLLM's own cache, for others to find."""
    model, box = models("llama"), sidecar(disk=disk)
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    connector = hicache_connector(box.target, ack="durable" if disk else "visible", **TIMES)
    with vllm_host.running(model, connector=connector) as engine:
        engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        box.wait_idle()
        box.restart()
        connected(box)
        own = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
        assert (own.tokens, own.local) == (truth, HIT)
        wait_until("stored again", lambda: stored(engine, box) >= 8 * 31)
        box.wait_idle()
        with vllm_host.running(model, connector=connector) as other:
            got = other.run(PROMPTS, new_tokens=NEW_TOKENS)
        assert (got.tokens, got.external) == (truth, HIT)
    box.wait_idle()


def test_kills_all_the_time(vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]) -> None:
    """A sidecar that dies and comes back every second or so, under two engines."""
    model, box = models("llama"), sidecar(disk="256MiB")
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    connector = hicache_connector(box.target, ack="durable", **TIMES)
    over = threading.Event()

    def torment() -> None:
        while not over.wait(0.7):
            box.process.kill()
            time.sleep(0.2)
            box.process.start()

    with (
        vllm_host.running(model, connector=connector) as one,
        vllm_host.running(model, connector=connector) as two,
    ):
        killer = threading.Thread(target=torment)
        killer.start()
        try:
            for _ in range(6):
                for engine in (one, two):
                    engine.begin(PROMPTS, new_tokens=NEW_TOKENS)
                for engine in (one, two):
                    assert engine.finish().tokens == truth
                    assert engine.reset()
        finally:
            over.set()
            killer.join(60)
        connected(box, 2)
        for engine in (one, two):
            finds_all_again(engine, box, truth)
    box.wait_idle()
