"""A second sidecar on the same socket or the same folder is refused, and the first is unharmed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_actor import Actor
from e2e_kit import assert_idle, free_port, serving, tiers

USAGE = 2


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    """A sidecar that is expected to refuse."""
    command = [sys.executable, "-m", "hicache", "serve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("shared", ["socket", "disk", "tcp"])
def test_what_one_sidecar_has_another_cannot_take(tmp_path: Path, shared: str) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("red 0123456789abcdef\n")
    tokens.chmod(0o600)
    port = free_port()
    tcp = ("--tcp-address", f"127.0.0.1:{port}", "--allow-plain-tcp", "--token-file", str(tokens))
    with (
        serving(tmp_path, *tiers(tmp_path, "8MiB", "32MiB"), *tcp) as sidecar,
        Actor(sidecar.target) as actor,
    ):
        actor.store(0, 8, durable=True)
        files = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
        flags = {
            "socket": ["--socket-path", str(sidecar.socket_path), "--host-bytes", "8MiB"],
            "disk": [
                *("--socket-path", str(tmp_path / "other.sock")),
                *tiers(tmp_path, "8MiB", "32MiB"),
            ],
            "tcp": ["--socket-path", str(tmp_path / "other.sock"), "--host-bytes", "8MiB", *tcp],
        }[shared]
        second = start(*flags)
        assert second.returncode == USAGE, second.stderr
        assert "Traceback" not in second.stderr
        flag = {"socket": "--socket-path", "disk": "--disk-path", "tcp": "--tcp-address"}[shared]
        said = second.stderr.splitlines()[-1]
        assert flag in said, f"the message names the flag: {said}"
        if shared != "tcp":
            assert str(sidecar.pid) in said, f"the message names the process that has it: {said}"
        assert not (tmp_path / "other.sock").exists()
        now = {path: path.stat().st_ino for path in tmp_path.rglob("*") if "other.sock" not in path.name}
        assert now == files
        assert actor.read(0, 8).wrong_bytes == 0
        with Actor(sidecar.target) as fresh:
            assert fresh.read(0, 8).granted == 8
            fresh.store(1, 8, durable=True)
        assert_idle(actor.client)
        assert sidecar.stop() == 0


def test_what_a_dead_sidecar_left_is_no_obstacle(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "8MiB", "32MiB")) as sidecar:
        with Actor(sidecar.target) as actor:
            actor.store(0, 8, durable=True)
        sidecar.kill()
        assert sidecar.socket_path.exists(), "a killed process removes nothing"
        sidecar.start()
        with Actor(sidecar.target) as actor:
            assert actor.read(0, 8).wrong_bytes == 0
        assert sidecar.stop() == 0


def test_a_path_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    refused = start("--socket-path", str(precious), "--host-bytes", "8MiB")
    assert refused.returncode == USAGE
    assert "--socket-path" in refused.stderr.splitlines()[-1]
    assert precious.read_text() == "mine"


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "thesis.tex").write_text("mine")
    refused = start("--socket-path", str(tmp_path / "s.sock"), *tiers(tmp_path, "8MiB", "32MiB"))
    assert refused.returncode == USAGE
    said = refused.stderr.splitlines()[-1]
    assert "--disk-path" in said, said
    assert "thesis.tex" in said
    assert os.listdir(tmp_path / "disk") == ["thesis.tex"]  # noqa: PTH208 - names, as they are


def test_a_foreign_listener_on_the_socket_is_not_robbed_of_its_lock(tmp_path: Path) -> None:
    """A stale lock file of a process that is gone does not count; a live lock does (see above)."""
    (tmp_path / "hicache.sock.lock").write_text("1\n")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "hicache.sock"))
    with (
        serving(tmp_path, "--host-bytes", "8MiB", "--no-prefault") as sidecar,
        Actor(sidecar.target) as actor,
    ):
        actor.store(0, 8)
        assert actor.read(0, 8).wrong_bytes == 0
