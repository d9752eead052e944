"""``hicache doctor``: is this machine fit, and what to change. Judges the facts that ``probes`` gathers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from hicache.cli import config, doctor_engine, engine_probes, link, probes, stats, terminal, units
from hicache.cli.probes import Facts
from hicache.cli.settings import ServeConfig
from hicache.cli.verdicts import Check, Verdict
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from hicache.rpc.client.results import DeviceStats, Stats

EPILOG = """\
examples:
  hicache doctor
  hicache doctor --host-bytes 64GiB --disk-path /data/hicache --disk-bytes 500GiB    before `hicache serve`
  hicache doctor --config /etc/hicache.toml --json
  hicache doctor --target unix:///run/hicache/hicache.sock    a running sidecar's tiers as well
  hicache doctor --engine vllm --model /models/llama --target unix:///run/hicache.sock    with vLLM's interpreter
  hicache doctor --engine vllm --kv-transfer-config '{"kv_connector": ...}'    is this right, key by key?

exit codes: 0 nothing that stops hicache (there may be advice); 1 something must be changed first.
"""

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs", "lustre"})
_COLLAPSE_KERNEL = (6, 1)
_GB = 1 << 30


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Check this machine: memory, shared memory, disk, limits, GPU, installed packages."
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--config", metavar="FILE", help="judge for the sizes and paths in this TOML file")
    config.add_flags(
        parser, ServeConfig, only=("device", "device_bytes", "host_bytes", "disk_path", "disk_bytes")
    )
    link.add_flags(parser, without_target="none: the machine only; the usual socket with --engine")
    group = parser.add_argument_group("an engine beside it")
    group.add_argument(
        "--engine", choices=doctor_engine.ENGINES, help="check this engine, its settings, its sidecar"
    )
    group.add_argument("--model", metavar="DIR", default="", help="size pages and tiers for this config.json")
    group.add_argument(
        "--kv-dtype", metavar="TYPE", default="", help="of the KV cache, where it is not the model's"
    )
    group.add_argument(
        "--block-size", metavar="N", type=int, default=0, help="tokens of the engine's block or page"
    )
    group.add_argument(
        "--tensor-parallel-size", metavar="N", type=int, default=1, help="ranks that share a page"
    )
    group.add_argument(
        "--kv-transfer-config", metavar="JSON", default="", help="vLLM's setting, to be checked"
    )
    group.add_argument(
        "--hicache-storage-backend-extra-config", metavar="JSON", default="", help="SGLang's, to be checked"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 when something must be changed."""
    request = _request(arguments)
    settings = config.load_serve(arguments)
    facts = probes.gather(settings.disk_path)
    checks, paste = judge(facts, settings), ""
    target = link.load(arguments).target
    if request is not None:
        report = _examine(arguments, request, facts)
        checks, paste = checks + report.checks, report.command
    if target and (request is None or any(check.name == "shared memory" for check in checks)):
        with link.connect(arguments, "doctor") as client:
            checks += judge_sidecar(client.admin.stats())
    if arguments.json:
        entries = [dataclasses.asdict(check) | {"verdict": check.verdict.value} for check in checks]
        said = {"checks": entries, "fit": is_fit(checks)} | ({"command": paste} if paste else {})
        print(json.dumps(said, indent=2))
    else:
        _print_table(checks)
        if paste:
            print(f"\n{paste}")
    return 0 if is_fit(checks) else 1


def _request(arguments: argparse.Namespace) -> doctor_engine.Request | None:
    """What is asked about an engine. Raises ConfigError for flags that do not go with it."""
    engine = arguments.engine
    texts = {"vllm": arguments.kv_transfer_config, "sglang": arguments.hicache_storage_backend_extra_config}
    flags = {"vllm": "--kv-transfer-config", "sglang": "--hicache-storage-backend-extra-config"}
    for name, text in texts.items():
        if text and name != engine:
            raise ConfigError(f"{flags[name]} goes with --engine {name}")
    if engine is None:
        if arguments.model or arguments.kv_dtype:
            raise ConfigError("--model and --kv-dtype go with --engine")
        return None
    if arguments.block_size < 0 or arguments.tensor_parallel_size < 1:
        raise ConfigError("--block-size and --tensor-parallel-size are counts")
    return doctor_engine.Request(
        engine=engine,
        endpoint=link.load(arguments).target or f"unix://{config.default_socket_path()}",
        settings=texts.get(engine, ""),
        block_tokens=arguments.block_size,
        ranks=arguments.tensor_parallel_size,
    )


def _examine(
    arguments: argparse.Namespace, request: doctor_engine.Request, facts: Facts
) -> doctor_engine.Report:
    return doctor_engine.examine(
        request,
        engine_probes.gather(request.engine, facts.shm_bytes),
        lambda endpoint: link.open_client(endpoint, "doctor", link.load(arguments)),
        arguments.model,
        arguments.kv_dtype,
    )


