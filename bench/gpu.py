"""Copies between host and device, kernels, overlap and the store, against this machine's own ceilings.

    python bench/gpu.py [--device cuda:0] [--only transfers layered ipc ...] [--repetitions 7]
    python bench/gpu.py --device cpu --tiny        the same code in ordinary memory: checks the bench, measures nothing

Needs torch and, on a GPU, triton. Every path's bytes are compared before it is timed. Times on a GPU are the device's
(events); of transfers, the sidecar and the owner's thread, wall time. Medians of the repetitions. The bars that matter
most come first; results and verdicts go to ``bench/results/gpu.json`` after every case, so that a run that is cut short
keeps what it had, and a case that fails does not stop the others. A dry run (``--device cpu``) writes only with
``--name``.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_ipc
import gpu_layered
import gpu_overlap
import gpu_owner
import gpu_paths
import gpu_store
import gpu_transfers
import harness
from gpu_machine import Machine

CASES = ("transfers", "layered", "ipc", "overlap", "store", "d2d", "duplex", "owner", "kernels", "copies")
MIB = 1 << 20


def shapes(tiny: bool) -> dict[str, gpu_paths.Shape]:
    """Name -> shape: the pages of the bars."""
    if tiny:
        return {
            "llama": gpu_paths.Shape(layers=2, layout="kv-nhd", block=16, heads=2, dim=16, counts=(2, 4)),
            "mla": gpu_paths.Shape(layers=2, layout="latent", block=16, heads=1, dim=64, counts=(4,)),
        }
    return {
        "llama": gpu_paths.Shape(layers=32, layout="kv-nhd", block=16, heads=8, dim=128, counts=(8, 64, 256)),
        "mla": gpu_paths.Shape(layers=4, layout="latent", block=16, heads=1, dim=512, counts=(256, 2048)),
    }


class Report:
    """Rows and verdicts, printed as they come."""

    def __init__(self, *, judges: bool) -> None:
        self.judges = judges  # a dry run measures nothing
        self.rows: list[dict] = []
        self.bars: list[dict] = []
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def skip(self, case: str, why: str) -> None:
        """It cannot be measured here."""
        self.skipped[case] = why
        print(f"SKIPPED {case}: {why}", flush=True)

    def row(self, case: str, **figures) -> None:
        self.rows.append({"case": case, **figures})
        print(
            f"{case:<10}", "  ".join(f"{name} {_short(value)}" for name, value in figures.items()), flush=True
        )

    def bar(self, name: str, value: float, wanted: float, *, at_most: bool = False) -> None:
        if not self.judges:
            return
        met = value <= wanted if at_most else value >= wanted
        self.bars.append({"bar": name, "value": value, "wanted": wanted, "at_most": at_most, "met": met})
        sign = "<=" if at_most else ">="
        print(f"{'MET   ' if met else 'MISSED'} {name}: {value:.3f}, bar {sign} {wanted}", flush=True)


def _short(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def copies(machine: Machine, report: Report, options) -> None:
    """Paged KV to and from host pages, by every engine, against cudaMemcpyAsync of pinned memory."""
    for name, shape in shapes(options.tiny).items():
        for count in shape.counts:
            paths = gpu_paths.Paths(machine, shape, count)
            ceiling = {way: machine.ceiling(way, options.ceiling_bytes) for way in ("to host", "to device")}
            for way in ("to host", "to device"):
                found = {}
                for engine in paths.engines():
                    paths.verify(engine, way)
                    found[engine] = paths.bytes / machine.time(lambda e=engine, w=way, p=paths: p.run(e, w))
                best = max(found, key=lambda engine: found[engine])
                share = found[best] / ceiling[way]
                figures = {f"{engine}_gb_s": value for engine, value in found.items()}
                report.row(
                    "copies", shape=name, pages=count, way=way, best=best, share=share,
                    ceiling_gb_s=ceiling[way], **figures,
                )  # fmt: skip
                wanted = {("llama", 8): 0.70, ("llama", 64): 0.90, ("llama", 256): 0.90, ("mla", 256): 0.75}
                if (name, count) in wanted:
                    report.bar(
                        f"{name}, {count} pages, {way}: share of the ceiling", share, wanted[name, count]
                    )
            paths.close()


def duplex(machine: Machine, report: Report, options) -> None:
    """Both directions at once, against both plain copies at once."""
    shape = shapes(options.tiny)["llama"]
    count = shape.counts[-1]
    out, back = gpu_paths.Paths(machine, shape, count), gpu_paths.Paths(machine, shape, count)
    ceiling = machine.duplex_ceiling(options.ceiling_bytes)
    for engine in out.engines():
        taken = machine.time_both(
            lambda e=engine: out.run(e, "to host"), lambda e=engine: back.run(e, "to device")
        )
        share = (out.bytes + back.bytes) / taken / ceiling
        report.row(
            "duplex", engine=engine, share=share, gb_s=(out.bytes + back.bytes) / taken, ceiling_gb_s=ceiling
        )
    best = max(row["share"] for row in report.rows if row["case"] == "duplex")
    report.bar("both directions at once: share of the duplex ceiling", best, 0.85)
    out.close()
    back.close()


def d2d(machine: Machine, report: Report, options) -> None:
    """Gather and scatter within the device, against a plain copy of as many bytes."""
    shape = shapes(options.tiny)["llama"]
    paths = gpu_paths.Paths(machine, shape, shape.counts[-1])
    ceiling = paths.bytes / machine.time(paths.plain_copy)
    for name, work in (("gather", paths.gather), ("scatter", paths.scatter)):
        speed = paths.bytes / machine.time(work)
        report.row("d2d", kernel=name, gb_s=speed, ceiling_gb_s=ceiling, share=speed / ceiling)
        report.bar(f"device to device, {name}: share of the machine's copy", speed / ceiling, 0.85)
    paths.close()


def kernels(machine: Machine, report: Report, options) -> None:
    """Checksum and quantisation, in GB of pages a second."""
    shape = shapes(options.tiny)["llama"]
    paths = gpu_paths.Paths(machine, shape, shape.counts[-1])
    report.row("kernels", kernel="xxh3", gb_s=paths.bytes / machine.time(paths.hash))
    for codec in ("fp8-e4m3", "int8-g64", "int4-g64"):
        into, out_of = paths.quantised(codec)
        report.row("kernels", kernel=f"{codec} in", gb_s=paths.bytes / machine.time(into))
        report.row("kernels", kernel=f"{codec} out", gb_s=paths.bytes / machine.time(out_of))
    paths.close()


def main() -> None:
    """Run the cases, write the file; exit status 1 where a case failed, not where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--repetitions", type=int, default=harness.MIN_REPETITIONS)
    parser.add_argument("--tiny", action="store_true", help="small shapes: checks the bench itself")
    parser.add_argument("--name", default="")
    options = parser.parse_args()
    options.ceiling_bytes = MIB if options.tiny else 256 * MIB
    machine = Machine(options.device, options.repetitions)
    report = Report(judges=machine.is_cuda and not options.tiny)
    if not report.judges:
        print("a dry run: it checks the bench, its figures mean nothing")
    for case in options.only:
        _try(case, machine, report, options)
        _write(machine, report, options)
    missed = [bar["bar"] for bar in report.bars if not bar["met"]]
    if report.judges:
        print(
            f"\n{len(report.bars) - len(missed)} of {len(report.bars)} bars met", *missed, sep="\n  missed: "
        )
    elif not (machine.is_cuda or options.name):
        print("nothing is written")
    if report.failed:
        raise harness.BenchError("cases that failed: " + ", ".join(report.failed))


