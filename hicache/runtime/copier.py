"""Carries out the engine's copies over the store seam.

    to addressable memory    GET into the destination's slots, then seal them
    from addressable memory  PUT from the source's slots, with their recorded checksums
    neither                  GET into bounce buffers, then PUT
    from a client            a worker reads into slots (or bounce buffers), checksums the copy; then seal (or PUT)
    from an engine's KV      a transfer packs them into slots (or bounce buffers) and checksums them there

Pages of an engine may have to wait for the layers that are still being computed. So where they go to slots, which the
engine has given them already, they hold nothing else meanwhile: no worker, no lane. Where they must go through bounce
buffers, their commit is not begun before all layers are there (``storing``).

A copy is worked on in chunks of bounded size; it is done when every page has its outcome. PUTs to one tier happen in
the order in which the engine asked for the copies, whatever order their pages became ready in: that keeps a durable
tier ancestor-closed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from hicache.device.transfers import HostPages, HostSlots
from hicache.engine.actions import Copy, CopyIn
from hicache.engine.events import CopyDone
from hicache.errors import HicacheError
from hicache.runtime.bounce import BouncePool, Lane, Slab, Turnstile
from hicache.runtime.ports import TierPort
from hicache.runtime.sources import Filled, PageSource, StartedSource, filler
from hicache.runtime.workers import Workers
from hicache.types import Completion, Op, Outcome

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Job:
    """One Copy or CopyIn under way: what has become of its pages so far."""

    def __init__(self, copy: int, pages: int, *, keyed: bool, done: Callable[[CopyDone], None]) -> None:
        assert pages > 0, "a copy of nothing"
        self.copy = copy
        self.outcomes = [Outcome.FAULT] * pages
        self.charges = [0] * pages if keyed else []
        self._left = pages
        self._done = done
        self._source_failed = False
        self._target_failed = False

    def settle(self, positions: Sequence[int], outcomes: Sequence[Outcome], *, source: bool) -> None:
        """These pages are done. ``source``: those that are not OK failed at the source."""
        for position, outcome in zip(positions, outcomes, strict=True):
            self.outcomes[position] = outcome
            if outcome is not Outcome.OK:
                self._source_failed = self._source_failed or source
                self._target_failed = self._target_failed or not source
        self._left -= len(positions)
        assert self._left >= 0, "a page of a copy was settled twice"
        if not self._left:
            self._finish()

    def settle_put(self, positions: Sequence[int], completion: Completion) -> None:
        """What a PUT came to: CORRUPT means that the source's bytes are not what their checksum says."""
        for at, position in enumerate(positions):
            if self.charges and at < len(completion.charges):
                self.charges[position] = completion.charges[at]
        bad = [at for at, outcome in enumerate(completion.outcomes) if outcome is Outcome.CORRUPT]
        rest = [at for at, outcome in enumerate(completion.outcomes) if outcome is not Outcome.CORRUPT]
        if bad:
            self.settle([positions[at] for at in bad], [Outcome.CORRUPT] * len(bad), source=True)
        if rest:
            self.settle(
                [positions[at] for at in rest], [completion.outcomes[at] for at in rest], source=False
            )

    def fail(self, positions: Sequence[int]) -> None:
        """The destination could not take these."""
        self.settle(positions, [Outcome.FAULT] * len(positions), source=False)

    def _finish(self) -> None:
        if not (self._source_failed or self._target_failed):
            self._done(CopyDone(self.copy, None, self.charges))
            return
        # Both failed: the source's pages are not given up for what the destination did; they are found again.
        only_source = self._source_failed and not self._target_failed
        self._done(CopyDone(self.copy, tuple(self.outcomes), self.charges, source_fault=only_source))


