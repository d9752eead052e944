"""LMCache's MP server on CPU: start time, idle memory, and look-up latency over ZMQ.

    python bench/peers/lmcache_server.py [--repetitions 9] [--cases lookup_hit_2k ...]

Starts the server of ``bench/.venvs/lmcache`` on a free loopback port, without its HTTP front, metrics and usage
reports, in the mode in which the engine hands pages over (the one that stores on a CPU). Stores a prompt of
131,072 tokens, measures hits and misses with one client, and ends the server by its pid.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness

START_TIMEOUT_S = 120.0
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Server:
    """A running server."""

    pid: int
    url: str
    start_s: float

    def memory_mib(self) -> dict[str, float]:
        """Resident memory, and the part of it that is the process's own (not file or shared pages)."""
        fields = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
            if ":" in line
        )
        return {
            name: round(int(fields[key].split()[0]) / 1024, 1)
            for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon"))
        }


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(l1_gib: float) -> Iterator[Server]:
    """The server, ready to answer; ended on the way out. Raises BenchError if it does not come up."""
    port = free_port()
    command = [str(harness.venv_python("lmcache")), "-m", "lmcache.v1.multiprocess.server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--supported-transfer-mode", "engine_driven"]
    command += ["--l1-size-gb", str(l1_gib), "--eviction-policy", "LRU", "--disable-observability"]
    env = {
        **os.environ,
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_LOG_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        child = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=env)
        try:
            wait_for_port(child, port, begin)
            yield Server(child.pid, f"tcp://127.0.0.1:{port}", round(time.monotonic() - begin, 2))
        except harness.BenchError:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(timeout=15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def wait_for_port(child: subprocess.Popen[bytes], port: int, begin: float) -> None:
    """Return when the port takes connections."""
    while time.monotonic() - begin < START_TIMEOUT_S:
        if child.poll() is not None:
            raise harness.BenchError(f"the server ended with {child.returncode}")
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise harness.BenchError(f"the server did not listen within {START_TIMEOUT_S} s")


def main() -> None:
    """Measure and write ``bench/results/peer-lmcache.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9, help="samples a case, at least 7 (default 9)")
    parser.add_argument("--cases", nargs="*", default=[], help="only these cases")
    parser.add_argument("--starts", type=int, default=3, help="how often to start the server (default 3)")
    parser.add_argument("--l1-gib", type=float, default=0.0625, help="size of the RAM tier (default 1/16)")
    options = parser.parse_args()
    starts = []
    for _ in range(options.starts - 1):
        with running(options.l1_gib) as server:
            starts.append(server.start_s)
    with running(options.l1_gib) as server:
        starts.append(server.start_s)
        time.sleep(2)  # idle is after the dust has settled
        idle = server.memory_mib()
        print(f"start {sorted(starts)} s, idle {idle} MiB", flush=True)
        spec = {"url": server.url, "server_pid": server.pid, "seed": 2026}
        command = [str(harness.venv_python("lmcache")), str(HERE / "lmcache_client.py")]
        with harness.Process(command, spec) as client:
            rows = harness.compare([client], options.cases, options.repetitions)
            info = client.info
        after = server.memory_mib()
    harness.write(
        "peer-lmcache",
        {"contenders": [info], "start_s": starts, "idle_mib": idle, "after_mib": after, "rows": rows},
    )


if __name__ == "__main__":
    harness.run(main)
