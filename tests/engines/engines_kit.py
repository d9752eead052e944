"""What tests of real engines share: environments, the engine host and its engines, sidecars."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from waiting import wait_until

from hicache import Client
from hicache.cli.sidecar import Sidecar
from hicache.rpc.client.results import Stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IMPORT_S = 120.0
ANSWER_S = 90.0
START_S = 240.0

#: What vLLM on a CPU needs to start fast, offline and on one thread. torch.compile would want a C++ compiler.
VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def environment(name: str) -> Path:
    """The interpreter of ``.venv-<name>``. Where it is missing: a failure in CI, elsewhere a skip that says how."""
    python = ROOT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        why = f"no environment {python.parent.parent.name}: run tests/engines/venvs/setup {name} (make e2e does)"
        if os.environ.get("CI"):
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    return python


class EngineError(Exception):
    """An engine answered with an error. ``kind``: the exception's class over there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's outcome. ``logprobs``: of each step, (token, logprob) in the order of tokens."""

    finish: str
    tokens: list[int]
    logprobs: list[list[list[float]]]
    cached: int
    first_s: float | None
    preemptions: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What came of some prompts that were given at once. ``steps``: tokens scheduled in each step that computed."""

    failure: str
    answers: list[Answer]
    seconds: float
    cpu_s: float
    steps: list[int]
    metrics: Mapping[str, float]

    def metric(self, name: str) -> int:
        """A counter of vLLM's own, as far as it moved in this round."""
        return round(self.metrics[name])

    @property
    def computed(self) -> int:
        """Prompt tokens that were computed, as vLLM counts them."""
        return self.metric("vllm:prompt_tokens_by_source_total{source=local_compute}")

    @property
    def local(self) -> int:
        """Prompt tokens from vLLM's own prefix cache."""
        return self.metric("vllm:prompt_tokens_by_source_total{source=local_cache_hit}")

    @property
    def external(self) -> int:
        """Prompt tokens from the connector."""
        return self.metric("vllm:prompt_tokens_by_source_total{source=external_kv_transfer}")

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]

    @property
    def logprobs(self) -> list[list[list[list[float]]]]:
        return [answer.logprobs for answer in self.answers]