class Copier:
    """Starts copies in the order given; ``done`` gets each one's CopyDone, later, on the loop's thread.

    ``soon`` makes PUTs happen, in order: many may become ready at once.
    """

    def __init__(
        self,
        ports: Sequence[TierPort],
        workers: Workers,
        *,
        done: Callable[[CopyDone], None],
        chunk_bytes: int,
        bounce_bytes: int,
        lanes: int,
        now_ns: Callable[[], int],
        soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self._ports = ports
        self._workers = workers
        self._done = done
        self._now_ns = now_ns
        self._chunk_bytes = chunk_bytes
        self._bounce = BouncePool(max(1, bounce_bytes // chunk_bytes), chunk_bytes)
        self._lane = Lane(lanes)
        self._turns = [Turnstile(soon) for _ in ports]
        self.in_flight = 0

    @property
    def queued(self) -> int:
        """Chunks that wait for a worker or a buffer."""
        return self._lane.waiting + self._bounce.waiting

    def _job(self, copy: int, pages: int, target: TierPort, after: Callable[[], None] = lambda: None) -> Job:
        self.in_flight += 1

        def done(event: CopyDone) -> None:
            self.in_flight -= 1
            after()
            self._done(event)

        return Job(copy, pages, keyed=target.spec.keyed, done=done)

    # --- between tiers

    def copy(self, action: Copy) -> None:
        """Start a copy between two tiers."""
        source, target = self._ports[action.src_tier], self._ports[action.dst_tier]
        job = self._job(action.copy, len(action.src_slots or action.keys), target)
        if target.addressable is not None:
            self._get_into_slots(job, action, source, target)
        elif source.addressable is not None:
            self._put_from_slots(job, action, source, target)
        else:
            self._bounce_all(job, action, source, target)

    def _get_into_slots(self, job: Job, action: Copy, source: TierPort, target: TierPort) -> None:
        memory = target.addressable
        assert memory is not None, "no memory to copy into"
        everything = range(len(action.dst_slots))
        size_bytes = len(everything) * action.page_bytes
        try:
            views = memory.views(action.dst_slots)
        except HicacheError as error:
            _log.error("copy into tier %s: %s", target.spec.name, error)
            job.fail(everything)
            return

        def arrived(completion: Completion) -> None:
            good = [at for at, outcome in enumerate(completion.outcomes) if outcome is Outcome.OK]
            source.pace.end(size_bytes, len(good) * action.page_bytes, self._now_ns())
            memory.seal([action.dst_slots[at] for at in good], [completion.checksums[at] for at in good])
            target.bytes_in += len(good) * action.page_bytes
            job.settle(everything, completion.outcomes, source=True)

        keys = action.keys if source.spec.keyed else ()
        source.pace.begin(size_bytes, self._now_ns())
        source.submit(
            Op.GET, arrived, page_bytes=action.page_bytes, slots=action.src_slots, keys=keys, buffers=views
        )

    def _put_from_slots(self, job: Job, action: Copy, source: TierPort, target: TierPort) -> None:
        memory = source.addressable
        assert memory is not None, "no memory to copy from"
        everything = range(len(action.src_slots))

        def stored(completion: Completion) -> None:
            source.bytes_out += completion.outcomes.count(Outcome.OK) * action.page_bytes
            job.settle_put(everything, completion)

        def put() -> None:
            target.submit(
                Op.PUT,
                stored,
                page_bytes=action.page_bytes,
                slots=action.dst_slots,
                keys=action.keys if target.spec.keyed else (),
                buffers=memory.views(action.src_slots),
                checksums=memory.checksums(action.src_slots),
                records=action.records,
            )

        turns = self._turns[target.index]
        turns.ready(turns.ticket(), put)

    def _bounce_all(self, job: Job, action: Copy, source: TierPort, target: TierPort) -> None:
        for part in self._parts(len(job.outcomes), action.page_bytes):
            self._bounce_part(job, action, part, (source, target))

    def _bounce_part(self, job: Job, action: Copy, part: range, ends: tuple[TierPort, TierPort]) -> None:
        source, target = ends
        place = self._turns[target.index].ticket()

        def take(slab: Slab) -> None:
            buffers = slab.pages(len(part))

            def arrived(completion: Completion) -> None:
                filled = list(zip(completion.outcomes, completion.checksums, strict=True))
                self._put_filled(job, action, (part, filled, slab, place))

            source.submit(
                Op.GET,
                arrived,
                page_bytes=action.page_bytes,
                slots=_some(action.src_slots, part),
                keys=_some(action.keys, part) if source.spec.keyed else (),
                buffers=buffers,
            )

        self._bounce.take(len(part), action.page_bytes, take)

    # --- from clients

    def copy_in(self, action: CopyIn) -> None:
        """Start copying a client's pages in. ``action.source`` is a PageSource or a StartedSource."""
        source: PageSource | StartedSource = action.source  # type: ignore[assignment]  # opaque to the engine
        target = self._ports[action.tier]
        source.hold()
        job = self._job(action.copy, len(action.pages), target, source.release)
        if isinstance(source, StartedSource) and source.direct:
            self._pack_slots(job, action, source)
            return
        for part in self._parts(len(action.pages), action.page_bytes):
            if target.addressable is not None:
                self._lane.enter(lambda part=part: self._fill_slots(job, action, part))  # type: ignore[misc]
            else:
                self._fill_bounce(job, action, part)

    def _fill_slots(self, job: Job, action: CopyIn, part: range) -> None:
        target = self._ports[action.tier]
        memory = target.addressable
        assert memory is not None, "no memory to copy into"
        slots = _some(action.slots, part)
        try:
            views = memory.views(slots)
        except HicacheError as error:
            _log.error("copy into tier %s: %s", target.spec.name, error)
            job.fail(part)
            self._lane.leave()
            return

        def filled(pages: Filled) -> None:
            self._seal(job, action, part, pages)
            self._lane.leave()

        self._fill(action, part, views, filled)

    def _pack_slots(self, job: Job, action: CopyIn, source: StartedSource) -> None:
        """All pages at once, however long their layers take: they hold their slots, and nothing else."""
        target, everything = self._ports[action.tier], range(len(action.pages))
        assert target.mappable is not None, "no memory to copy into"
        try:
            addresses, keep = target.mappable.addresses(action.slots, action.page_bytes)
            into = HostPages(HostSlots(addresses, action.page_bytes, keep))
        except HicacheError as error:
            _log.error("copy into tier %s: %s", target.spec.name, error)
            job.fail(everything)
            return
        target.busy.take(action.slots)

        def packed(pages: Filled) -> None:
            self._seal(job, action, everything, pages)
            target.busy.leave(action.slots)

        source.start(action.pages, into, packed)

    def _seal(self, job: Job, action: CopyIn, part: range, pages: Filled) -> None:
        """Pages are in their slots."""
        target, slots = self._ports[action.tier], _some(action.slots, part)
        good = [at for at, (outcome, _) in enumerate(pages) if outcome is Outcome.OK]
        assert target.addressable is not None, "no memory to seal"
        target.addressable.seal([slots[at] for at in good], [pages[at][1] for at in good])
        target.bytes_in += len(good) * action.page_bytes
        job.settle(part, [outcome for outcome, _ in pages], source=True)

    def _fill(
        self, action: CopyIn, part: range, buffers: list[memoryview], then: Callable[[Filled], None]
    ) -> None:
        """Fill buffers with pages of a client: by themselves, or on a worker."""
        source: PageSource | StartedSource = action.source  # type: ignore[assignment]
        pages = _some(action.pages, part)
        if isinstance(source, StartedSource):
            source.start(pages, HostPages(buffers), then)
            return

        def filled(result: Filled | None) -> None:
            then(result if result is not None else [(Outcome.FAULT, 0)] * len(part))

        self._workers.run(filler(source, pages, buffers), filled)

    def _fill_bounce(self, job: Job, action: CopyIn, part: range) -> None:
        place = self._turns[action.tier].ticket()

        def take(slab: Slab) -> None:
            def filled(pages: Filled) -> None:
                self._put_filled(job, action, (part, pages, slab, place))

            self._fill(action, part, slab.pages(len(part)), filled)

        self._bounce.take(len(part), action.page_bytes, take)

    # --- both

    def _put_filled(
        self,
        job: Job,
        action: Copy | CopyIn,
        chunk: tuple[range, Filled, Slab, list[Callable[[], None]]],
    ) -> None:
        """A slab has been filled: PUT the pages that are good, when it is this chunk's turn."""
        part, filled, slab, place = chunk
        tier, slots = (
            (action.dst_tier, action.dst_slots) if isinstance(action, Copy) else (action.tier, action.slots)
        )
        target = self._ports[tier]
        good = [at for at, (outcome, _) in enumerate(filled) if outcome is Outcome.OK]
        bad = [at for at in range(len(filled)) if filled[at][0] is not Outcome.OK]
        chosen = [part[at] for at in good]

        def stored(completion: Completion) -> None:
            slab.release()
            job.settle_put(chosen, completion)

        def put() -> None:
            if not good:
                slab.release()
                return
            buffers = slab.pages(len(part))
            target.submit(
                Op.PUT,
                stored,
                page_bytes=action.page_bytes,
                slots=_some(slots, chosen),
                keys=_some(action.keys, chosen) if target.spec.keyed else (),
                buffers=[buffers[at] for at in good],
                checksums=[filled[at][1] for at in good],
                records=_some(action.records, chosen),
            )

        self._turns[tier].ready(place, put)
        if bad:
            job.settle([part[at] for at in bad], [filled[at][0] for at in bad], source=True)

    def _parts(self, pages: int, page_bytes: int) -> list[range]:
        step = self._bounce.pages_per_slab(page_bytes)
        return [range(start, min(start + step, pages)) for start in range(0, pages, step)]


def _some(column: Sequence[T], positions: Sequence[int]) -> list[T]:
    """These entries of a column; none of a column that is not used."""
    return [column[at] for at in positions] if column else []
