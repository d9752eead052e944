"""The commands with a real sidecar process."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hicache import Client
from hicache.cli import crew, main
from hicache.cli.sidecar import Sidecar, temporary
from hicache.cli.workload import WorkloadSpec
from hicache.errors import HicacheError, UnavailableError

SMALL = ("--host-bytes", "8MiB", "--no-prefault")


@pytest.fixture(scope="module")
def running() -> Iterator[Sidecar]:
    with temporary(SMALL, disk_bytes="64MiB") as sidecar:
        yield sidecar


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_serve_says_when_it_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, SMALL)
    with sidecar:
        pid = sidecar.pid
        assert f"SERVING on unix:{sidecar.socket_path} with host 8.00 MiB" in sidecar.ready_line
        assert sidecar.socket_path.stat().st_mode & 0o777 == 0o600
    assert gone(pid)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"log", "hicache.sock.lock"}
    log = sidecar.log_path.read_text()
    assert "SIGTERM: draining" in log
    assert all(line.startswith("time=") for line in log.splitlines())
    assert "level=error" not in log


def test_serve_drains_when_its_parent_is_gone(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, SMALL).start()
    child = sidecar._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(20) == 0
    sidecar.kill()


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, (*SMALL, "--grace", "60s")).start()
    child = sidecar._child
    assert child is not None
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 0
    sidecar.kill()


def test_a_sidecar_that_cannot_start_says_why(tmp_path: Path, running: Sidecar) -> None:
    with pytest.raises(UnavailableError, match=r"(?s)ended before it served.*--disk-bytes"):
        Sidecar(tmp_path, ("--disk-path", str(tmp_path / "disk"))).start()
    words = [sys.executable, "-m", "hicache", "serve", "--socket-path", str(running.socket_path), *SMALL]
    second = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == main.EXIT_USAGE
    assert f"pid {running.pid}" in second.stderr
    assert "Traceback" not in second.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_metrics_are_served_on_their_port(tmp_path: Path) -> None:
    port = free_port()
    with Sidecar(tmp_path, (*SMALL, "--metrics-port", str(port))):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert 'hicache_tier_capacity_bytes{tier="host"} 8.388608e+06' in text
        (tmp_path / "other").mkdir()
        with pytest.raises(UnavailableError, match=rf"--metrics-port: cannot listen on 127\.0\.0\.1:{port}"):
            Sidecar(tmp_path / "other", (*SMALL, "--metrics-port", str(port))).start()


def test_the_readme_example_works(running: Sidecar) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    program = readme.partition("```python\n")[2].partition("```")[0]
    program = program.replace("unix:///run/user/1000/hicache.sock", running.target)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_stats_tree_and_admin(running: Sidecar, capsys: pytest.CaptureFixture[str]) -> None:
    target = ("--target", running.target)
    assert main.main(["stats", "--once", *target]) == 0
    assert "host" in capsys.readouterr().out
    assert main.main(["stats", "--json", *target]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [tier["name"] for tier in found["tiers"]] == ["host", "disk"]
    assert main.main(["tree", *target]) == 0
    assert main.main(["tree", "--json", *target]) == 0
    assert main.main(["admin", "clear", *target]) == 0
    capsys.readouterr()
    assert main.main(["admin", "check", "--json", *target]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize("extra_key_bytes", [0, 16], ids=["tokens", "extra-keys"])
def test_admin_pins_and_evicts_a_prefix(
    running: Sidecar, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra_key_bytes: int
) -> None:
    fields = {"model": "pins", "page_tokens": 4, "page_bytes": 4096, "extra_key_bytes": extra_key_bytes}

    def say(*words: str) -> tuple[int, dict[str, int]]:
        code = main.main(["admin", *words, "--json", "--target", running.target])
        return code, json.loads(capsys.readouterr().out)

    file = tmp_path / "ids"
    file.write_text("[1, 2, 3, 4,\n 5 6 7 8, 9]\n", encoding="utf-8")
    with Client(running.target) as client:
        namespace = client.namespace(**fields)
        keys = {"extra_keys": [b"", b""]} if extra_key_bytes else {}
        with namespace.reserve(list(range(1, 9)), **keys) as reservation:
            for page in range(2):
                reservation.write(page, bytes(4096))
            reservation.commit()
        name = ("--namespace", namespace.fingerprint.hex()[:16], "--tokens", f"@{file}")
    code, pinned = say("pin", *name, "--tier", "host", "--ttl", "1h")
    assert (code, pinned["pages"]) == (0, 2)
    assert say("evict", *name, "--tier", "host")[1] == {"pages": 0, "kept_pages": 2}
    assert say("unpin", str(pinned["pin"])) == (0, {"pin": pinned["pin"]})
    whole = ("--namespace", json.dumps(fields), "--tokens", "1,2,3,4")
    assert say("evict", *whole) == (0, {"pages": 2, "kept_pages": 0})
    assert say("pin", *whole) == (1, {"pin": 0, "pages": 0})
    gone = main.main(["admin", "pin", *name, "--target", running.target])
    assert (gone, "holds pages" in capsys.readouterr().err) == (main.EXIT_REFUSED, True)


def test_admin_names_block_hashes(running: Sidecar, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"model": "h", "page_bytes": 4096, "symbol_kind": "hashes", "symbol_hash_bytes": 16}
    with Client(running.target) as client, client.namespace(**fields).reserve([b"a" * 16]) as reservation:
        reservation.write(0, bytes(4096))
        reservation.commit()
    words = ["admin", "evict", "--namespace", json.dumps(fields), "--target", running.target]
    assert main.main([*words, "--tokens", (b"a" * 16).hex()]) == 0
    assert "moved 1 pages out of all tiers" in capsys.readouterr().out
    assert main.main([*words, "--tokens", "no-hex"]) == main.EXIT_USAGE
    assert "--tokens: " in capsys.readouterr().err


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """60 requests of 6 talks that grow by two blocks at a time, below one shared block."""
    path = tmp_path / "trace.jsonl"
    talks: dict[int, list[int]] = {}
    with path.open("w", encoding="utf-8") as file:
        for turn in range(60):
            talk = talks.setdefault(turn * 7 % 6, [0])
            talk += [1000 + turn * 2, 1001 + turn * 2]
            file.write(json.dumps({"timestamp": turn, "hash_ids": talk}) + "\n")
    return path


def test_replay_hits_what_the_trace_promises(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "replay",
        "--trace",
        str(trace),
        "--host-bytes",
        "256KiB",
        "--disk-bytes",
        "64MiB",
        "--json",
        "-",
    ]
    assert main.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["right"] is True
    assert found["client"]["wrong_bytes"] == found["client"]["refused"] == 0
    assert found["client"]["granted"] == found["facts"]["hit_blocks"] > 0
    assert found["hit_ratio"] == found["facts"]["bound"]
    assert found["client"]["stored"] == found["facts"]["unique_blocks"]
    assert found["client"]["verified_bytes"] == found["facts"]["hit_blocks"] * 4096


def test_replay_drives_a_running_sidecar(
    running: Sidecar, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    words = ["replay", "--trace", str(trace), "--target", running.target, "--limit", "10"]
    assert main.main([*words, "--json", str(result)]) == 0
    shown = capsys.readouterr().out
    assert "hit ratio" in shown
    assert "0 wrong bytes" in shown
    assert json.loads(result.read_text())["facts"]["requests"] == 10
    assert main.main([*words, "--host-bytes", "1GiB"]) == main.EXIT_USAGE
    assert "--host-bytes: tiers belong to the sidecar" in capsys.readouterr().err


def test_admin_drain_ends_the_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar = Sidecar(tmp_path, SMALL).start()
    assert main.main(["admin", "drain", "--grace", "5s", "--target", sidecar.target]) == 0
    child = sidecar._child
    assert child is not None
    assert child.wait(10) == 0
    assert "drains" in capsys.readouterr().out
    sidecar.kill()


def test_a_client_process_that_fails_is_told_and_none_is_left(running: Sidecar) -> None:
    jobs = [
        crew.Job(running.target, WorkloadSpec(worker=worker, turns=3), 64, page_bytes, "crew", 1000)
        for worker, page_bytes in enumerate((4096, 64 << 20))
    ]
    with pytest.raises(HicacheError, match=r"a client process failed: .*page"):
        crew.run(jobs, lambda _: None)
    assert not multiprocessing.active_children()


def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hicache", "demo", "--device", "none", "--turns", "2000"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - no other thread runs here
    )
    assert demo.stdout is not None
    line = demo.stdout.readline()
    assert "SERVING" in line
    time.sleep(1.5)
    os.killpg(demo.pid, signal.SIGINT)
    _, errors = demo.communicate(timeout=30)
    assert demo.returncode == main.EXIT_INTERRUPTED
    assert errors.endswith("hicache: interrupted\n")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    assert gone(int(line.rpartition("pid ")[2].strip(" )\n")))


def heed_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_demo_in_small(tmp_path: Path) -> None:
    device = importlib.util.find_spec("torch") is not None
    sizes = [
        "--page-bytes",
        "4KiB",
        "--device-bytes",
        "1MiB",
        "--host-bytes",
        "1MiB",
        "--disk-bytes",
        "64MiB",
    ]
    words = [sys.executable, "-m", "hicache", "demo", "--json", "--turns", "32", *sizes]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=90, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["right"] is True
    assert found["client"]["wrong_bytes"] == found["client"]["refused"] == 0
    assert found["client"]["verified_bytes"] > 0
    tiers = {tier["name"]: tier for tier in found["sidecar"]["tiers"]}
    assert list(tiers) == (["device"] if device else []) + ["host", "disk"]
    assert all(tier["bytes_in"] > 0 for tier in tiers.values())
    assert found["client"]["hits"]["disk"] > 0, "pages came back from disk"
    assert list(tmp_path.iterdir()) == []