def is_fit(checks: list[Check]) -> bool:
    """Whether nothing stops hicache."""
    return all(check.verdict is not Verdict.CHANGE for check in checks)


def judge(facts: Facts, settings: ServeConfig) -> list[Check]:
    """What the facts mean for a sidecar with these settings."""
    return [
        _system(facts),
        _interpreter(facts),
        _protobuf(facts),
        _sealing(facts),
        _memory(facts, settings),
        _shm(facts),
        _huge_pages(facts),
        _memlock(facts),
        _open_files(facts),
        *_disk(facts, settings),
        _lmdb(facts, settings),
        _torch(facts, settings),
    ]


def judge_sidecar(found: Stats) -> list[Check]:
    """How a running sidecar's tiers are, and whether one of them is still coming back."""
    checks = []
    for tier in found.tiers:
        name = f"tier {tier.name}"
        if tier.state != "ok":
            advice = "the sidecar tries it again by itself; see to its medium, and to the sidecar's log"
            checks.append(Check(name, Verdict.CHANGE, stats.ill(tier), advice))
        else:
            checks.append(Check(name, Verdict.FINE, f"ok, {tier.pages:,} pages"))
    checks += [_device_of_sidecar(device) for device in found.devices]
    progress = stats.recovery_line(found)
    if progress:
        checks.append(Check("recovery", Verdict.FINE, progress))
    return checks


def _device_of_sidecar(device: DeviceStats) -> Check:
    name = f"device {device.name}"
    if device.problem:
        advice = "the sidecar serves without it; see its log, then restart it"
        return Check(name, Verdict.CHANGE, stats.given_up(device), advice)
    direct, bounced = units.human_size(device.direct_bytes), units.human_size(device.bounced_bytes)
    copied = f"{direct} copied directly, {bounced} bounced"
    if device.bounced_bytes > device.direct_bytes:
        advice = "host memory was not registered in time, or cannot be: see the sidecar's log, and ulimit -l"
        return Check(name, Verdict.ADVICE, copied, advice)
    engines = sorted({choice.engine for choice in device.choices})
    return Check(name, Verdict.FINE, f"{copied}, by {', '.join(engines) or device.copy_engine}")


def _system(facts: Facts) -> Check:
    found = f"{facts.system} {facts.kernel[0]}.{facts.kernel[1]}, {facts.cpus} CPUs"
    if facts.system != "Linux" or facts.kernel < (5, 1):
        return Check(
            "system", Verdict.CHANGE, found, "hicache needs Linux 5.1 or later (F_SEAL_FUTURE_WRITE)"
        )
    if facts.cpus < 2:
        return Check(
            "system", Verdict.ADVICE, found, "copies and the event loop want a CPU each: give it 2 or more"
        )
    return Check("system", Verdict.FINE, found)


def _interpreter(facts: Facts) -> Check:
    version = tuple(int(part) for part in facts.python.split(".")[:2])
    if version < (3, 11):
        return Check("python", Verdict.CHANGE, facts.python, "hicache needs Python 3.11 or later")
    if facts.optimised:
        return Check(
            "python", Verdict.CHANGE, f"{facts.python} -O", "run without -O: the service needs its asserts"
        )
    return Check("python", Verdict.FINE, facts.python)


def _protobuf(facts: Facts) -> Check:
    names = ("grpcio", "protobuf")
    found = ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in names)
    if facts.protobuf.problem:
        advice = (
            f"the generated code does not load: {facts.protobuf.problem}; pip install 'protobuf>=5.29.3,<8'"
        )
        return Check("grpc", Verdict.CHANGE, found, advice)
    return Check("grpc", Verdict.FINE, f"{found}; generated code loads")


def _sealing(facts: Facts) -> Check:
    if facts.sealing_problem:
        advice = "the host tier needs sealed memfds: allow memfd_create and F_ADD_SEALS (seccomp profile?)"
        return Check("memfd", Verdict.CHANGE, facts.sealing_problem, advice)
    return Check("memfd", Verdict.FINE, "can be made and sealed")


def _memory(facts: Facts, settings: ServeConfig) -> Check:
    wanted = settings.host_bytes + (settings.device_bytes if settings.device == "cpu" else 0)
    available, total = map(units.human_size, (facts.memory_available_bytes, facts.memory_total_bytes))
    found = f"{available} available of {total}; the tiers take {units.human_size(wanted)}"
    limit = facts.memory_limit_bytes
    if limit and wanted > limit:
        advice = f"the control group allows {units.human_size(limit)}: raise it, or lower --host-bytes"
        return Check("memory", Verdict.CHANGE, found, advice)
    if facts.memory_total_bytes and wanted > facts.memory_total_bytes:
        return Check("memory", Verdict.CHANGE, found, "lower --host-bytes: it is more than there is")
    if wanted > facts.memory_available_bytes:
        return Check("memory", Verdict.ADVICE, found, "lower --host-bytes, or stop something else first")
    return Check("memory", Verdict.FINE, found)


