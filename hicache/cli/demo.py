"""``hicache demo``: a real sidecar at work, driven by client processes, every byte that is read verified."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hicache.cli import crew, link, probes, report, serve, sidecar, terminal, units
from hicache.cli.crew import Job
from hicache.cli.drive import Tally
from hicache.cli.stats import plain
from hicache.cli.workload import WorkloadSpec, turns
from hicache.errors import ConfigError, HicacheError
from hicache.policy import POLICIES, make_policy

if TYPE_CHECKING:
    from rich.console import Console

    from hicache.rpc.client.results import CheckResult, Stats

EPILOG = """\
examples:
  hicache demo                            under two minutes; with torch installed it has a device tier, too
  hicache demo --turns 50 --json          shorter, for scripts
  hicache demo --policy sieve --host-bytes 64MiB

What happens: `hicache serve` is started in a temporary folder with small tiers. Client processes hold chats
of many turns with it: shared system prompts, growing conversations, old ones revisited, answers
regenerated. Each turn is looked up, read and stored. Page contents are made from the tokens they stand for,
so that every byte read can be checked. The tiers are too small for all of it, so that pages move from
device to host to disk and back; at the end every conversation is read once more. Then the sidecar is asked
to check itself, and everything is removed.

exit codes: 0 all right; 1 a wrong byte, or a violated invariant; 2 bad usage; 3 the sidecar did not start or refused.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = (
        "Start a sidecar, drive it from other processes, verify every byte, leave nothing behind."
    )
    parser.epilog = EPILOG
    whole, size = (_whole_number, "N"), (str, "SIZE")
    for flag, (kind, metavar), default, what in (
        ("--turns", whole, 160, "turns of each client process"),
        ("--clients", whole, 2, "client processes"),
        ("--seed", whole, 1, "seed of the workload"),
        ("--page-tokens", whole, 64, "tokens in a page"),
        ("--page-bytes", size, "128KiB", "bytes in a page"),
        ("--device", (str, "NAME"), "auto", "device tier: cpu, none, or auto: cpu where torch is installed"),
        ("--device-bytes", size, "48MiB", "capacity of the device tier"),
        ("--host-bytes", size, "128MiB", "capacity of the host tier"),
        ("--disk-bytes", size, "1GiB", "capacity of the disk tier"),
        ("--policy", (str, "NAME"), "adaptive", f"eviction policy: {', '.join(sorted(POLICIES))}"),
    ):
        parser.add_argument(
            flag, type=kind, default=default, metavar=metavar, help=f"{what}; default {default}"
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found."""

    tally: Tally
    stats: Stats
    check: CheckResult
    took_ms: int
    ready_line: str

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "right": not report.verdict(self.tally, self.check),
            "problems": report.verdict(self.tally, self.check),
            "client": self.tally.as_json(),
            "sidecar": plain(self.stats),
            "check": plain(self.check),
            "took_s": self.took_ms / 1000,
        }


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print what it found."""
    console = terminal.console(stderr=arguments.json)
    outcome = _demo(arguments, console)
    if arguments.json:
        print(json.dumps(outcome.as_json(), indent=2))
    else:
        console.print()
        report.print_report(console, outcome.tally, outcome.stats, outcome.check)
        console.print(
            f"{report.verdict_line(outcome.tally, outcome.check)}, in {outcome.took_ms / 1000:.0f} s"
        )
    return 1 if report.verdict(outcome.tally, outcome.check) else 0


def _demo(arguments: argparse.Namespace, console: Console) -> Outcome:
    from hicache.runtime.clock import Clock

    clock = Clock()
    began_ms = clock.now_ms()
    with sidecar.temporary(_flags(arguments), disk_bytes=arguments.disk_bytes) as own:
        console.print(f"[dim]{own.ready_line}[/] (pid {own.pid})", soft_wrap=True)
        jobs = [_job(arguments, own.target, worker) for worker in range(arguments.clients)]
        with _progress(console, jobs) as on_step:
            tally = crew.run(jobs, on_step)
        with link.open_client(own.target, "demo") as client:
            found, check = client.admin.stats(), client.admin.check()
        code = own.stop()
        if code:
            raise HicacheError(f"the sidecar ended with {code}; its log ends with:\n{own.log_tail()}")
    return Outcome(tally, found, check, clock.now_ms() - began_ms, own.ready_line)


def _flags(arguments: argparse.Namespace) -> list[str]:
    """Flags of the sidecar. Raises ConfigError naming the flag of the demo that is wrong."""
    for name in ("page_bytes", "device_bytes", "host_bytes", "disk_bytes"):
        try:
            units.parse_size(getattr(arguments, name))
        except ConfigError as error:
            raise ConfigError(f"--{name.replace('_', '-')}: {error.message}", hint=error.hint) from None
    if not arguments.policy.startswith("py:"):  # those are looked for where the sidecar is
        serve.check_name("--policy", make_policy, arguments.policy)
    flags = ["--host-bytes", arguments.host_bytes, "--policy", arguments.policy]
    device = arguments.device
    if device == "auto":
        device = "cpu" if probes.has_module("torch") else "none"
    if device != "none":
        flags += ["--device", device, "--device-bytes", arguments.device_bytes]
    return flags


def _job(arguments: argparse.Namespace, target: str, worker: int) -> Job:
    return Job(
        target=target,
        workload=WorkloadSpec(seed=arguments.seed, worker=worker, turns=arguments.turns),
        page_tokens=arguments.page_tokens,
        page_bytes=units.parse_size(arguments.page_bytes),
        salt=f"demo-{arguments.seed}",
        wait_ms=10_000,
    )


@contextlib.contextmanager
def _progress(console: Console, jobs: list[Job]) -> Iterator[Callable[[str], None]]:
    """A bar for each phase; gives the callback that moves them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    talks = sum(len({turn.talk for turn in turns(job.workload)}) for job in jobs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {
            "turns": progress.add_task(
                "turns: look up, verify, store", total=sum(j.workload.turns for j in jobs)
            ),
            "again": progress.add_task("all conversations read again", total=talks),
        }
        yield lambda phase: progress.advance(tasks[phase])
