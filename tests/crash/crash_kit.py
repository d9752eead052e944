"""The parent's side of the crash tests: children to kill, what they said, and what may be there afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from crash_world import Name, reachable

SCRIPT = Path(__file__).parent / "crash_nursery.py"


class Nursery:
    """Forks children that have their imports behind them. ``env``: more variables for all of them."""

    def __init__(self, **env: str) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="hicache-crash-")
        self._env = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "HICACHE_CRASH_SCRATCH": self._scratch.name,
            **env,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._env,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._scratch.cleanup()

    def _ask(self, **ask: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(ask) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def fork(self, task: str, **how: Any) -> int:
        return self._ask(fork=task, how=how)

    def wait(self, pid: int) -> int:
        """Its exit code; negative: the signal that ended it."""
        return os.waitstatus_to_exitcode(self._ask(wait=pid))

    def answer(self, task: str, folder: Path, **how: Any) -> dict[str, Any]:
        """What a child found out. It must end well."""
        path = Path(self._scratch.name) / "answer"
        path.unlink(missing_ok=True)
        code = self.wait(self.fork(task, folder=str(folder), answer=str(path), **how))
        assert code == 0, f"{task} ended with {signal.Signals(-code).name if code < 0 else code}"
        answer: dict[str, Any] = json.loads(path.read_text())
        return answer


def until_said(diary: Path, word: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not (diary.exists() and f"{word}\n" in diary.read_text()):
        assert time.monotonic() < deadline, f"the child never said {word}"
        time.sleep(0.001)


class Ledger:
    """What a folder may hold: by page, the versions (0: none) of which one must be there."""

    def __init__(self) -> None:
        self.allowed: dict[Name, set[int]] = {}
        self.acknowledged = 0
        self.batches = 0

    def read(self, diary: Path) -> None:
        """Take in what a child wrote before it died; a last line without its end was never finished."""
        lines = diary.read_text().split("\n")[:-1]
        answers = {int(w[1]): w[2] for w in (line.split() for line in lines) if w[0] == "A" and len(w) > 2}
        for line in lines:
            if line.startswith("S "):
                self._batch(line.split(), answers)

    def _batch(self, words: list[str], answers: dict[int, str]) -> None:
        pages = [page.replace(":", ".").split(".") for page in words[3].split(",")] if len(words) > 3 else []
        outcomes = answers.get(int(words[1]), "?" * len(pages))
        self.batches += 1
        for (space, number, version), outcome in zip(pages, outcomes, strict=False):
            name, effect = (int(space), int(number)), int(version) if words[2] == "put" else 0
            if outcome == "?":
                self.allowed.setdefault(name, {0}).add(effect)
            elif outcome == "o" or (outcome == "m" and not effect):
                self.allowed[name] = {effect}
                self.acknowledged += 1

    def judge(self, found: dict[str, Any]) -> None:
        """Compare with what was read back, and know from now on what is there."""
        assert not found["wiped"], found["wiped"]
        seen = {tuple(map(int, name.split("."))): version for name, version in found["seen"].items()}
        for name in seen.keys() | self.allowed.keys():
            allowed = self.allowed.get(name, {0})
            assert seen.get(name, 0) in allowed, (
                f"page {name} is {seen.get(name, 0)}, not of {sorted(allowed)}"
            )
        present = set(seen)
        chained = {tuple(map(int, name.split("."))) for name in found["chained"]}
        assert chained <= present, f"matchable, but not there: {sorted(chained - present)[:5]}"
        assert reachable(present) <= chained, "there, but not matchable"
        self.allowed = {name: {version} for name, version in seen.items()}

    @property
    def held(self) -> dict[str, int]:
        """Pages that are known to be there."""
        return {f"{s}.{n}": max(versions) for (s, n), versions in self.allowed.items() if max(versions)}
