"""Replay without time: each request is looked up, leased, stored and released before the next one comes.

The events are those of a client of the runtime, in its order: Fetch; what must be brought up is waited for; Reserve and
Commit of what is missing; ReleaseLeases. TTFT is what the request would see on an idle machine.
"""

from __future__ import annotations

from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.errors import NotFoundError
from hicache.sim.options import Settings, lease_tier
from hicache.sim.packed import SYMBOL_BYTES, Row
from hicache.sim.shell import Shell
from hicache.sim.tally import Tally
from hicache.sim.wires import Wires
from hicache.types import NO_USE, TierKind, Use

SESSION, NAMESPACE = 1, 1


class Prices:
    """What moving a page and computing tokens takes, worked out once."""

    def __init__(self, settings: Settings, wires: Wires, shell: Shell, block_tokens: int) -> None:
        model, hardware = settings.model, settings.hardware
        rate = model.gpus * hardware.flops * hardware.mfu / 1e6
        self.block_tokens = block_tokens
        self._token_us = 2.0 * model.active_params / rate
        self._look_us = model.layers * model.heads * (model.qk_size + model.v_size) / rate
        page_bytes = settings.page_bytes(block_tokens)
        leased = lease_tier(shell.specs)
        self.page_us = [wires.estimate_us(tier, -1, page_bytes) for tier in range(len(shell.specs))]
        if shell.specs[leased].kind is TierKind.DEVICE:
            self.page_us[leased] = 0  # it is where the model works

    def prefill_us(self, first: int, end: int) -> int:
        """See ``models``."""
        looks = end * (end + 1) - first * (first + 1)
        return int(self._token_us * (end - first) + self._look_us * looks)

    def known_tokens(self, pages: int, input_tokens: int) -> int:
        """Of a prompt with so many pages at hand; its last token is always computed."""
        return max(min(pages * self.block_tokens, input_tokens - 1), 0)


class Instant:
    """Drives the requests of one trace through a shell."""

    def __init__(self, shell: Shell, prices: Prices, tally: Tally, classes: list[str]) -> None:
        self._shell = shell
        self._prices = prices
        self._tally = tally
        self._classes = classes
        self._lease_tier = lease_tier(shell.specs)

    def request(self, row: Row) -> None:
        """One request, from its look-up to the release of its lease."""
        at_ms, input_tokens, _, turn, cls, prompt = row
        shell, tally = self._shell, self._tally
        if at_ms > shell.now_ms:
            shell.now_ms = at_ms
        use = Use(self._classes[cls], turn) if cls or turn else NO_USE
        number = tally.number()
        pages = len(prompt) // SYMBOL_BYTES
        if not pages:
            return
        result = self._fetch(prompt, use)
        granted = result.granted_pages
        if result.matched_pages < pages:
            self._store(prompt, use)
        if result.lease:
            shell.handle(ev.ReleaseLeases(SESSION, (result.lease,)))
        if number < 0:
            return
        tally.late_pages += result.matched_pages - granted
        tally.add_tiers(result.tier_pages)
        prices = self._prices
        known = prices.known_tokens(granted, input_tokens)
        computed_us = prices.prefill_us(known, input_tokens)
        load_us = sum(map(int.__mul__, result.tier_pages, prices.page_us))
        tally.add(
            number,
            pages,
            granted,
            saved_us=prices.prefill_us(0, known),
            computed_us=computed_us,
            ttft_us=load_us + computed_us,
        )

    def _fetch(self, prompt: bytes, use: Use) -> act.FetchResult:
        shell = self._shell
        request = next(shell.requests)
        shell.handle(ev.Fetch(request, SESSION, NAMESPACE, prompt, use=use))
        result = shell.answers.pop(request)
        assert isinstance(result, act.FetchResult), result
        if not (result.lease and result.operation):
            return result
        try:
            return shell.engine.lease_view(SESSION, result.lease)  # all copies that can be made have been
        except NotFoundError:
            return act.FetchResult(0, result.matched_pages, 0, 0, (), 0, result.tier_pages)

    def _store(self, prompt: bytes, use: Use) -> None:
        shell = self._shell
        request = next(shell.requests)
        shell.handle(ev.Reserve(request, SESSION, NAMESPACE, prompt, use=use))
        room = shell.answers.pop(request)
        if not isinstance(room, act.ReserveResult):
            self._tally.refused_stores += 1
            return
        if not room.reservation:
            return
        pieces = ((room.present_pages, room.missing_pages),)
        request = next(shell.requests)
        shell.handle(ev.Commit(request, SESSION, room.reservation, pieces, None, last=True))
        shell.answers.pop(request)
