"""SGLang's cache controller over its own file backend and over ours, as contenders of ``bench/sglang_store.py``.

Runs in ``.venv-sglang``. Both move the same pages of the same kind of host pool through the controller's own functions
(``page_set_func``, ``page_get_func``), which its backup and prefetch threads call: for the file backend these are the
generic ones, which is what SGLang takes for it, for ours the v1 ones.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "tests" / "engines")]

from contender import serve  # noqa: E402
from sglang_driver import Host  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")


class Never:
    """A prefetch that nobody terminates."""

    request_id = "bench"

    def is_terminated(self) -> bool:
        return False


def sidecar_cpu_s(pid: int) -> float:
    """CPU seconds of the sidecar so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Bench:
    """One backend."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.pid = spec.pop("pid")
        self.folder = spec.pop("folder")
        self.pages = spec.pop("pages")
        if self.folder:
            os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = self.folder
        self.host = Host(spec)
        self.round = 0
        self.stored = self.host.fill(list(range(self.pages)), 1)
        self.source = self.host.indices(list(range(self.pages)))
        self.into = self.host.indices(list(range(self.pages, 2 * self.pages)))

    def empty(self) -> None:
        self.host.backend.clear()
        if self.folder:
            Path(self.folder).mkdir(exist_ok=True)

    def timed(self, work: Callable[[], bool]) -> dict[str, Any]:
        cpu = time.process_time() + (sidecar_cpu_s(self.pid) if self.pid else 0)
        began = time.perf_counter()
        if not work():
            raise RuntimeError("a page was not moved")
        wall = time.perf_counter() - began
        cpu = time.process_time() + (sidecar_cpu_s(self.pid) if self.pid else 0) - cpu
        return {
            "wall_us": wall / self.pages * 1e6,
            "cpu_us": cpu / self.pages * 1e6,
            "iterations": self.pages,
        }

    def keys(self) -> list[str]:
        self.round += 1
        return [f"{self.round:032x}{page:032x}" for page in range(self.pages)]

    def store(self) -> dict[str, Any]:
        self.empty()
        keys = self.keys()
        return self.timed(lambda: bool(self.host.controller.page_set_func(keys, self.source, None)))

    def load(self) -> Callable[[], dict[str, Any]]:
        self.empty()
        keys = self.keys()
        assert self.host.controller.page_set_func(keys, self.source, None)

        def sample() -> dict[str, Any]:
            self.host.pool.kv_buffer.view(-1)[-64:] = 0
            get = self.host.controller.page_get_func
            taken = self.timed(lambda: get(Never(), keys, self.into, None) == self.pages)
            if self.host.digests([self.pages, 2 * self.pages - 1]) != [self.stored[0], self.stored[-1]]:
                raise RuntimeError("the pages loaded are not those stored")
            return taken

        return sample

    def exists(self) -> Callable[[], dict[str, Any]]:
        self.empty()
        keys = self.keys()
        assert self.host.controller.page_set_func(keys, self.source, None)
        return lambda: self.timed(lambda: self.host.exists(keys) == self.pages)

    def harmed(self, harm: str) -> str:
        """What a load of one page says whose file was harmed."""
        self.empty()
        key = self.keys()[:1]
        assert self.host.controller.page_set_func(key, self.source[: self.host.spec["page_size"]], None)
        (path,) = Path(self.folder).glob("*.bin")
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0x40
        path.write_bytes(raw if harm == "flip" else raw[: len(raw) // 2])
        try:
            loaded = self.host.controller.page_get_func(
                Never(), key, self.into[: self.host.spec["page_size"]], None
            )
        except OSError as error:
            again = self.host.controller.page_set_func(key, self.source[: self.host.spec["page_size"]], None)
            cut = path.stat().st_size < len(raw)
            return f"raises {type(error).__name__}; stored again: {again}, still cut: {cut}"
        right = self.host.digests([self.pages]) == self.stored[:1]
        return f"loaded {loaded}, bytes right: {right}"


def prepare(spec: dict[str, Any]) -> dict[str, Callable[[], Callable[[], dict[str, Any]]]]:
    bench = Bench(spec)
    return {"set": lambda: bench.store, "get": bench.load, "exists": bench.exists}


if __name__ == "__main__":
    if sys.argv[1:2] == ["harm"]:
        import json

        found = Bench(json.loads(sys.argv[2]))
        print(json.dumps({harm: found.harmed(harm) for harm in ("flip", "cut")}))
        shutil.rmtree(found.folder, ignore_errors=True)
        sys.exit(0)
    serve(
        "sglang",
        prepare,  # type: ignore[arg-type]
        lambda: {name: metadata.version(name) for name in ("sglang", "torch")},
    )
