"""Opening ``Transfers``: the host mover always, one CUDA mover for each device that the sidecar serves."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from hicache.device.cuda import CudaDevice
from hicache.device.cuda_mover import CudaMover
from hicache.device.engines import Choice
from hicache.device.host_mover import HostMover
from hicache.device.imports import CLIENT_COPIES, HostImports, OpenKv, close_descriptor
from hicache.device.kv import MemoryKind, PagedKv
from hicache.device.loans import Loan
from hicache.device.streams import CopyStream
from hicache.device.tasks import Task
from hicache.device.transfers import DevicePages, KvHandle, Transfer, TransferDone, Transfers
from hicache.errors import HicacheError, InvalidArgumentError, UnavailableError, UnsupportedError
from hicache.types import Notify, PageStore


@runtime_checkable
class Lender(Protocol):
    """A device store whose slots transfers may read where they lie."""

    def lend(self, slots: Sequence[int]) -> Loan:
        """The slots. Raises InvalidArgumentError for slots of no open segment."""


def open_transfers(store: PageStore | None, notify: Notify, *, now_ns: Callable[[], int]) -> Transfers:
    """The transfers of a sidecar.

    Args:
        store: its device tier, if it has one. It stays open until the transfers are closed.
        notify: called from any thread when ``poll`` has something to give; must not raise.
        now_ns: the clock of ``Transfer.deadline_ns``.
    """
    return KvTransfers(store, notify, now_ns)


class KvTransfers:
    """See ``Transfers``. ``threaded=False``: ``step`` does the threads' work (tests)."""

    def __init__(
        self, store: object | None, notify: Notify, now_ns: Callable[[], int], *, threaded: bool = True
    ) -> None:
        self._notify = notify
        self._host = HostMover(now_ns) if threaded else HostMover(now_ns, threads=0)
        self._movers = _cuda_movers(store, self._host, now_ns, threaded=threaded)
        self._lender = store if isinstance(store, Lender) and not self._movers else None
        self._host_imports = HostImports()
        self._lock = threading.Lock()  # the handles' users and ends
        self._opened: set[OpenKv] = set()
        self._done: collections.deque[TransferDone] = collections.deque()
        self._unmapping = CopyStream("hicache-unmap", lambda: None) if threaded else None
        self._closed = False
        kinds = (MemoryKind.MEMFD, MemoryKind.CUDA_IPC, MemoryKind.CUDA_FD)
        self.memory_kinds = tuple(kind.value for kind in (kinds if self._movers else kinds[:1]))
        self.device_uuids = tuple(self._movers)

    @property
    def choices(self) -> dict[tuple[str, int, str], Choice]:
        """The copy engines that were chosen for strips of KV regions, and what was measured; from any thread."""
        return {shape: found for mover in self._movers.values() for shape, found in mover.choices.items()}

    # --- regions

    def open_kv(self, kv: PagedKv) -> KvHandle:
        """See Transfers."""
        kinds = {memory.kind for memory in kv.memories}
        try:
            if self._closed:
                raise UnavailableError("the sidecar is closing")
            if len(kinds) != 1:
                raise InvalidArgumentError(
                    f"the memory of a KV region must be of one kind, not {sorted(kinds)}"
                )
            opens = self._opener(kv)
        except HicacheError:
            for memory in kv.memories:
                close_descriptor(memory)
            raise
        handle = opens(kv)
        if not self._keep(handle):
            handle.unmap()
            raise UnavailableError("the sidecar is closing")
        return handle

    def _keep(self, handle: OpenKv) -> bool:
        with self._lock:
            if not self._closed:
                self._opened.add(handle)
            return not self._closed

    def _opener(self, kv: PagedKv) -> Callable[[PagedKv], OpenKv]:
        memory = kv.memories[0]
        if memory.kind is MemoryKind.MEMFD:
            return self._host_imports.open
        if not self._movers:
            raise UnsupportedError(
                f"memory of kind {memory.kind} cannot be mapped here: the sidecar serves no CUDA device with kernels",
                hint=f"start it with --device cuda:<n>, with triton installed, {CLIENT_COPIES}",
            )
        mover = self._movers.get(memory.device_uuid) or next(
            iter(self._movers.values())
        )  # which says why not
        return mover.open

    def close_kv(self, handle: KvHandle, then: Callable[[], None]) -> None:
        """See Transfers. Packs that wait for a layer wait no more."""
        found = self._find(handle)
        with self._lock:
            if found.closing:
                raise UnavailableError("the KV region is closed already")
            found.closing, found.then = True, then
            now = not found.users
        if now:
            self._unmap(found)

    def check(self, handle: KvHandle, device_pages: bool) -> None:  # noqa: FBT001
        """See Transfers."""
        found = self._find(handle)
        if device_pages and not found.device_uuid and self._lender is None:
            raise UnsupportedError(
                "pages of this device tier cannot be moved into a KV region in host memory",
                hint=f"fetch without device=True, {CLIENT_COPIES}",
            )

    # --- transfers

    def load(self, transfer: Transfer) -> None:
        """See Transfers. Raises InvalidArgumentError for pages, places or layers that do not go together."""
        pages = transfer.pages
        loan = self._lend(transfer, pages) if isinstance(pages, DevicePages) else None
        try:
            self._start(transfer, loan, pack=False)
        except HicacheError:
            if loan is not None:
                loan.end()
            raise

    def pack(self, transfer: Transfer) -> None:
        """See Transfers, and ``load``. Raises UnsupportedError for slots of a device: a new page goes to the host."""
        if isinstance(transfer.pages, DevicePages):
            raise UnsupportedError("pages from a KV region are stored in host memory first")
        self._start(transfer, None, pack=True)

    def _lend(self, transfer: Transfer, pages: DevicePages) -> Loan:
        mover = self._movers.get(self._find(transfer.kv).device_uuid)
        lender = mover.store if mover else self._lender
        if lender is None:
            self.check(transfer.kv, device_pages=True)
            raise UnsupportedError("no device tier lends its slots")
        try:
            loan = lender.lend(pages.slots)
        except InvalidArgumentError as error:
            if len(self._movers) < 2:
                raise
            raise UnsupportedError(
                f"pages lie on another device than the KV region: {error}",
                hint=f"fetch without device=True, {CLIENT_COPIES}",
            ) from error
        sizes = loan.page_bytes
        if sizes not in (set(), {transfer.page_bytes}):
            loan.end()
            raise InvalidArgumentError(
                f"transfer {transfer.id}: pages of {transfer.page_bytes} bytes, slots of {sorted(sizes)}"
            )
        return loan

    def _start(self, transfer: Transfer, loan: Loan | None, *, pack: bool) -> None:
        found = self._find(transfer.kv)
        task = Task(transfer, found, self._ended, pack=pack, loan=loan)
        with self._lock:
            if self._closed or found.closing:
                raise UnavailableError(
                    "the sidecar is closing" if self._closed else "the KV region is closed"
                )
            found.users += 1
        mover = self._movers.get(found.device_uuid)
        (mover or self._host).start(task)

    def _ended(self, task: Task) -> None:
        """From a mover's thread: nothing of the task is under way any more."""
        self._done.append(task.done())
        with self._lock:
            task.kv.users -= 1
            last = task.kv.closing and not task.kv.users
        self._notify()
        if last:
            self._unmap(task.kv)

    def poll(self) -> list[TransferDone]:
        """See Transfers."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def step(self) -> bool:
        """Without threads: do what can be done now. True if anything happened."""
        return any([self._host.step(), *[mover.step() for mover in self._movers.values()]])

    def close(self) -> None:
        """See Transfers. ``poll`` still gives the rest."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for mover in self._movers.values():
            mover.end()
        self._host.close()
        with self._lock:
            left = [handle for handle in self._opened if not handle.closing]
            for handle in left:
                handle.closing = True
        for handle in left:
            self._unmap(handle)
        if self._unmapping is not None:
            self._unmapping.close()
        for mover in self._movers.values():
            mover.close()

    def _find(self, handle: KvHandle) -> OpenKv:
        if not isinstance(handle, OpenKv) or handle not in self._opened:
            raise UnavailableError("the KV region is closed")
        return handle

    def _unmap(self, handle: OpenKv) -> None:
        """Once for each region, on a thread of its own: unmapping may take long, or wait for the device."""

        def work() -> None:
            handle.unmap()
            with self._lock:
                self._opened.discard(handle)
            if handle.then is not None:
                handle.then()

        if self._unmapping is not None:
            self._unmapping.launch(work)
        else:
            work()


def _cuda_movers(
    store: object | None, host: HostMover, now_ns: Callable[[], int], *, threaded: bool
) -> dict[bytes, CudaMover]:
    """One for each CUDA device with kernels, by UUID."""
    devices = getattr(store, "devices", [store])
    return {
        device.driver.uuid: CudaMover(device, host, now_ns, threaded=threaded)
        for device in devices
        if isinstance(device, CudaDevice) and device.driver.has_kernels
    }
