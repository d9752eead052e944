"""One direction of transfers over a CUDA device: courses launch chunks in turn, events are polled, chunks land.

``step`` does what can be done now and never waits; a thread or a test calls it. A chunk has landed when the event
behind it is ready. If none can be recorded, or the device is lost, it is given up: everything ends as FAULT, and it is
asked for nothing any more.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np

from hicache.device import courses, kernels
from hicache.device.bays import WORDS, Bay
from hicache.device.courses import Chunk, Course, Steps
from hicache.device.driver import Driver, DriverError
from hicache.device.engines import MANY_ROWS, Choice
from hicache.device.patience import Patience, Unanswered
from hicache.device.stages import Stages
from hicache.device.tasks import Task
from hicache.types import Outcome

#: A chunk takes more layers than one rather than have fewer bytes than this.
CHUNK_BYTES_MIN = 4 << 20
#: Chunks of a shape that each engine gets before the fastest is kept.
TRIALS = 3

#: How often events are asked for, and engines' counters where nothing flies.
POLL_S, LAYER_POLL_S = 30e-6, 500e-6

Shape = tuple[str, int, str]  # direction, bytes of a strip, few or many


class Choices:
    """Which engine for registered host memory: said, or the faster on the first chunks of a shape."""

    def __init__(self, said: str) -> None:
        self._said = {"auto": "", "kernel": "kernel"}.get(said, "staged")
        self._found: dict[Shape, dict[str, list[float]]] = {}
        self.choices: dict[Shape, Choice] = {}  # read from any thread

    @property
    def said(self) -> str:
        """The engine that was asked for; empty: it is measured."""
        return self._said

    def engine(self, shape: Shape) -> str:
        """The engine for a chunk."""
        if self._said:
            return self._said
        if shape in self.choices:
            return self.choices[shape].engine
        tried = self._found.setdefault(shape, {"staged": [], "kernel": []})
        return min(tried, key=lambda name: len(tried[name]))

    def took(self, shape: Shape, engine: str, gb_per_s: float) -> None:
        """A chunk was measured."""
        tried = self._found.get(shape)
        if tried is None or engine not in tried or shape in self.choices:
            return
        tried[engine].append(gb_per_s)
        if all(len(speeds) >= TRIALS for speeds in tried.values()):
            best = {name: round(max(speeds), 2) for name, speeds in tried.items()}
            self.choices[shape] = Choice(max(best, key=lambda name: best[name]), best)


class KvLane:
    """A stream with its bays. ``submit`` from the owner, the rest from the lane's thread."""

    def __init__(
        self,
        driver: Driver,
        now_ns: Callable[[], int],
        lost: Callable[[], str],
        patience: Patience,
        *,
        pack: bool,
        priority: int,
        engine: str,
        bay_bytes: int,
    ) -> None:
        self._driver = driver
        self._now_ns = now_ns
        self._lost = lost  # why the device was given up by others
        self._patience = patience
        self._pack = pack
        self._stream = driver.stream(priority)
        self._stages = Stages(driver, bay_bytes, words=WORDS)
        self._new: collections.deque[Course] = collections.deque()
        self._courses: list[Course] = []
        self._flying: collections.deque[tuple[Chunk, Bay]] = collections.deque()
        self._choices = Choices(engine)
        self.ending = ""  # why nothing is begun or waited for any more
        self.dead = ""
        self.silent = False  # it was given up without an answer: what it was given may still happen
        self.steps = 0
        self._landed_ns = 0

    def submit(self, course: Course) -> None:
        """Queue a course; returns at once."""
        self._new.append(course)

    def whole(self, task: Task) -> bool:
        """Whether pages travel whole and are hashed on the device: where nobody waits for layers."""
        shape, transfer, kv = task.shape, task.transfer, task.kv.kv
        if task.loan is not None or transfer.counter is not None or self._choices.said == "kernel":
            return False
        moved = shape.layers * kv.planes_per_layer * shape.units * shape.unit_bytes
        enough = transfer.page_bytes <= 2 * moved
        if task.pack:  # what is stored is what was hashed: nothing but what came from the engine
            enough = moved == transfer.page_bytes and not (transfer.places < 0).any()
        return enough and kernels.can_hash(transfer.page_bytes)

    def pause_s(self) -> float:
        """Until it is worth asking again: soon for an event of the device, later for a layer of an engine."""
        return POLL_S if self._flying else LAYER_POLL_S

    @property
    def idle(self) -> bool:
        """Nothing waits or flies."""
        return not self._new and not self._courses

    @property
    def choices(self) -> dict[Shape, Choice]:
        """What was found; from any thread."""
        return dict(self._choices.choices)

    def step(self) -> bool:
        """Land and launch what can be. True if anything happened."""
        self.steps += 1
        if not self.idle:
            self.dead = self.dead or self._lost()
        happened = self._land()
        while self._new:
            course = self._new.popleft()
            course.begin()
            course.steps = self._steps(course)
            self._courses.append(course)
        for course in list(self._courses):
            happened = self._advance(course) or happened
        return happened

    def close(self) -> None:
        """Give the bays back; the lane is idle. Those that the device may still use are left to it."""
        if not self.silent:
            self._stages.close()

    def abandon(self) -> None:
        """A call of the driver does not return: the lane's thread is gone."""
        self.silent, self.dead = True, self.dead or "the device was given up: it does not answer"

    def _advance(self, course: Course) -> bool:
        if self.dead:
            course.task.fault(self.dead)
            course.steps = iter(())
        try:
            return next(course.steps)
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001  a counter or a buffer of somebody else's: this transfer fails
            course.task.fault(f"{type(error).__name__}: {error}")
            course.steps = iter(())
        if course.flying:
            return False
        self._courses.remove(course)
        course.then()
        return True

    # --- what a course does

    def _steps(self, course: Course) -> Steps:
        task = course.task
        if self.ending:
            task.fault(self.ending)
        elif not len(course.pages):
            task.arrived(task.shape.layers)
        elif course.whole:
            yield from self._pages(course, whole=True)
        else:
            yield from self._layers(course)
            if task.loan is not None and task.expected is not None:
                yield from self._pages(course, whole=False)

    def _pages(self, course: Course, *, whole: bool) -> Steps:
        """Whole pages: moved and hashed, or only hashed where they lie on the device."""
        task, layers = course.task, course.task.shape.layers
        engine = "staged" if course.hold else "bounce"
        if not whole:
            engine = "slots" if kernels.can_hash(task.transfer.page_bytes) else "bounce"
        made = Chunk(course, engine, slice(0, 0), 0, layers, whole=whole, only_hash=not whole)
        yield from self._chunks(made)

    def _layers(self, course: Course) -> Steps:
        """Strips of some layers at a time."""
        task, first = course.task, 0
        while first < task.shape.layers:
            count = self._ready(course, first)
            if not count:
                why = self.ending or task.late(self._now_ns())
                if why:
                    task.fault(why)
                    return
                yield False
                continue
            made = Chunk(course, "", slice(0, 0), first, count)
            made.engine = self._engine(made)
            yield from self._chunks(made)
            first += count

    def _ready(self, course: Course, first: int) -> int:
        """How many layers to take now: of those that are there; one where somebody waits for the first."""
        task, shape = course.task, course.task.shape
        left, counter = shape.layers - first, task.transfer.counter
        per_layer = task.kv.kv.planes_per_layer * shape.units * shape.unit_bytes
        room_bytes = CHUNK_BYTES_MIN if counter is not None else self._stages.stage_bytes
        wanted = max(1, room_bytes // (per_layer * len(course.pages)))
        if counter is not None and task.pack:
            left = max(0, min(left, counter.get() - shape.first - first))
        elif counter is not None and not first:
            wanted = 1
        return min(left, wanted)

    def _engine(self, chunk: Chunk) -> str:
        course, kv = chunk.course, chunk.course.task.kv
        if course.task.loan is not None:
            return "slots"
        if course.hold is None:
            return "bounce"
        rows = course.rows + chunk.first_byte
        if courses.alignment(kv.planes, rows) % kv.kv.element_bytes:
            return "staged"  # the kernel reads whole elements
        return self._choices.engine(self._shape(chunk, len(rows)))

    def _shape(self, chunk: Chunk, rows: int) -> Shape:
        direction = "from engine" if self._pack else "to engine"
        return direction, chunk.width, "few" if rows < MANY_ROWS else "many"

    def _chunks(self, made: Chunk) -> Steps:
        """Launch as many chunks of this kind as all the course's pages take."""
        course, start, end = made.course, 0, 0
        while start < len(course.pages):
            try:
                stage = self._stages.take(made.pitch, idle=not self._flying)
            except DriverError as error:
                course.task.fault(f"no memory for copies: {error}")
                return
            if stage is None:
                yield False
                continue
            planes = made.planes.stop - made.planes.start
            room = courses.pages_max(course.task, planes, made.width, stage.size_bytes)
            end = min(start + max(1, room), len(course.pages))
            last = end == len(course.pages) and not made.only_hash
            arrives = made.first + made.layers if last else 0
            part = Chunk(
                course,
                made.engine,
                slice(start, end),
                made.first,
                made.layers,
                whole=made.whole,
                only_hash=made.only_hash,
                arrives=arrives,
            )
            self._launch(part, Bay(stage), fits=room > 0)
            start = end
            yield True

    # --- launching and landing

    def _launch(self, chunk: Chunk, bay: Bay, *, fits: bool) -> None:
        try:
            if not fits:
                raise ValueError("pages of too many units and planes")
            self._driver.record(bay.stage.begun, self._stream)
            chunk.timed = True
            courses.queue(self._driver, self._stream, chunk, bay)
        except DriverError as error:
            self._fail(chunk, error)
        except (ValueError, BufferError, OverflowError) as error:
            chunk.problem = f"{type(error).__name__}: {error}"
        try:
            self._driver.record(bay.stage.event, self._stream)
        except DriverError as error:  # nobody knows when its memory is free
            self._fail(chunk, error)
            self.dead = self.dead or f"the device was given up: {error}"
        chunk.course.flying += 1
        chunk.since_ns = self._patience.now_ns()
        self._flying.append((chunk, bay))

    def _land(self) -> bool:
        happened = False
        while self._flying:
            chunk, bay = self._flying[0]
            try:
                if not self.dead and not self._driver.ready(bay.stage.event):
                    self._patience.check(max(chunk.since_ns, self._landed_ns))
                    return happened
            except DriverError as error:
                self._fail(chunk, error)
            self._flying.popleft()
            self._landed_ns = self._patience.now_ns()
            self._settle(chunk, bay)
            self._stages.give(bay.stage)
            chunk.course.flying -= 1
            happened = True
        return happened

    def _settle(self, chunk: Chunk, bay: Bay) -> None:
        task = chunk.course.task
        if chunk.problem or self.dead:
            task.fail(chunk.pages.tolist(), Outcome.FAULT, self.dead or chunk.problem)
            return
        if chunk.engine == "bounce" and task.pack:
            courses.bounce_out(chunk, bay)
        if chunk.whole or chunk.only_hash:
            self._compare(chunk, bay)
        if chunk.arrives:
            task.arrived(chunk.arrives)
        if chunk.timed and not chunk.whole and chunk.engine in {"staged", "kernel"}:
            taken_ns = max(1, self._driver.elapsed_ns(bay.stage.begun, bay.stage.event))
            size = len(chunk.pages) * chunk.width
            self._choices.took(self._shape(chunk, len(chunk.course.pages)), chunk.engine, size / taken_ns)

    def _compare(self, chunk: Chunk, bay: Bay) -> None:
        """The device's hashes of a chunk's pages against what they must be."""
        task, pages = chunk.course.task, chunk.pages
        found = courses.hashes(chunk, bay).view(np.uint64)
        task.checksums[pages] = found
        if task.expected is None:
            return
        wrong = pages[found != task.expected[pages]]
        if len(wrong):
            task.rotten(wrong)

    def _fail(self, chunk: Chunk, error: DriverError) -> None:
        chunk.problem = chunk.problem or str(error)
        self.silent = self.silent or isinstance(error, Unanswered)
        if error.fatal:
            self.dead = self.dead or f"the device was given up: {error}"