class Host:
    """The process that has imported vLLM. ``engine()`` is a fresh process with an engine to be."""

    def __init__(self, python: Path, extra: Mapping[str, str] | None = None) -> None:
        self._python = python
        self._extra = dict(extra or {})
        self._folder = tempfile.TemporaryDirectory(prefix="hc-host-")
        self._engines = 0
        self.versions: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def __enter__(self) -> Self:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "COV_", "PYTEST_"))}
        environ |= {**VLLM_ENVIRONMENT, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", **self._extra}
        self._log = (self.folder / "log").open("ab")
        self._child = subprocess.Popen(
            [str(self._python), str(HERE / "vllm_host.py"), str(self.folder / "host.sock")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environ,
            start_new_session=True,
        )
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            tail = (self.folder / "log").read_text(errors="replace")[-3000:]
            self.__exit__()
            pytest.fail(f"vLLM's host process did not start:\n{tail}", pytrace=False)
        self.versions = json.loads(line)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def engine(self, environ: Mapping[str, str] | None = None) -> Engine:
        """A new process; ``start`` starts vLLM in it."""
        self._engines += 1
        return Engine(self.folder / "host.sock", self.folder / f"engine-{self._engines}.log", environ or {})

    @contextlib.contextmanager
    def running(
        self, model: Path, *, environ: Mapping[str, str] | None = None, **options: Any
    ) -> Iterator[Engine]:
        """A started engine; its log's tail is shown where the test fails, and it is shut down in order."""
        with self.engine(environ) as engine:
            engine.start(model, **options)
            yield engine
            engine.close()


class Engine:
    """One engine process."""

    def __init__(self, target: Path, log: Path, environ: Mapping[str, str]) -> None:
        self.log_path = log
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._socket.connect(str(target))
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self.pid: int = self.ask("hello", log=str(log), env=dict(environ))["pid"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(f"engine {self.pid}'s log ends with:\n{self.log_tail()}")
        self.leave()

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(line[:300] for line in self.log_text().splitlines()[-lines:])

    def send(self, do: str, **how: Any) -> None:
        self._socket.sendall(json.dumps({"do": do, **how}).encode() + b"\n")

    def receive(self, timeout_s: float = ANSWER_S) -> Any:
        """Its next answer. Raises EngineError for what went wrong over there."""
        self._socket.settimeout(timeout_s)
        line = self._lines.readline()
        if not line:
            raise EngineError("Gone", f"the engine's process ended; its log:\n{self.log_tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"], answer["message"])
        return answer["ok"]

    def ask(self, do: str, timeout_s: float = ANSWER_S, **how: Any) -> Any:
        self.send(do, **how)
        return self.receive(timeout_s)

    def start(
        self, model: Path, *, block_size: int = 32, connector: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Start vLLM. ``connector``: see ``hicache_connector``."""
        given = {"dtype": "float32", "max_model_len": 2048, "num_gpu_blocks_override": 20480 // block_size}
        started: dict[str, Any] = self.ask(
            "start",
            START_S,
            model=str(model),
            block_size=block_size,
            connector=connector,
            **{**given, **options},
        )
        return started

    def begin(self, prompts: Sequence[Sequence[int] | Mapping[str, Any]], **how: Any) -> None:
        """Give prompts and do not wait: ``finish`` does. For engines that work at the same time."""
        common = {key: how.pop(key) for key in ("new_tokens", "logprobs") if key in how}
        shown = [dict(p) if isinstance(p, Mapping) else {"tokens": list(p)} for p in prompts]
        self.send("run", prompts=[{**common, **one} for one in shown], **how)

    def finish(self, timeout_s: float = ANSWER_S) -> Round:
        """What came of the prompts; fails where the engine did not finish them in its bounds."""
        got = self.receive(timeout_s)
        answers = [Answer(**answer) for answer in got.pop("answers")]
        round_ = Round(answers=answers, **got)
        assert not round_.failure, round_.failure
        return round_

    def run(self, prompts: Sequence[Sequence[int] | Mapping[str, Any]], **how: Any) -> Round:
        """Give prompts at once; what came of them."""
        self.begin(prompts, **how)
        return self.finish()

    def reset(self, *, connector: bool = False) -> bool:
        """Empty vLLM's own prefix cache."""
        return bool(self.ask("reset", connector=connector))

    def close(self) -> None:
        """Shut down in order and leave."""
        self.ask("close")
        self.leave()

    def leave(self) -> None:
        """End the process (it ends by itself once nobody listens) and wait until it is gone."""
        self._lines.close()
        self._socket.close()
        deadline = time.monotonic() + 15
        while alive(self.pid):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self.leave()


def alive(pid: int) -> bool:
    """Whether a process that is not our child exists (its parent's kernel reaps it at once)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def hicache_connector(endpoint: str, *, policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    """KVTransferConfig's fields for our connector."""
    return {
        "kv_connector": "HiCacheConnector",
        "kv_connector_module_path": "hicache.integrations.vllm",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"endpoint": endpoint, **extra},
    }


class SidecarBox:
    """A sidecar in a folder of its own, with a client beside it."""

    def __init__(self, folder: Path, flags: Sequence[str], *, host: str, disk: str, start: bool) -> None:
        self.disk = folder / "disk"
        given = ["--host-bytes", host, "--no-prefault", *flags]
        if disk:
            given += ["--disk-path", str(self.disk), "--disk-bytes", disk]
        self.process = Sidecar(folder, given)
        if start:
            self.process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(f"the sidecar's log ends with:\n{self.process.log_tail()}")
        if self.process.pid:  # a stopped process does not die of anything but this
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.kill()

    @property
    def target(self) -> str:
        return self.process.target

    @property
    def pid(self) -> int:
        return self.process.pid

    def restart(self) -> None:
        """kill -9 and start again on the same folder."""
        self.process.kill()
        self.process.start()
        self.wait_recovered()

    def wait_recovered(self) -> None:
        """What is on disk is known again."""
        with self.client() as client:
            wait_until("recovery is over", lambda: not client.admin.stats().counters["recovering"])

    def client(self) -> Client:
        return Client(self.target)

    def stats(self) -> Stats:
        with self.client() as client:
            return client.admin.stats()

    def counter(self, name: str) -> int:
        return int(self.stats().counters[name])

    def wait_idle(self, timeout_s: float = 15.0) -> None:
        """Nobody holds anything any more, all copies are done, and the engine's own check finds nothing."""
        with self.client() as client:

            def idle() -> bool:
                stats = client.admin.stats()
                return not (stats.leases or stats.reservations or stats.waiting or stats.copies_in_flight)

            wait_until("no leases, no reservations, nobody waiting, no copies", idle, timeout_s)
            check = client.admin.check()
            assert check.ok, check.problem
