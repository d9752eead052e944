"""What the doctor says about machines that are not this one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hicache.cli import doctor, main, probes
from hicache.cli.doctor import Verdict
from hicache.cli.probes import Disk, Facts, Probe
from hicache.cli.settings import ServeConfig

GOOD = Facts(
    python="3.11.7",
    system="Linux",
    kernel=(6, 1),
    cpus=8,
    optimised=False,
    memory_total_bytes=64 << 30,
    memory_available_bytes=60 << 30,
    memory_limit_bytes=0,
    memlock_bytes=-1,
    open_files=4096,
    shm_bytes=32 << 30,
    sealing_problem="",
    shmem_huge_pages="advise",
    disk=Disk("/data", "ext4", 1 << 40, writable=True),
    lmdb=Probe({"version": "1.6"}),
    torch=Probe({"version": "2.11", "gpus": ["H200"]}),
    protobuf=Probe({"loads": True}),
    versions={"grpcio": "1.81", "protobuf": "6.33"},
)
SETTINGS = ServeConfig(host_bytes=8 << 30, disk_path="/data", disk_bytes=1 << 30, device="cpu")


def test_a_good_machine_is_fit() -> None:
    checks = doctor.judge(GOOD, SETTINGS)
    assert {check.verdict for check in checks} == {Verdict.FINE}
    assert doctor.is_fit(checks)


@pytest.mark.parametrize(
    ("change", "name", "verdict", "advice"),
    [
        ({"system": "Darwin"}, "system", Verdict.CHANGE, "Linux 5.1"),
        ({"kernel": (4, 19)}, "system", Verdict.CHANGE, "Linux 5.1"),
        ({"cpus": 1}, "system", Verdict.ADVICE, "2 or more"),
        ({"python": "3.10.2"}, "python", Verdict.CHANGE, "3.11"),
        ({"optimised": True}, "python", Verdict.CHANGE, "without -O"),
        ({"protobuf": Probe({}, "VersionError")}, "grpc", Verdict.CHANGE, "VersionError"),
        ({"sealing_problem": "F_ADD_SEALS: no"}, "memfd", Verdict.CHANGE, "seccomp"),
        ({"memory_limit_bytes": 4 << 30}, "memory", Verdict.CHANGE, "control group"),
        ({"memory_total_bytes": 4 << 30}, "memory", Verdict.CHANGE, "--host-bytes"),
        ({"memory_available_bytes": 4 << 30}, "memory", Verdict.ADVICE, "--host-bytes"),
        ({"shmem_huge_pages": "deny"}, "huge pages", Verdict.ADVICE, "shmem_enabled"),
        ({"memlock_bytes": 8 << 20}, "locked memory", Verdict.ADVICE, "ulimit -l"),
        ({"open_files": 256}, "open files", Verdict.ADVICE, "ulimit -n"),
        ({"disk": None}, "disk", Verdict.ADVICE, "--disk-path"),
        ({"disk": Disk("/data", "nfs4", 1 << 40, writable=True)}, "disk", Verdict.CHANGE, "local disk"),
        ({"disk": Disk("/data", "tmpfs", 1 << 40, writable=True)}, "disk", Verdict.ADVICE, "memory"),
        ({"disk": Disk("/data", "overlay", 1 << 40, writable=True)}, "disk", Verdict.ADVICE, "volume"),
        ({"disk": Disk("/data", "ext4", 1 << 20, writable=True)}, "disk", Verdict.ADVICE, "--disk-bytes"),
        ({"disk": Disk("/data", "ext4", 1 << 40, writable=False)}, "disk", Verdict.CHANGE, "chown"),
        ({"lmdb": Probe({}, "no such module")}, "lmdb", Verdict.CHANGE, "pip install lmdb"),
        ({"torch": Probe({}, "not installed")}, "torch", Verdict.CHANGE, "hicache[torch]"),
    ],
)
def test_what_is_wrong_is_found_and_the_cure_is_named(
    change: dict[str, Any], name: str, verdict: Verdict, advice: str
) -> None:
    checks = doctor.judge(dataclasses.replace(GOOD, **change), SETTINGS)
    (bad,) = [check for check in checks if check.verdict is not Verdict.FINE]
    assert (bad.name, bad.verdict) == (name, verdict)
    assert advice in bad.advice
    assert doctor.is_fit(checks) == (verdict is Verdict.ADVICE)


def test_without_a_gpu_a_low_memlock_limit_is_fine() -> None:
    facts = dataclasses.replace(GOOD, memlock_bytes=65536, torch=Probe({"version": "2.11", "gpus": []}))
    assert doctor.is_fit(checks := doctor.judge(facts, SETTINGS))
    assert all(check.verdict is Verdict.FINE for check in checks)


def test_the_file_system_is_that_of_the_closest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:5 / {tmp_path} rw shared:1 - nfs4 host:/x rw\n"
        "3 1 0:6 / /elsewhere rw - tmpfs t rw\nbroken line\n",
        encoding="utf-8",
    )
    assert probes.file_system(tmp_path, mounts) == "nfs4"
    assert probes.file_system(Path("/usr"), mounts) == "ext4"
    disk = probes.look_at_disk(str(tmp_path / "not" / "yet"), mounts)
    assert (disk.path, disk.kind, disk.writable) == (str(tmp_path), "nfs4", True)


def test_kernel_files_are_read_and_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  16 kB\nHugePages_Total: 3\nodd\n", encoding="ascii")
    (tmp_path / "choice").write_text("always [within_size] never\n", encoding="ascii")
    (tmp_path / "max").write_text("max\n", encoding="ascii")
    (tmp_path / "number").write_text("4096\n", encoding="ascii")
    assert probes.read_meminfo(tmp_path / "meminfo") == {"MemTotal": 16384, "HugePages_Total": 3}
    assert probes.read_choice(tmp_path / "choice") == "within_size"
    assert probes.read_number(tmp_path / "max") == 0
    assert probes.read_number(tmp_path / "number") == 4096
    gone = tmp_path / "gone"
    assert (probes.read_meminfo(gone), probes.read_choice(gone), probes.read_number(gone)) == ({}, "", 0)
    assert probes.size_of(gone) == 0
    assert probes.kernel_version("6.1.0-23-amd64") == (6, 1)
    assert probes.kernel_version("odd") == (0, 0)


def test_a_probe_that_fails_says_why() -> None:
    assert probes.run_probe("print('{\"a\": 1}')").found == {"a": 1}
    assert "No module named 'nosuch'" in probes.run_probe("import nosuch").problem
    assert probes.run_probe("raise SystemExit(7)").problem == "ended with 7"


def test_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main.main(["doctor", "--json", "--disk-path", str(tmp_path), "--host-bytes", "1MiB"])
    report = json.loads(capsys.readouterr().out)
    assert report["fit"] == (code == 0)
    assert {check["name"] for check in report["checks"]} >= {
        "memory",
        "disk",
        "memfd",
        "torch",
        "locked memory",
    }
