"""The recorded conversation trace through a sidecar, every byte verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl.zst"

pytestmark = pytest.mark.skipif(not TRACE.exists(), reason=f"the trace {TRACE} is not here")


def replay(folder: Path, *flags: str, timeout_s: float) -> dict[str, Any]:
    out = folder / "result.json"
    words = [sys.executable, "-m", "hicache", "replay", "--trace", str(TRACE), "--json", str(out), *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["right"] is True
    assert found["check"]["ok"] is True
    client = found["client"]
    assert client["wrong_bytes"] == client["refused"] == client["corrupt_reads"] == 0
    assert client["verified_bytes"] == client["granted"] * 4096
    assert client["granted"] + client["short"] <= found["facts"]["hit_blocks"]
    return found


@pytest.mark.parametrize("device", [(), ("--device", "cpu", "--device-bytes", "4MiB")], ids=["", "device"])
def test_a_part_of_the_trace_through_tiers_that_are_too_small(
    tmp_path: Path, device: tuple[str, ...]
) -> None:
    if device:
        pytest.importorskip("torch", reason="the device tier needs torch")
    found = replay(
        tmp_path,
        *("--limit", "400", "--host-bytes", "4MiB", "--disk-bytes", "16MiB", *device),
        timeout_s=100,
    )
    tiers = {tier["name"]: tier for tier in found["sidecar"]["tiers"]}
    assert all(tier["evicted_pages"] + tier["dropped_pages"] > 0 for tier in tiers.values()), "pages moved on"
    assert all(tier["used_bytes"] <= tier["capacity_bytes"] for tier in tiers.values())
    assert 0 < found["hit_ratio"] < found["facts"]["bound"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_whole_trace_hits_what_its_own_structure_promises(tmp_path: Path) -> None:
    found = replay(tmp_path, timeout_s=380)
    facts, client = found["facts"], found["client"]
    assert (facts["requests"], facts["bound"]) == (12_031, found["hit_ratio"])
    assert abs(found["hit_ratio"] - 0.3664) < 0.00005
    assert client["granted"] == facts["hit_blocks"]
    assert client["stored"] == facts["unique_blocks"]
    assert client["short"] == 0
    assert sum(client["hits"].values()) == client["granted"]
    dropped = {tier["name"]: tier["dropped_pages"] for tier in found["sidecar"]["tiers"]}
    assert not any(dropped.values()), "nothing left the last tier"
    print(f"{facts['requests']} requests in {found['took_s']} s, hits by tier {found['hit_ratio_by_tier']}")
