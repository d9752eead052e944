"""A sidecar on a machine that has grpcio, protobuf, numpy and xxhash, and little else: `make gpu` starts it so."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from hicache.rpc.common import details

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = (
    "lmdb", "zstandard", "rich", "zmq", "msgspec", "grpc_health", "grpc_reflection", "google.rpc", "prometheus_client",
)  # fmt: skip
BARE = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in WITHOUT or name.split(".")[0] in WITHOUT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["hicache", *sys.argv[1:]]
runpy.run_module("hicache", run_name="__main__")
"""
CLIENT = """
import sys
import hicache
with hicache.Client(sys.argv[1]) as client:
    space = client.namespace(model="m", page_bytes=4096, page_tokens=4)
    space.store(list(range(8)), [bytes(4096)] * 2)
    print(len(space.fetch(list(range(8)))))
"""


def test_a_sidecar_serves_without_the_packages_of_what_is_not_used(tmp_path):
    socket, env = tmp_path / "s.sock", {**os.environ, "PYTHONPATH": str(ROOT)}
    source = f"WITHOUT = {WITHOUT!r}\n{textwrap.dedent(BARE)}"
    command = [sys.executable, "-c", source, "serve", "--until-eof", "--socket-path", str(socket)]
    with subprocess.Popen(
        [*command, "--host-bytes", "16MiB"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as sidecar:
        try:
            assert "SERVING" in sidecar.stdout.readline()
            done = subprocess.run(
                [sys.executable, "-c", CLIENT, f"unix:{socket}"],
                capture_output=True, text=True, env=env, check=False, timeout=30,
            )  # fmt: skip
            assert done.stdout.split()[:1] == ["2"], done.stdout + done.stderr
        finally:
            sidecar.kill()


def test_details_made_here_are_those_of_the_package():
    theirs, ours = (details.Status, details.ErrorInfo, details.RetryInfo), details.made()
    assert theirs[0] is not ours[0]

    def sent(status, info, retry):
        whole, reason, wait = status(code=8, message="full"), info(reason="R", domain="d"), retry()
        reason.metadata["hint"] = "wait"
        wait.retry_delay.FromMilliseconds(1500)
        for detail in (reason, wait):
            whole.details.add().Pack(detail)
        return whole.SerializeToString()

    assert sent(*theirs) == sent(*ours)
    found = ours[1]()
    assert ours[0].FromString(sent(*theirs)).details[0].Unpack(found)
    assert found.metadata["hint"] == "wait"
