"""Does compute feel the copies, and does the engine wait for them? Matrix products beside demotion and promotion."""

from __future__ import annotations

import gpu_paths
import torch
from gpu_machine import Machine

from hicache.device import kernels


def run(machine: Machine, report, options) -> None:
    """Slowdown of products while pages move both ways; share of a layered promotion that is hidden."""
    import gpu

    shape = gpu.shapes(options.tiny)["llama"]
    size = 64 if options.tiny else 8192
    a = torch.randn((size, size), device=machine.device).to(torch.bfloat16)
    b = torch.randn((size, size), device=machine.device).to(torch.bfloat16)
    out = torch.empty_like(a)
    count = shape.counts[-1]
    leaving, coming = gpu_paths.Paths(machine, shape, count), gpu_paths.Paths(machine, shape, count)
    for engine in leaving.engines():
        _slowdown(machine, report, engine, (a, b, out), (leaving, coming))
    rows = [row for row in report.rows if row["case"] == "overlap"]
    best = min(rows, key=lambda row: row["slowdown"])
    report.bar(f"compute beside copies ({best['engine']}): slowdown", best["slowdown"], 0.05, at_most=True)
    _layered(machine, report, (a, b, out), coming)
    leaving.close()
    coming.close()


def _slowdown(machine: Machine, report, engine: str, factors, paths) -> None:
    """Products on the default stream, for about three times as long as the copies take; copies beside them."""
    a, b, out = factors
    leaving, coming = paths
    copy_ns = machine.time_both(
        lambda: leaving.run(engine, "to host"), lambda: coming.run(engine, "to device")
    )
    one_ns = machine.time(lambda: torch.mm(a, b, out=out))
    products = max(4, int(3 * copy_ns / one_ns))

    def compute() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    alone_ns = machine.time(compute)
    rounds = max(1, int(1.2 * alone_ns / copy_ns))  # there are copies until the last product
    compute_ns, total_ns = _beside(machine, compute, engine, paths, rounds)
    report.row(
        "overlap",
        engine=engine,
        slowdown=compute_ns / alone_ns - 1,
        hidden=max(0.0, min(1.0, (alone_ns + rounds * copy_ns - total_ns) / min(alone_ns, rounds * copy_ns))),
        products=products,
        copies_ms=copy_ns / 1e6,
    )


def _beside(machine: Machine, compute, engine: str, paths, rounds: int) -> tuple[float, float]:
    """Median ns of the products, and of everything, while the copies run."""
    leaving, coming = paths
    if not machine.is_cuda:
        return machine.time(compute), machine.time(lambda: (compute(), leaving.run(engine, "to host")))
    found = []
    for _ in range(machine.repetitions):
        machine.wait()
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        main = torch.cuda.current_stream()
        ends[0].record(main)
        for number in (0, 1):
            machine.streams[number].wait_event(ends[0])
        for _ in range(rounds):
            with machine.on(0):
                leaving.run(engine, "to host")
            with machine.on(1):
                coming.run(engine, "to device")
        compute()
        ends[1].record(main)
        for number in (0, 1):
            main.wait_stream(machine.streams[number])
        ends[2].record(main)
        machine.wait()
        found.append((ends[0].elapsed_time(ends[1]) * 1e6, ends[0].elapsed_time(ends[2]) * 1e6))
    found.sort()
    return found[len(found) // 2]


def _layered(machine: Machine, report, factors, paths) -> None:
    """Promotion layer by layer ahead of the layer that needs it: what of its time does compute see?

    A layer's compute is some products that take about 1.5 times as long as its copy, as in a prefill.
    """
    a, b, out = factors
    layers = paths.shape.layers
    of_layer = len(paths.planes) // layers

    def promote(layer: int) -> None:
        first = layer * of_layer
        some = paths.planes[first : first + of_layer]
        kernels.unpack_units(some, paths.places, paths.host, paths.shape.block, first)

    def promote_all() -> None:
        for layer in range(layers):
            promote(layer)

    copy_ns = machine.time(promote_all)
    one_ns = machine.time(lambda: torch.mm(a, b, out=out))
    products = max(1, round(1.5 * copy_ns / layers / one_ns))

    def compute(wait=lambda _: None) -> None:
        for layer in range(layers):
            wait(layer)
            for _ in range(products):
                torch.mm(a, b, out=out)

    alone_ns = machine.time(compute)

    def both() -> None:  # from stream 0: promotion on stream 1, a product waits for its layer only
        if not machine.is_cuda:
            promote_all()
            compute()
            return
        ready = []
        machine.after(1, 0)
        with machine.on(1):
            for layer in range(layers):
                promote(layer)
                ready.append(machine.streams[1].record_event())
        compute(lambda layer: machine.streams[0].wait_event(ready[layer]))

    together_ns = machine.time(both)
    hidden = 1 - max(0.0, together_ns - alone_ns) / copy_ns
    report.row("layered", hidden=hidden, copy_ms=copy_ns / 1e6, compute_ms=alone_ns / 1e6, products=products)
    report.bar("promotion hidden, layer by layer", hidden, 0.90)
