"""The owner thread of a whole service while 10,000 pages leave the device tier: demotion_burst, on the device."""

from __future__ import annotations

import argparse
import asyncio

import demotion_burst
from gpu_machine import Machine


def run(machine: Machine, report, options) -> None:
    """Bursts one after another; the device is opened as the sidecar opens it."""
    asked = argparse.Namespace(pages=500 if options.tiny else 10_000, page_bytes=4096, device=options.device)
    times, found = demotion_burst.Times(), []
    run_handle = asyncio.Handle._run
    asyncio.Handle._run = times.wrap("callback", run_handle)
    try:
        for _ in range(1 if options.tiny else min(3, options.repetitions)):
            found.append(asyncio.run(demotion_burst.burst(asked, times)))
    finally:
        asyncio.Handle._run = run_handle
    for step in demotion_burst.STEPS:
        report.row(
            "owner", step=step, wall=demotion_burst.percentiles(times.wall[step]),
            cpu=demotion_burst.percentiles(times.cpu[step]),
        )  # fmt: skip
    drained = min(burst["demoted_pages"] for burst in found)
    report.row("owner", bursts=found)
    report.bar("evictions of a burst that drained", drained, asked.pages)
    for step in ("submit", "turn"):
        longest = max(times.wall[step]) / 1e6
        report.bar(f"owner thread, longest {step}, ms", longest, 1.0, at_most=True)