def _shm(facts: Facts) -> Check:
    found = units.human_size(facts.shm_bytes) if facts.shm_bytes else "absent"
    return Check("/dev/shm", Verdict.FINE, f"{found}; it does not bound the host tier, which uses memfds")  # noqa: S108 - a name


def _huge_pages(facts: Facts) -> Check:
    found = f"shmem_enabled = {facts.shmem_huge_pages or 'unknown'}"
    if facts.shmem_huge_pages in {"always", "within_size", "advise", "force"}:
        return Check("huge pages", Verdict.FINE, found)
    if facts.kernel >= _COLLAPSE_KERNEL and facts.shmem_huge_pages != "deny":
        return Check("huge pages", Verdict.FINE, f"{found}; the kernel can collapse pages on request")
    advice = "fewer TLB misses with: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
    return Check("huge pages", Verdict.ADVICE, found, advice)


def _memlock(facts: Facts) -> Check:
    limit = "unlimited" if facts.memlock_bytes < 0 else units.human_size(facts.memlock_bytes)
    if facts.memlock_bytes < 0 or not facts.torch.found.get("gpus"):
        return Check(
            "locked memory",
            Verdict.FINE,
            limit + ("" if facts.memlock_bytes < 0 else "; enough without a GPU"),
        )
    advice = "some drivers count pinned memory: ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit"
    return Check("locked memory", Verdict.ADVICE, limit, advice)


def _open_files(facts: Facts) -> Check:
    found = f"{facts.open_files} files may be open"
    if facts.open_files < 1024:
        return Check(
            "open files", Verdict.ADVICE, found, "each client and segment takes a few: ulimit -n 4096"
        )
    return Check("open files", Verdict.FINE, found)


def _disk(facts: Facts, settings: ServeConfig) -> list[Check]:
    disk = facts.disk
    if disk is None:
        advice = (
            "a restart starts empty and pages pushed out of memory are lost: give --disk-path, --disk-bytes"
        )
        return [Check("disk", Verdict.ADVICE, "no disk tier configured", advice)]
    found = (
        f"{disk.path}: {disk.kind or 'unknown file system'}, {units.human_size(max(disk.free_bytes, 0))} free"
    )
    if not disk.writable:
        return [
            Check(
                "disk", Verdict.CHANGE, found, "this user cannot write there: chown it, or change --disk-path"
            )
        ]
    if disk.kind in _NETWORK:
        return [
            Check(
                "disk", Verdict.CHANGE, found, "LMDB maps its file and needs a local disk: change --disk-path"
            )
        ]
    if 0 <= disk.free_bytes < settings.disk_bytes:
        advice = f"--disk-bytes asks for {units.human_size(settings.disk_bytes)}: free some, or lower it"
        return [Check("disk", Verdict.ADVICE, found, advice)]
    if disk.kind in {"tmpfs", "ramfs"}:
        return [
            Check("disk", Verdict.ADVICE, found, "this is memory: pages would neither save RAM nor survive")
        ]
    if disk.kind == "overlay":
        return [
            Check(
                "disk",
                Verdict.ADVICE,
                found,
                "a container's overlay is slow and is lost with it: use a volume",
            )
        ]
    return [Check("disk", Verdict.FINE, found)]


def _lmdb(facts: Facts, settings: ServeConfig) -> Check:
    if facts.lmdb.problem:
        verdict = Verdict.CHANGE if settings.disk_path else Verdict.ADVICE
        return Check(
            "lmdb",
            verdict,
            facts.lmdb.problem,
            "the disk tier needs it: pip install lmdb, or another --disk-path",
        )
    return Check("lmdb", Verdict.FINE, f"lmdb {facts.lmdb.found.get('version')} writes, syncs and reads")


def _torch(facts: Facts, settings: ServeConfig) -> Check:
    if facts.torch.problem:
        verdict = Verdict.CHANGE if settings.device else Verdict.FINE
        advice = "the device tier needs torch: pip install 'hicache[torch]'" if settings.device else ""
        return Check("torch", verdict, f"{facts.torch.problem}; needed for a device tier only", advice)
    gpus = facts.torch.found.get("gpus") or []
    names = ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else "no GPU"
    return Check("torch", Verdict.FINE, f"torch {facts.torch.found.get('version')}, {names}")


def _print_table(checks: list[Check]) -> None:
    from rich.table import Table

    colours = {Verdict.FINE: "green", Verdict.ADVICE: "yellow", Verdict.CHANGE: "red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("check", "verdict", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for check in checks:
        colour = colours[check.verdict]
        table.add_row(check.name, f"[{colour}]{check.verdict.value}[/]", check.found, check.advice)
    console = terminal.console()
    console.print(table)
    console.print("this machine is fit" if is_fit(checks) else "[red]change what is marked `change` first[/]")
