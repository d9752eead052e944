"""What a start needs, and what it refuses: in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PRELUDE = f"""
import asyncio, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]
"""
HOST_ONLY = """
from runtime_helpers import TestClient, running
from hicache.runtime import ServiceOptions
async def main():
    async with running(ServiceOptions(host_bytes=1 << 20)) as service:
        client = TestClient(service)
        await client.store(5)
        assert await client.read(await client.fetch(5)) == 5
asyncio.run(main())
print("served", sorted({"torch", "lmdb", "zstandard", "grpc", "prometheus_client"} & sys.modules.keys()))
"""


def python(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", PRELUDE + script],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=HERE,
    )


def test_a_host_only_service_needs_neither_torch_nor_lmdb() -> None:
    done = python(HOST_ONLY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "served []\n"


def test_a_disk_without_lmdb_is_refused_and_says_so(tmp_path: Path) -> None:
    script = f"""
sys.modules["lmdb"] = None
from hicache.errors import ConfigError
from hicache.runtime import Service, ServiceOptions
async def main():
    try:
        await Service(ServiceOptions(disk_path={str(tmp_path / "disk")!r}, disk_bytes=1 << 24)).start()
    except ConfigError as error:
        print(error)
asyncio.run(main())
"""
    done = python(script)
    assert "--disk-path" in done.stdout, done.stderr
    assert "lmdb" in done.stdout


def test_without_asserts_nothing_is_served() -> None:
    done = python(HOST_ONLY, "-O")
    assert done.returncode != 0
    assert "python -O" in done.stderr