RUN = {
    "transfers": gpu_transfers.run,
    "layered": gpu_layered.run,
    "ipc": gpu_ipc.run,
    "overlap": gpu_overlap.run,
    "store": gpu_store.run,
    "d2d": d2d,
    "duplex": duplex,
    "owner": gpu_owner.run,
    "kernels": kernels,
    "copies": copies,
}


def _try(case: str, machine: Machine, report: Report, options) -> None:
    """One case; how it failed, if it did, is in the results, and the next is tried."""
    begin = time.perf_counter()
    try:
        RUN[case](machine, report, options)
    except Exception as error:  # noqa: BLE001 - whatever it is: the others' results are wanted
        traceback.print_exc()
        report.failed[case] = f"{type(error).__name__}: {error}"
        print(f"FAILED {case}: {report.failed[case]}", flush=True)
    report.seconds[case] = round(time.perf_counter() - begin, 1)


def _write(machine: Machine, report: Report, options) -> None:
    if not (machine.is_cuda or options.name):
        return
    stamp = {
        "repetitions": options.repetitions,
        "device": machine.describe(),
        "tiny": options.tiny,
        "seconds": report.seconds,
        "failed": report.failed,
        "skipped": report.skipped,
        "rows": report.rows,
        "bars": report.bars,
    }
    harness.write(options.name or "gpu", stamp, ["torch", "triton", "numpy"])


if __name__ == "__main__":
    harness.run(main)
