"""Runs what is for a GPU only, without one: the CUDA libraries in ordinary memory, a torch.cuda in Python on them.

    python tests/gpu/rehearse.py bench/gpu.py --tiny --repetitions 1
    python tests/gpu/rehearse.py -m pytest tests/gpu/test_cuda_device.py

The libraries are found as CUDA's are, by the loader (LD_LIBRARY_PATH); the process starts itself anew for that. torch
must be a CPU build; Triton, where there is one, runs in its interpreter. Tensors "on the device" lie in ordinary
memory, what torch computes is done at once, and what goes through CUDA's libraries happens on streams, late. So every
line runs; nothing is measured. Results of the bench go to a temporary folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import sys
import tempfile
import threading
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.setdefault("TRITON_INTERPRET", "1")

import fake_cuda  # noqa: E402
import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

here = threading.local()


class Library:
    """The runtime by its name, as the loader finds it."""

    def load(self) -> None:
        self.runtime = ctypes.CDLL("libcudart.so.13")
        self.core = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.runtime, name)(*arguments)
        if code:
            raise RuntimeError(f"CUDA error {code} of {name}")

    def made(self, name: str, *arguments: object) -> int:
        found = ctypes.c_void_p()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value or 0


library = Library()


class Event:
    def __init__(self, *, enable_timing: bool = False) -> None:
        self.at = library.made("cudaEventCreateWithFlags", 0 if enable_timing else 2)

    def record(self, stream: Stream | None = None) -> None:
        library.call("cudaEventRecord", ctypes.c_void_p(self.at), pointer(stream or current()))

    def query(self) -> bool:
        return library.runtime.cudaEventQuery(ctypes.c_void_p(self.at)) == 0

    def synchronize(self) -> None:
        library.call("cudaEventSynchronize", ctypes.c_void_p(self.at))

    def elapsed_time(self, other: Event) -> float:
        found = ctypes.c_float()
        library.call(
            "cudaEventElapsedTime", ctypes.byref(found), ctypes.c_void_p(self.at), ctypes.c_void_p(other.at)
        )
        return max(found.value, 1e-6)


class Stream:
    def __init__(self, device: object = None, *, priority: int = 0) -> None:
        self.cuda_stream = library.made("cudaStreamCreateWithPriority", 1, priority)

    @property
    def device(self) -> int:
        return 0

    def wait_event(self, event: Event) -> None:
        library.call("cudaStreamWaitEvent", pointer(self), ctypes.c_void_p(event.at), 0)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        library.call("cudaStreamSynchronize", pointer(self))


class ExternalStream(Stream):
    def __init__(self, stream: int, device: object = None) -> None:
        self.cuda_stream = stream


def pointer(stream: Stream) -> ctypes.c_void_p:
    return ctypes.c_void_p(stream.cuda_stream)


def current(device: object = None) -> Stream:
    return getattr(here, "stream", None) or ExternalStream(0)


@contextlib.contextmanager
def on(stream: Stream):
    """What torch does inside is done at once: after all that the stream was given before."""
    before = getattr(here, "stream", None)
    stream.synchronize()
    here.stream = stream
    try:
        yield
    finally:
        here.stream = before


class Device:
    """The current device, of which there is one."""

    def __init__(self, number: object) -> None:
        self.number = number

    def __enter__(self) -> None:
        library.call("cudaSetDevice", 0)

    def __exit__(self, *_: object) -> None:
        return None


def in_place(there: dict) -> torch.Tensor:
    """What torch makes of __cuda_array_interface__: bytes in rows, where they lie."""
    (rows, size), (stride, _) = there["shape"], there["strides"]
    raw = (ctypes.c_uint8 * (max(rows - 1, 0) * stride + size)).from_address(there["data"][0])
    return torch.frombuffer(raw, dtype=torch.uint8).as_strided((rows, size), (stride, 1))


class OnTheDevice(TorchFunctionMode):
    """Tensors asked for on a CUDA device, or pinned, are plain ones; ``is_cuda`` remembers which were meant."""

    def __init__(self) -> None:
        super().__init__()
        self.meant: set[int] = set()

    def __torch_function__(self, function, kinds, arguments=(), named=None):
        named = dict(named or {})
        if function is torch.Tensor.is_cuda.__get__:
            return arguments[0].untyped_storage().data_ptr() in self.meant
        wanted = [value for value in (*arguments, named.get("device")) if isinstance(value, torch.device)]
        named.pop("pin_memory", None)
        if any(device.type == "cuda" for device in wanted):
            cpu = torch.device("cpu")
            arguments = tuple(cpu if isinstance(value, torch.device) else value for value in arguments)
            if "device" in named:
                named["device"] = cpu
            found = function(*arguments, **named)
            self.meant.add(found.untyped_storage().data_ptr())
            return found
        return function(*arguments, **named)


def install() -> OnTheDevice:
    """torch.cuda as it would be with one GPU."""
    about = types.SimpleNamespace(name="a rehearsal", total_memory=1 << 34)
    torch.version.cuda = "rehearsed"
    for name, what in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: library.call("cudaDeviceSynchronize"),
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: about,
        "current_stream": current,
        "stream": on,
        "device": Device,
        "Stream": Stream,
        "ExternalStream": ExternalStream,
        "Event": Event,
    }.items():
        setattr(torch.cuda, name, what)
    from hicache.device import kernels

    kernels.FUSED = kernels.has_triton()
    plain = torch.as_tensor  # not overridden for what is no tensor

    def as_tensor(data: object, *arguments, **named) -> torch.Tensor:
        there = getattr(data, "__cuda_array_interface__", None)
        return in_place(there) if there else plain(data, *arguments, **named)

    torch.as_tensor = as_tensor
    return OnTheDevice()


def main() -> None:
    folder = str(fake_cuda.build())
    path = os.environ.get("LD_LIBRARY_PATH", "")
    if folder not in path.split(":"):
        os.environ["LD_LIBRARY_PATH"] = f"{folder}:{path}"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    library.load()
    library.core.fake_configure(b"any_memory", ctypes.c_longlong(1))
    module = sys.argv[1] == "-m"
    sys.argv = sys.argv[2:] if module else sys.argv[1:]
    with install(), tempfile.TemporaryDirectory(dir=ROOT / "build") as results:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            return
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        import gpu_ipc
        import gpu_paths
        import harness

        harness.RESULTS = Path(results)
        gpu_ipc.PYTHON += [str(HERE / "rehearse.py")]
        gpu_paths.PIECE_BYTES = 1  # a page a piece, so that both buffers of the staged way are used again
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
