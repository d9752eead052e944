"""Runs contenders side by side and writes what they took. Standard library only.

Medians of at least seven samples; contenders that are compared take their samples in turn (A, B, A, B, ...), so
that a machine that drifts hits both alike. Results go to ``bench/results/<name>.json``, stamped with commit,
machine and versions, and as a table to the terminal. The protocol is described in ``contender.py``.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
MIN_REPETITIONS = 7


class BenchError(Exception):
    """A contender could not start, died, or answered nonsense."""


def venv_python(name: str) -> Path:
    """The interpreter of ``bench/.venvs/<name>``; raises BenchError with the command that makes it."""
    python = BENCH / ".venvs" / name / "bin" / "python"
    if not python.exists():
        raise BenchError(f"no environment {name!r}: run bench/peers/setup.sh {name}")
    return python


@dataclass
class Process:
    """A contender in a process of its own. Use as a context manager; it is ended by its own pid."""

    command: Sequence[str]
    spec: Mapping[str, Any]
    label: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    _child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Process:
        self._child = subprocess.Popen(
            list(self.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **self.env},
        )
        self.info = self._ask({"spec": dict(self.spec)})
        if "error" in self.info:
            raise BenchError(f"{self.label or self.command}: {self.info['error']}")
        self.label = self.label or self.info["name"]
        return self

    def __exit__(self, *exc: object) -> None:
        child = self._child
        assert child is not None and child.stdin is not None
        try:
            child.stdin.close()
            child.wait(timeout=10)
        except (subprocess.TimeoutExpired, OSError):
            child.kill()
            child.wait()

    @property
    def cases(self) -> list[str]:
        """The cases that this contender offers."""
        return list(self.info["cases"])

    def sample(self, case: str) -> dict[str, Any]:
        """One sample, or ``{"error": ...}``."""
        answer = self._ask({"case": case})
        sample: dict[str, Any] = answer.get("sample", answer)
        return sample

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError as error:
            raise BenchError(f"{self.label or self.command}: gone ({error})") from error
        if not line:
            raise BenchError(
                f"{self.label or self.command}: ended with {child.poll()}; see its messages above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(
    contenders: Sequence[Process], cases: Sequence[str] = (), repetitions: int = 9
) -> list[dict[str, Any]]:
    """Sample every case of every contender in turn; one row for (case, contender).

    The first round warms up and is not counted. A contender that lacks a case, or fails in it, is left out of it.
    """
    if repetitions < MIN_REPETITIONS:
        raise ValueError(f"{repetitions} repetitions: at least {MIN_REPETITIONS} make a median worth reading")
    wanted = list(cases) or list(dict.fromkeys(case for c in contenders for case in c.cases))
    rows = []
    for case in wanted:
        taking_part = [c for c in contenders if case in c.cases]
        samples: dict[str, list[dict[str, Any]]] = {c.label: [] for c in taking_part}
        errors: dict[str, str] = {}
        for repetition in range(repetitions + 1):
            for contender in taking_part:
                if contender.label in errors:
                    continue
                got = contender.sample(case)
                if "error" in got:
                    errors[contender.label] = str(got["error"])
                elif repetition:
                    samples[contender.label].append(got)
        for label, taken in samples.items():
            if label in errors:
                rows.append({"case": case, "contender": label, "error": errors[label]})
            else:
                rows.append({"case": case, "contender": label, **summary(taken)})
        print_rows([row for row in rows if row["case"] == case])
    return rows


def summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians and extremes over samples of ``{cpu_us, wall_us, iterations}``; percentiles over all single calls."""
    cpu = [s["cpu_us"] for s in samples]
    wall = [s["wall_us"] for s in samples]
    found = {
        "cpu_us": statistics.median(cpu),
        "cpu_us_min": min(cpu),
        "cpu_us_max": max(cpu),
        "wall_us": statistics.median(wall),
        "samples": len(samples),
        "iterations": samples[0]["iterations"],
    }
    extra = samples[0].keys() - {"cpu_us", "wall_us", "iterations"}
    for key in sorted(key for key in extra if isinstance(samples[0][key], int | float)):
        found[key] = statistics.median(s[key] for s in samples)
    for key in [key for key in samples[0] if key.endswith("latencies_us")]:
        name = key.removesuffix("latencies_us")
        pooled = sorted(value for s in samples for value in s[key])
        found[f"{name}p50_us"] = pooled[len(pooled) // 2]
        found[f"{name}p99_us"] = pooled[min(len(pooled) - 1, len(pooled) * 99 // 100)]
        found[f"{name}calls"] = len(pooled)
    return found


def ratios(rows: Sequence[Mapping[str, Any]], ours: str, peer: str) -> list[dict[str, Any]]:
    """For each case that both took: the peer's CPU time over ours (above 1: we are faster)."""
    cpu = {(r["case"], r["contender"]): r["cpu_us"] for r in rows if "cpu_us" in r}
    return [
        {"case": case, "ours_us": mine, "peer_us": cpu[case, peer], "peer_over_ours": cpu[case, peer] / mine}
        for (case, label), mine in cpu.items()
        if label == ours and (case, peer) in cpu
    ]


def run(main: Callable[[], None]) -> None:
    """Call a script's ``main``; what it cannot do becomes one line and exit status 1."""
    try:
        main()
    except BenchError as error:
        sys.exit(f"bench: {error}")


# --- stamping and writing


def git_stamp() -> dict[str, Any]:
    """The commit and whether the tree differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(BENCH), *arguments], capture_output=True, text=True, check=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", "-q", "HEAD")
    # Results are written by the very run that is stamped: they do not make the tree dirty.
    dirty = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
    return {"commit": commit or None, "dirty": bool(dirty) if dirty is not None else None}


def machine() -> dict[str, Any]:
    """Processor, cores, kernel and memory."""
    model = next((v for k, v in _colon_lines("/proc/cpuinfo") if k == "model name"), platform.processor())
    memory = next((v for k, v in _colon_lines("/proc/meminfo") if k == "MemTotal"), "0 kB")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _colon_lines(path: str) -> list[tuple[str, str]]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    return [(a.strip(), b.strip()) for a, _, b in (line.partition(":") for line in lines)]


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions of the packages, and of Python."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(name: str, results: Mapping[str, Any], packages: Sequence[str] = ()) -> Path:
    """Write ``bench/results/<name>.json`` with the stamp; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    stamped = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_stamp(),
        "machine": machine(),
        "versions": package_versions(packages),
        **results,
    }
    path.write_text(json.dumps(stamped, indent=2) + "\n")
    print(f"written: {path.relative_to(BENCH.parent)}", file=sys.stderr)
    return path


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row: case, contender, CPU and wall microseconds."""
    for row in rows:
        if "error" in row:
            print(f"{row['case']:<28} {row['contender']:<20} failed: {row['error']}")
            continue
        spread = f"{row['cpu_us_min']:.1f}..{row['cpu_us_max']:.1f}"
        print(
            f"{row['case']:<28} {row['contender']:<20} {row['cpu_us']:>12.1f} us cpu  ({spread})"
            f"  {row['wall_us']:>12.1f} us wall  x{row['iterations']}"
            + (f"  p50 {row['p50_us']:.0f} p99 {row['p99_us']:.0f} us" if "p50_us" in row else ""),
            flush=True,
        )


def print_ratios(found: Sequence[Mapping[str, Any]]) -> None:
    """The table of ``ratios``."""
    if not found:
        return
    print(f"\n{'case':<28} {'ours us':>10} {'peer us':>10} {'peer/ours':>10}")
    for row in found:
        print(
            f"{row['case']:<28} {row['ours_us']:>10.1f} {row['peer_us']:>10.1f} {row['peer_over_ours']:>10.2f}"
        )
