"""The contender's end of the harness protocol. Standard library only: it is imported inside peers' environments.

A contender is a process that the harness starts with the interpreter of the environment it needs. One JSON object
a line, requests on stdin, answers on the stdout it was started with (prints of the measured library go to stderr):

    -> {"spec": {...}}                          <- {"name": ..., "versions": {...}, "cases": [...], "notes": {...}}
    -> {"case": "match_flat_8k"}                <- {"sample": {"cpu_us": 1.2, "wall_us": 1.3, "iterations": 4096}}
    -> {"quit": true}                              (or end of file: the contender ends)

A sample is a mean over ``iterations`` calls; the harness asks contenders in turn and takes medians over samples. It
may carry ``latencies_us``, a list with one wall time a call, of which the harness makes percentiles.
A case that fails answers {"error": "..."} and the contender goes on.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """The mean cost of one call: process CPU time (all threads) and wall time, in microseconds."""

    cpu_us: float
    wall_us: float
    iterations: int


def timed_loop(
    call: Callable[[], object], min_sample_s: float = 0.05, max_iterations: int = 20_000
) -> Callable[[], Sample]:
    """A sampler of ``call`` repeated so often that a sample takes ``min_sample_s``: for calls that change nothing."""
    iterations = 1
    while True:
        start = time.perf_counter()
        _repeat(call, iterations)
        took = time.perf_counter() - start
        if took >= min_sample_s / 2 or iterations >= max_iterations:
            break
        iterations *= 4
    iterations = max(1, min(max_iterations, round(iterations * min_sample_s / took)))
    return lambda: timed(lambda: _repeat(call, iterations), iterations)


def timed_each(call: Callable[[Any], object], arguments: list[Any]) -> Sample:
    """Time one call for each argument, in one go."""

    def run() -> None:
        for argument in arguments:
            call(argument)

    return timed(run, len(arguments))


def timed(run: Callable[[], object], iterations: int) -> Sample:
    """Time one run that stands for ``iterations`` calls, garbage collection held off meanwhile."""
    gc.collect()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        gc.enable()
    return Sample(cpu / iterations * 1e6, wall / iterations * 1e6, iterations)


def _repeat(call: Callable[[], object], iterations: int) -> None:
    for _ in range(iterations):
        call()


def serve(
    name: str,
    prepare: Callable[[dict[str, Any]], Mapping[str, Callable[[], Callable[[], Sample]]]],
    versions: Callable[[], dict[str, str]],
    notes: Mapping[str, object] | None = None,
) -> None:
    """Answer the harness until it is done.

    ``prepare`` gets the spec and gives, for each case, a function that sets the case up and returns its sampler.
    Set-up runs at the first sample of its case; only the latest case is kept, so that trees do not pile up.
    """
    replies = os.fdopen(os.dup(1), "w")
    gc.freeze()  # what the imports left is not to be walked before every sample
    os.dup2(2, 1)  # whatever the measured library prints must not reach the protocol
    cases: Mapping[str, Callable[[], Callable[[], Sample]]] = {}
    current: tuple[str, Callable[[], Sample]] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("quit"):
            break
        try:
            if "spec" in request:
                cases = prepare(request["spec"])
                answer: dict[str, Any] = {
                    "name": name,
                    "versions": versions(),
                    "cases": list(cases),
                    "notes": dict(notes or {}),
                }
            else:
                wanted = request["case"]
                if current is None or current[0] != wanted:
                    current = None
                    gc.collect()
                    current = (wanted, cases[wanted]())
                taken = current[1]()
                answer = {"sample": taken if isinstance(taken, dict) else vars(taken)}
        except Exception as error:  # noqa: BLE001 - the loop's edge: reported to the harness
            answer = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
