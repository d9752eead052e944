"""``hicache sim``: policies times capacities over a recorded trace, through the engine that serves."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hicache.cli import sim_compare, sim_outputs, terminal, units
from hicache.errors import ConfigError
from hicache.policy import POLICIES
from hicache.sim.hardware import HARDWARE
from hicache.sim.models import MODELS
from hicache.types import TierKind, WritePolicy

if TYPE_CHECKING:
    from rich.console import Console

    from hicache.sim.cell import Cell
    from hicache.sim.options import Capacity, Mode, Settings, Size
    from hicache.sim.packed import PackedTrace
    from hicache.sim.sweep import Result, Sweep

EPILOG = """\
examples:
  hicache sim --trace t.jsonl.zst                                    LRU at six capacities
  hicache sim --trace t.jsonl.zst --policy lru,sieve --capacity 1%,5%,40GiB
  hicache sim --trace t.jsonl.zst --capacity host:64GiB+disk:1TiB --mode trace --model llama-3-70b-tp4
  hicache sim --trace t.jsonl.zst --mode poisson:2 --seeds 5         twice the load, at random, five times
  hicache sim compare a.json b.json                                  two results, paired

A capacity is a share of the trace's different blocks (5%), pages (2000p) or a size (40GiB), for one tier in RAM; or
tiers joined by +, fastest first: device:8GiB+host:40GiB+disk:1TiB. A mode is instant (nothing takes time: pure hit
ratios), trace (as recorded), scaled:2 (twice as fast), poisson, poisson:2, or back-to-back.
The folder --out receives results.jsonl (which makes a stopped sweep go on), results.json, results.csv, one
cell-*.json a cell for `compare`, and report.html. exit codes: 0 all cells done; 1 a cell failed; 2 bad settings.
"""

CAPACITIES = "1%,2%,5%,10%,25%,50%"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Replay a trace under many policies and capacities, and say what each is worth."
    parser.epilog = EPILOG
    parser.add_argument(
        "words", nargs="*", metavar="compare A B", help="compare two results instead of replaying"
    )
    add = parser.add_argument
    add("--trace", metavar="FILE", default="", help="a recorded trace, compressed or not")
    add("--format", default="auto", help="its format; default: found out by looking")
    add("--block-tokens", metavar="N", default="0", help="tokens of a block; default: what the format says")
    add("--strict", action="store_true", help="stop at the first bad line instead of counting it")
    add("--limit", metavar="N", default="0", help="only the first N requests; default 0: all")
    policies = ", ".join(sorted(POLICIES))
    add("--policy", metavar="NAMES", default="lru", help=f"comma-separated, of {policies}; default lru. Parameters "
        "follow a colon, joined by ';': slru:protected=0.8. '{seed}' becomes the seed: random:seed={seed}")  # fmt: skip
    shares = CAPACITIES.replace("%", "%%")
    add("--capacity", metavar="SIZES", default=CAPACITIES, help=f"comma-separated; default {shares}")
    add(
        "--mode",
        metavar="MODES",
        default="instant",
        help="how requests come, comma-separated; default instant",
    )
    add(
        "--seeds", metavar="N", default="1", help="repeat what depends on chance with seeds 1 to N; default 1"
    )
    add(
        "--baseline",
        metavar="NAME",
        default="",
        help="compare with this policy; default: lru, else the first",
    )
    _configure_machine(parser)
    add("--jobs", metavar="N", default="0", help="processes; default 0: one a core")
    add("--out", metavar="FOLDER", default="hicache-sim", help="where results go; default ./hicache-sim")
    add(
        "--no-oracle",
        action="store_true",
        help="leave out the offline optimum, which takes a while on long traces",
    )
    add(
        "--json",
        action="store_true",
        help="print the results as JSON; what is for people goes to standard error",
    )
    add("--parquet", action="store_true", help="also write results.parquet (needs pyarrow)")


def _configure_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models, machines = ", ".join(MODELS), ", ".join(HARDWARE)
    add("--model", default="llama-3-8b", help=f"the KV's size, and prefill: {models}; default llama-3-8b")
    add(
        "--hardware", default="h100-pcie5-nvme", help=f"links, disk, GPU: {machines}; default h100-pcie5-nvme"
    )
    add(
        "--constants",
        metavar="FILE",
        default="",
        help="a bench result whose measurements replace the preset's",
    )
    add("--write-policy", default="write-through-selective", choices=[each.value for each in WritePolicy],
        help="when a page is copied to the tier below; default write-through-selective")  # fmt: skip
    add("--selective-hits", metavar="N", default="2", help="the use at which it is, if selective; default 2")
    add("--admission", metavar="NAME", default="", help="what is worth writing to lower tiers; default: all")
    add("--warmup", metavar="SHARE", default="0%", help="first requests that are not counted; default 0%%")
    add("--wait", metavar="TIME", default="10s", help="longest wait for pages of lower tiers; default 10s")
    add("--running", metavar="N", default="64", help="requests a replica works on at once; default 64")
    add("--replicas", metavar="N", default="1", help="copies of the model; default 1")
    add(
        "--stored-ratio",
        metavar="X",
        default="1.0",
        help="how many times smaller pages are on disk; default 1.0",
    )
    add("--gpu-usd", metavar="X", default="", help="price of a GPU hour; default: the hardware's")
    add("--ram-usd", metavar="X", default="", help="price of a GiB of RAM for an hour; default: a list price")
    add(
        "--disk-usd",
        metavar="X",
        default="",
        help="price of a GiB of disk for an hour; default: a list price",
    )


def run(arguments: argparse.Namespace) -> int:
    """Sweep and report, or compare."""
    console = terminal.console(stderr=arguments.json)
    if arguments.words:
        return sim_compare.run(arguments.words, console, as_json=arguments.json)
    if not arguments.trace:
        raise ConfigError("--trace is missing", hint="name a recorded trace; see `hicache sim --help`")
    if arguments.parquet:
        sim_outputs.require_parquet()
    settings = _settings(arguments)
    cells = _cells(arguments)
    with _packed(arguments, console) as trace:
        facts = trace.facts
        for cell in cells:  # refused before anything is run
            cell.capacity.specs(facts.unique_blocks, settings.page_bytes(facts.block_tokens))
        sweep, results = _sweep(arguments, (settings, trace), cells, console)
        if results:
            _report(arguments, (settings, trace), results, console)
        if arguments.json:
            print(json.dumps(results, indent=1))
        for cell, problem in sweep.failures:
            console.print(
                f"[red]failed[/]: {cell.policy} at {cell.capacity.label}: {problem.splitlines()[0]}",
                soft_wrap=True,
            )
    return 1 if sweep.failures else 0


# --- settings


def _settings(arguments: argparse.Namespace) -> Settings:
    from hicache.sim.hardware import find_hardware, with_constants
    from hicache.sim.models import find_model
    from hicache.sim.options import Settings

    hardware = find_hardware(arguments.hardware)
    if arguments.constants:
        path = Path(arguments.constants)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else f"it is no JSON ({error})"
            raise ConfigError(f"--constants: cannot read {path}: {why}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"--constants: {path} is not a bench result")
        hardware = with_constants(hardware, found, path.name)
    return Settings(
        model=find_model(arguments.model),
        hardware=hardware,
        write_policy=WritePolicy(arguments.write_policy),
        selective_hits=_whole(arguments.selective_hits, "--selective-hits"),
        admission=arguments.admission,
        warmup=_share(arguments.warmup, "--warmup"),
        wait_ms=units.parse_duration_ms(arguments.wait),
        running=_whole(arguments.running, "--running"),
        replicas=_whole(arguments.replicas, "--replicas"),
        stored_ratio=_number(arguments.stored_ratio, "--stored-ratio"),
    )


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """Every combination, seeds only where they make a difference. Raises ConfigError before anything is run."""
    from hicache.engine import EngineOptions
    from hicache.sim.cell import EVERYTHING, SEED_WORD, Cell
    from hicache.types import TierSpec

    seeds = range(1, _whole(arguments.seeds, "--seeds") + 1)
    policies = [_policy(name) for name in _words(arguments.policy, "--policy")]
    capacities = [parse_capacity(word) for word in _words(arguments.capacity, "--capacity")]
    modes = [parse_mode(word) for word in _words(arguments.mode, "--mode")]
    probe = TierSpec("host", TierKind.HOST, 4096, 4096)
    for policy in policies:
        EngineOptions(
            (probe,), policy=policy.replace(SEED_WORD, "1"), admission=arguments.admission or EVERYTHING
        )
    cells = []
    for capacity, mode, policy in itertools.product(capacities, modes, policies):
        each = [Cell(policy, capacity, mode, seed) for seed in seeds]
        cells += each if each[0].seeded else each[:1]
    return cells


def _policy(word: str) -> str:
    return word.replace(";", ",")


def _words(text: str, flag: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ConfigError(f"{flag} names nothing")
    return words


def parse_capacity(text: str) -> Capacity:
    """``5%``, ``2000p``, ``40GiB``, or tiers joined by ``+``. Raises ConfigError."""
    from hicache.sim.options import Capacity

    return Capacity(text, tuple(_size(part, text) for part in text.split("+")))


def _size(part: str, whole: str) -> Size:
    from hicache.sim.options import Size, Unit

    name, colon, amount = part.rpartition(":")
    kinds = {kind.value: kind for kind in TierKind}
    if colon and name not in kinds:
        raise ConfigError(f"--capacity: no tier {name!r} in {whole!r}", hint=f"one of {', '.join(kinds)}")
    kind = kinds[name] if colon else TierKind.HOST
    if amount.endswith("%"):
        return Size(kind, _share(amount, "--capacity", most=10.0), Unit.SHARE)
    if amount.endswith("p") and amount[:-1].isdecimal() and int(amount[:-1]):
        return Size(kind, int(amount[:-1]), Unit.PAGES)
    try:
        size_bytes = units.parse_size(amount)
    except ConfigError as error:
        raise ConfigError(f"--capacity: {error.message}", hint="write 5%, 2000p (pages) or 40GiB") from None
    if not size_bytes:
        raise ConfigError(f"--capacity: {whole!r} has a tier without room")
    return Size(kind, size_bytes, Unit.BYTES)


def parse_mode(text: str) -> Mode:
    """``instant``, ``trace``, ``scaled:2``, ``poisson``, ``back-to-back``. Raises ConfigError."""
    from hicache.sim.options import Arrivals, Mode

    name, colon, speed = text.partition(":")
    if name not in {each.value for each in Arrivals}:
        names = ", ".join(each.value for each in Arrivals)
        raise ConfigError(f"--mode: unknown mode {name!r}", hint=f"one of {names}")
    arrivals = Arrivals(name)
    if (arrivals is Arrivals.SCALED) != bool(colon) and arrivals is not Arrivals.POISSON:
        raise ConfigError(
            f"--mode: {text!r}: a speed goes with scaled (needed) and poisson", hint="for example scaled:2"
        )
    factor = _number(speed, "--mode") if colon else 1.0
    if factor <= 0:
        raise ConfigError(f"--mode: {text!r}: the speed must be more than 0")
    return Mode(arrivals, factor)


def _share(text: str, flag: str, *, most: float = 1.0) -> float:
    value = _number(text.removesuffix("%"), flag) / 100
    if not text.endswith("%") or not 0 <= value <= most:
        raise ConfigError(f"{flag}: {text!r} is not a share", hint="write for example 10%")
    if flag == "--capacity" and not value:
        raise ConfigError(f"{flag}: {text!r} is a tier without room")
    return value


def _number(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{flag}: {text!r} is not a number of 0 or more")
    return value


def _whole(text: str, flag: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{flag}: {text!r} is not a whole number")
    return int(text)


def _jobs(arguments: argparse.Namespace) -> int:
    return _whole(arguments.jobs, "--jobs") or os.cpu_count() or 1


# --- work


def _packed(arguments: argparse.Namespace, console: Console) -> PackedTrace:
    from hicache.sim.packed import pack
    from hicache.sim.traces import open_trace

    trace = open_trace(
        arguments.trace,
        format=arguments.format,
        strict=arguments.strict,
        block_tokens=_whole(arguments.block_tokens, "--block-tokens"),
    )
    limit = _whole(arguments.limit, "--limit")
    with console.status(f"reading {Path(arguments.trace).name}"):
        packed = pack(
            itertools.islice(trace, limit) if limit else trace,
            Path(arguments.out),
            name=Path(arguments.trace).name,
            sha256=trace.sha256() + (f"-first-{limit}" if limit else ""),
            block_tokens=trace.block_tokens,
            problems=lambda: trace.problems.total,
        )
    facts = packed.facts
    console.print(
        f"{facts.name}: {facts.requests:,} requests, {facts.blocks:,} blocks of {facts.block_tokens} tokens, "
        f"{facts.unique_blocks:,} of them different; an infinite cache hits {facts.bound:.4f}",
        soft_wrap=True,
    )
    if facts.problems:
        console.print(
            f"[yellow]{facts.problems:,} lines were left out[/]; --strict stops at the first", soft_wrap=True
        )
    return packed


def _sweep(
    arguments: argparse.Namespace,
    world: tuple[Settings, PackedTrace],
    cells: Sequence[Cell],
    console: Console,
) -> tuple[Sweep, list[Result]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hicache.runtime.clock import Clock
    from hicache.sim.sweep import Sweep

    sweep = Sweep(*world, Path(arguments.out), now_ns=Clock().now_ns)
    jobs = _jobs(arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("cells", total=len(cells))

        def done(cell: Cell, result: Result, *, new: bool) -> None:
            note = f"{cell.policy} at {cell.capacity.label}: {result['hit_ratio']:.4f}"
            progress.update(task, advance=1, description=note if new else "already there")

        results = sweep.run(cells, jobs=jobs, on_done=done)
    return sweep, results


def _report(
    arguments: argparse.Namespace,
    world: tuple[Settings, PackedTrace],
    results: list[Result],
    console: Console,
) -> None:
    from hicache.sim.summary import Prices

    settings, trace = world
    names = _words(arguments.policy, "--policy")
    baseline = arguments.baseline or ("lru" if "lru" in names else _policy(names[0]))
    hardware = settings.hardware
    hour = {
        flag: _number(getattr(arguments, flag), f"--{flag.replace('_', '-')}")
        if getattr(arguments, flag)
        else value
        for flag, value in (
            ("gpu_usd", hardware.gpu_usd_per_hour),
            ("ram_usd", hardware.ram_usd_per_gib_hour),
            ("disk_usd", hardware.disk_usd_per_gib_hour),
        )
    }
    prices = Prices(hour["gpu_usd"] * settings.model.gpus, hour["ram_usd"], hour["disk_usd"])
    command = shlex.join(["hicache", *sys.argv[1:]])
    ask = sim_outputs.Wish(
        Path(arguments.out),
        baseline,
        command,
        parquet=arguments.parquet,
        prices=prices,
        oracle=not arguments.no_oracle,
        jobs=_jobs(arguments),
    )
    sim_outputs.write(ask, settings, trace, results, console)
