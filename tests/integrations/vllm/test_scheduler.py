"""The scheduler side against a toy engine: the life of requests, and what is given back whatever happens."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import fake_agent
import numpy as np
import pytest
import toy_engine
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_engine import RUNNING, Access, ToyEngine, ToyRequest, truth

from hicache.integrations.vllm.requests import Identity, Shape
from hicache.integrations.vllm.scheduler import Scheduler
from hicache.integrations.vllm.settings import VllmSettings

BLOCK, PAGE = 4, 8
PAGE_BYTES = PAGE * toy_engine.SLOT_BYTES


class Rig:
    """A toy engine, its scheduler side and a fake agent."""

    def __init__(self, *, agent: Any = None, **fields: Any) -> None:
        shape = Shape(BLOCK, PAGE, PAGE_BYTES, extra_key_bytes=fields.pop("extra_key_bytes", 0))
        engine = {
            name: fields.pop(name) for name in ("blocks", "budget", "ahead", "load_steps") if name in fields
        }
        self.now_ns = 1
        self.agent = agent or fake_agent.FakeAgent(PAGE, PAGE_BYTES)
        made = VllmSettings(endpoint="unix:///nowhere", **fields)
        self.scheduler = Scheduler(made, shape, self.agent, lambda: self.now_ns)
        access = Access(
            read=lambda ticket, page: bytes(ticket.data[page]),
            rows=lambda run: self.agent.stagings[run.inode].bytes,
            valid=lambda ticket: ticket.still_valid(),
        )
        self.engine = ToyEngine(self.scheduler, access, **engine)
        self._names = itertools.count()

    def request(self, prompt: Any, **extra: Any) -> ToyRequest:
        return self.engine.add(ToyRequest(f"r{next(self._names)}", prompt, **extra))

    def run(self, *requests: ToyRequest, outputs: int = 0) -> None:
        self.engine.run(*requests, outputs=outputs, between=self.agent.work)
        self.settle()

    def settle(self) -> None:
        self.engine.drain()
        self.agent.work()
        self.engine.step()
        self.engine.drain()

    def check_store(self) -> None:
        """Every page that was committed is what these tokens must give."""
        for (_, prompt), data in self.agent.pages.items():
            tokens = np.frombuffer(prompt, "<i4").tolist()
            assert data == truth(tokens)[-PAGE_BYTES:]

    def check_returned(self) -> None:
        assert not self.agent.held and not self.agent.staged_pages


def prompt(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(1, 1000, count).tolist()


@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_second_request_loads_all_but_its_last_page(load_async: bool, ahead: int) -> None:
    rig = Rig(load_async=load_async, ahead=ahead)
    rig.run(rig.request(prompt(40)))
    rig.engine.cached.clear()
    rig.run(rig.request(prompt(40)))
    assert rig.engine.hit_tokens == 32, "never the last token: four of five pages"
    rig.check_store()
    rig.check_returned()
    assert len(rig.agent.pages) == 5


def test_a_page_may_be_partly_in_vllms_own_cache() -> None:
    rig = Rig(load_async=False)
    rig.run(rig.request(prompt(40)))
    tokens = prompt(40)
    keys = [rig.engine._key(tokens[: n * BLOCK]) for n in range(1, 10)]
    rig.engine.cached.clear()
    kept = rig.engine.free.pop()
    rig.engine.cached[keys[0]] = kept
    rig.engine.memory[kept] = np.frombuffer(truth(tokens[:BLOCK]), np.uint8)
    rig.run(second := rig.request(tokens))
    assert rig.engine.offers[-1] == (second.request_id, BLOCK, 28)
    rig.check_store()


def test_pages_of_the_output_are_stored_too_unless_only_the_prompt_is_wanted() -> None:
    for save, pages in (("all", 4), ("prompt", 2), ("off", 0)):
        rig = Rig(save=type(VllmSettings(endpoint="unix:x").save)(save))
        rig.run(rig.request(prompt(17)), outputs=17)
        assert len(rig.agent.pages) == pages
        rig.check_store()
        rig.check_returned()


def test_a_corrupt_page_is_computed_reported_and_stored_again() -> None:
    for load_async in (True, False):
        rig = Rig(load_async=load_async)
        rig.run(rig.request(prompt(40)))
        rig.engine.cached.clear()
        key = (Identity(), np.array(prompt(16), "<i4").tobytes())
        good = rig.agent.pages[key]
        rig.agent.pages[key] = bytes(PAGE_BYTES)
        rig.agent.rotten.add(key)
        rig.run(second := rig.request(prompt(40)))
        assert [pages for _, pages in rig.agent.reported] == [[1]]
        assert [offer for offer in rig.engine.offers if offer[0] == second.request_id and offer[2]] == [
            (second.request_id, 0, 32)
        ], "offered once"
        assert rig.agent.pages[key] == good
        rig.check_store()
        rig.check_returned()
        rig.engine.cached.clear()
        rig.run(third := rig.request(prompt(40)))
        assert (third.request_id, 0, 32) in rig.engine.offers


def test_what_was_computed_on_a_failed_load_is_never_committed() -> None:
    for ahead in (0, 1):
        rig = Rig(load_async=False, ahead=ahead, budget=12)
        rig.run(rig.request(prompt(24)))
        rig.engine.cached.clear()
        rig.engine.fail_next_load = True
        rig.run(rig.request(prompt(24) + prompt(40, seed=2)))
        assert len(rig.agent.pages) == 8
        rig.check_store()
        rig.check_returned()


def test_a_request_that_shares_a_bad_block_has_its_saves_voided() -> None:
    rig = Rig(load_async=False)
    first, other = rig.request(prompt(20)), rig.request(prompt(20, seed=2))
    rig.agent.work()
    rig.engine.step()
    jobs = rig.scheduler.saves._jobs
    assert not jobs
    step = rig.engine._schedule()
    assert not step.orders.saves
    third = rig.request(prompt(20, seed=3))
    rig.agent.work()
    step = rig.engine._schedule()
    (job,) = jobs.values()
    rig.scheduler.saves._void_spoilt(frozenset(), {third.blocks[0]})
    assert job.void
    rig.engine._finish_step(step)
    assert first.status == other.status == RUNNING
    assert third.request_id not in {task.job for task in rig.agent.tasks}


def test_preempted_requests_ask_again_and_use_what_they_stored_themselves() -> None:
    rig = Rig(budget=16)
    request = rig.request(prompt(60))
    for _ in range(4):
        rig.agent.work()
        rig.engine.step()
    assert request.status == RUNNING
    rig.engine.preempt(request.request_id)
    rig.engine.cached.clear()
    rig.run(request)
    assert rig.engine.hit_tokens >= 32
    rig.check_store()
    rig.check_returned()


def test_requests_that_never_run_leave_nothing_behind() -> None:
    rig = Rig()
    rig.run(rig.request(prompt(40)))
    asked = rig.request(prompt(40))
    rig.engine.abort(asked.request_id)
    rig.agent.work()
    answered = rig.request(prompt(40))
    rig.agent.work()
    rig.engine.abort(answered.request_id)
    rig.agent.work()
    rig.check_returned()


def test_an_abort_while_loading_keeps_the_lease_until_the_workers_are_done() -> None:
    rig = Rig(load_steps=3)
    rig.run(rig.request(prompt(40)))
    rig.engine.cached.clear()
    request = rig.request(prompt(40))
    rig.agent.work()
    rig.engine.step()
    assert request.status == toy_engine.LOADING
    rig.engine.abort(request.request_id)
    assert len(rig.agent.held) == 1
    rig.engine.step()
    assert not rig.agent.held and rig.engine.free


def test_without_a_sidecar_nothing_is_asked_and_nothing_waited_for() -> None:
    rig = Rig()
    rig.agent.die()
    request = rig.request(prompt(40))
    assert rig.scheduler.matched_tokens(request, 0) == (0, False)
    rig.run(request)
    assert not rig.agent.questions and not rig.agent.tasks
    rig.agent.come_back()
    rig.run(rig.request(prompt(40, seed=2)))
    assert len(rig.agent.pages) == 5
    rig.check_returned()


def test_an_answer_that_does_not_come_in_time_is_waited_for_no_longer() -> None:
    rig = Rig(lookup_timeout_ms=1000)
    rig.run(rig.request(prompt(40)))
    request = rig.request(prompt(40))
    assert rig.scheduler.matched_tokens(request, 0) == (None, False)
    rig.now_ns += 1_000_000_000
    assert rig.scheduler.matched_tokens(request, 0) == (0, False)
    assert rig.agent.suspected
    rig.agent.come_back()
    rig.agent.work()
    assert rig.scheduler.matched_tokens(request, 0) == (0, False), "for good"
    rig.run(request)
    rig.check_returned()


def test_a_lease_that_gets_lost_while_the_request_waits_is_asked_for_again() -> None:
    rig = Rig()
    rig.run(rig.request(prompt(40)))
    request = rig.request(prompt(40))
    rig.agent.work()
    assert rig.scheduler.matched_tokens(request, 0) == (32, True)
    (lease,) = rig.agent.held
    lease.lost = True
    assert rig.scheduler.matched_tokens(request, 0) == (None, False)
    rig.agent.work()
    assert rig.scheduler.matched_tokens(request, 0) == (32, True)
    rig.engine.cached.clear()
    rig.run(request)
    rig.check_returned()


def test_waiting_leases_are_bounded_and_the_rest_asks_in_turn() -> None:
    rig = Rig(max_waiting_leases=2, budget=8)
    rig.run(rig.request(prompt(24)))
    requests = [rig.request(prompt(24)) for _ in range(5)]
    rig.agent.work()
    assert len(rig.agent.held) == 2
    rig.run(*requests)
    rig.check_returned()


def test_what_the_sidecar_lost_is_stored_again_while_its_request_runs() -> None:
    rig = Rig(budget=16)
    request = rig.request(prompt(30))
    for _ in range(3):
        rig.agent.work()
        rig.engine.step()
    rig.agent.die()
    rig.engine.step()
    rig.agent.come_back()
    for _ in range(30):
        rig.now_ns += 1_000_000_000
        rig.agent.work()
        rig.engine.step()
    assert len(rig.agent.pages) >= 3
    rig.engine.abort(request.request_id)
    rig.settle()
    rig.check_store()
    rig.check_returned()


def test_pages_without_staging_memory_are_dropped_and_counted() -> None:
    rig = Rig(agent=fake_agent.FakeAgent(PAGE, PAGE_BYTES, staging_pages=2))
    rig.run(rig.request(prompt(60)))
    assert rig.scheduler.tally.take()["dropped_pages"] > 0
    rig.check_store()
    rig.check_returned()


def test_a_full_sidecar_is_left_alone_for_a_while() -> None:
    rig = Rig(budget=16)
    rig.agent.full = True
    request = rig.request(prompt(60))
    rig.run(request, outputs=3)
    numbers = rig.scheduler.tally.take()
    assert numbers["refused_jobs"] == numbers["save_jobs"] <= 2
    rig.check_returned()


def test_reset_drops_everything_and_old_blocks_are_not_stored() -> None:
    rig = Rig(budget=16)
    rig.run(rig.request(prompt(40)))
    running = rig.request(prompt(60, seed=5))
    rig.agent.work()
    rig.engine.step()
    assert rig.scheduler.reset()
    assert rig.agent.cleared == 1
    rig.run(running)
    assert not rig.agent.pages
    rig.run(rig.request(prompt(40)))
    assert len(rig.agent.pages) == 5
    rig.check_returned()


def test_a_reset_without_a_sidecar_succeeds() -> None:
    """vLLM's pause_generation and sleep raise where the connector's reset does not succeed."""
    rig = Rig()
    rig.run(rig.request(prompt(40)))
    rig.agent.die()
    assert rig.scheduler.reset()
    assert rig.agent.cleared == 1, "its namespaces were left all the same"


def test_requests_that_must_not_read_or_write_do_not() -> None:
    rig = Rig()
    rig.run(rig.request(prompt(40)))
    rig.engine.cached.clear()
    for extra in (
        {"skip_reading_prefix_cache": True},
        {"kv_transfer_params": {"hicache": "save"}},
        {"kv_transfer_params": {"hicache": "off"}},
        {"prompt_embeds": object()},
        {"resumable": True},
    ):
        rig.run(rig.request(prompt(40), **extra))
        rig.engine.cached.clear()
        assert not rig.engine.hit_tokens, extra
    for extra in ({"kv_transfer_params": {"hicache": "load"}}, {"resumable": True}, {"prompt_embeds": 1}):
        rig.run(rig.request(prompt(40, seed=9), **extra))
        assert len(rig.agent.pages) == 5, extra


def test_adapters_and_salts_never_meet() -> None:
    rig = Rig()
    lora = SimpleNamespace(lora_name="a", lora_path="/a", lora_int_id=1)
    for extra in ({}, {"cache_salt": "s"}, {"lora_request": lora}):
        rig.engine.cached.clear()
        rig.run(rig.request(prompt(40), **extra))
        assert not rig.engine.hit_tokens
    rig.check_returned()


def test_what_an_image_is_decides_about_its_page_and_all_after_it() -> None:
    def image(identifier: str) -> Any:
        return SimpleNamespace(
            identifier=identifier, mm_position=SimpleNamespace(offset=12, length=6), mm_hash=None
        )

    rig = Rig(extra_key_bytes=16)
    one = rig.request(prompt(40), mm_features=[image("cat")])
    two = rig.request(prompt(40), mm_features=[image("dog")])
    text = rig.request(prompt(40))
    first, second, third = (rig.scheduler._states[each.request_id].keys(5) for each in (one, two, text))
    assert first is not None and second is not None
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False, True, True]
    assert third == [b""] * 5
    plain = Rig()
    plain.run(plain.request(prompt(40), mm_features=[image("cat")]))
    assert not plain.agent.pages, "a model that is not multimodal has no room for it in its keys"


def test_a_step_with_nothing_to_compute_waits_but_not_for_long() -> None:
    rig = Rig()
    rig.request(prompt(40))
    waited: list[float] = []
    rig.agent.news.wait = lambda seconds: waited.append(seconds)  # type: ignore[method-assign, assignment]
    rig.engine.step()
    assert waited == [0.001]
    rig.agent.work()
    rig.engine.step()
    assert len(waited) == 1, "never where there is something to compute"


def test_stored_blocks_are_told_once_they_are_acknowledged() -> None:
    rig = Rig()
    rig.scheduler.saves.events = True
    hashes = [bytes([n]) * 32 for n in range(10)]
    rig.run(rig.request(prompt(40), block_hashes=hashes))
    told = rig.scheduler.take_stored()
    assert [each for stored in told for each in stored.hashes] == hashes
    assert told[0].parent is None and list(told[0].token_ids) == prompt(40)
    assert not rig.scheduler.take_stored()


class Life(RuleBasedStateMachine):
    """Everything that can happen to requests, in any order."""

    @initialize(load_async=st.booleans(), ahead=st.integers(0, 1), staging=st.sampled_from([2, 6, 1000]))
    def begin(self, load_async: bool, ahead: int, staging: int) -> None:
        agent = fake_agent.FakeAgent(PAGE, PAGE_BYTES, staging_pages=staging)
        self.rig = Rig(
            agent=agent,
            load_async=load_async,
            ahead=ahead,
            blocks=40,
            budget=24,
            load_steps=1,
            max_waiting_leases=3,
        )
        self.live: list[ToyRequest] = []

    @rule(seed=st.integers(0, 3), count=st.integers(1, 50), tail=st.integers(0, 12))
    def arrive(self, seed: int, count: int, tail: int) -> None:
        if len(self.live) < 6:
            tokens = prompt(50, seed)[:count] + prompt(12, seed + count)[:tail]
            self.live.append(self.rig.request(tokens))

    @rule(questions=st.integers(0, 3), tasks=st.integers(0, 3))
    def work(self, questions: int, tasks: int) -> None:
        self.rig.agent.work(questions, tasks)

    @rule()
    def step(self) -> None:
        self.rig.now_ns += 20_000_000
        self.rig.engine.step()
        self.live = [each for each in self.live if each.request_id in self.rig.engine.requests]

    @precondition(lambda self: any(each.status == RUNNING for each in self.live))
    @rule(data=st.data())
    def preempt(self, data: Any) -> None:
        running = [each for each in self.live if each.status == RUNNING]
        self.rig.engine.preempt(data.draw(st.sampled_from(running)).request_id)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        self.rig.engine.abort(request.request_id)

    @rule()
    def fail_a_load(self) -> None:
        self.rig.engine.fail_next_load = True

    @rule()
    def forget_local(self) -> None:
        engine = self.rig.engine
        engine.free += engine.cached.values()
        engine.cached.clear()

    @precondition(lambda self: self.rig.agent.pages)
    @rule(data=st.data(), rot=st.booleans())
    def lose_a_page(self, data: Any, rot: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.rig.agent.pages, key=repr)))
        if rot:
            self.rig.agent.pages[key] = bytes(PAGE_BYTES)
            self.rig.agent.rotten.add(key)
        else:
            del self.rig.agent.pages[key]
            self.rig.agent.rotten.discard(key)

    @rule(back=st.booleans())
    def sidecar(self, back: bool) -> None:
        if back:
            self.rig.agent.come_back()
        else:
            self.rig.agent.die()

    @rule(full=st.booleans())
    def fill(self, full: bool) -> None:
        self.rig.agent.full = full

    @invariant()
    def committed_pages_are_right(self) -> None:
        for (identity, tokens), data in self.rig.agent.pages.items():
            if (identity, tokens) not in self.rig.agent.rotten:
                assert data == truth(np.frombuffer(tokens, "<i4").tolist())[-PAGE_BYTES:]

    @invariant()
    def offers_leave_the_last_token(self) -> None:
        for name, local, external in self.rig.engine.offers:
            request = self.rig.engine.requests.get(name)
            if request is not None and external:
                assert (local + external) % PAGE == 0
                assert (local + external) // PAGE <= (request.num_tokens - 1) // PAGE

    @invariant()
    def leases_are_bounded(self) -> None:
        loads = len(self.rig.scheduler._loads)
        assert len(self.rig.agent.held) <= 3 + loads

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        for request in self.live:
            if request.request_id in self.rig.engine.requests:
                self.rig.engine.abort(request.request_id)
        for _ in range(4):
            self.rig.settle()
        self.rig.check_returned()
        assert not self.rig.scheduler.owed and not self.rig.scheduler._states


Life.TestCase.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = Life.TestCase


def test_a_lease_that_is_lost_between_the_offer_and_the_blocks_does_not_stop_the_engine() -> None:
    """vLLM has no way to take an offer back: the ticket is made before it is told, the load then fails as any."""
    rig = Rig()
    rig.run(rig.request(prompt(40)))
    rig.engine.cached.clear()
    request = rig.request(prompt(40))
    rig.agent.work()
    more, _ = rig.scheduler.matched_tokens(request, 0)
    assert more == 32
    rig.agent.die()  # its leases refuse to give tickets from now on
    rig.scheduler.allocated(request, range(8), more)
    assert len(rig.scheduler._load_orders) == 1


def test_a_lease_that_is_lost_while_it_is_looked_at_is_no_offer() -> None:
    rig = Rig()
    rig.run(rig.request(prompt(40)))
    rig.engine.cached.clear()
    request = rig.request(prompt(40))
    rig.agent.work()
    (lease,) = rig.agent.held
    lease.still_valid = lambda: True  # the session ends right behind this question
    lease.lost = True
    assert rig.scheduler.matched_tokens(request, 0) == (0, False)
    rig.check_returned()
