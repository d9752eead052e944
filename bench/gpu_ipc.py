"""A real sidecar and this process: a hit in the device tier, from the call to a tensor that can be read; and Load."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from gpu_machine import Machine

import hicache
from hicache.device import kernels
from hicache.errors import UnsupportedError
from hicache.rpc.client import KvMemory

ROOT = Path(__file__).resolve().parents[1]
#: How Python runs a module; a rehearsal puts itself in between.
PYTHON = [sys.executable]
PROMPTS = ((512, 16), (128, 64))  # pages, tokens a page: 8k tokens
LAYERS, HEADS, DIM = 2, 2, 64  # small pages: none is copied on the way to a tensor
ROUNDS = 200


class Sidecar:
    """``hicache serve`` on the device, for as long as this lives."""

    def __init__(self, device: str, folder: str) -> None:
        self.target = f"unix:{folder}/s.sock"
        self._log = Path(f"{folder}/log").open("w+")  # noqa: SIM115 - closed with the process
        share = ["--share-device"] if device.startswith("cuda") else []
        self._child = subprocess.Popen(
            [
                *PYTHON, "-m", "hicache", "serve", "--until-eof", "--socket-path", f"{folder}/s.sock",
                "--device", device, "--device-bytes", "256MiB", "--host-bytes", "512MiB", *share,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        for line in self._child.stdout:
            if "SERVING" in line:
                return
        self._child.wait()
        self._log.seek(0)
        raise harness.BenchError(f"the sidecar did not start: {self._log.read()[-2000:]}")

    def close(self) -> None:
        self._child.stdin.close()
        try:
            self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()


def run(machine: Machine, report, options) -> None:
    """Both shapes of a prompt, then Load into this process's KV."""
    with tempfile.TemporaryDirectory(prefix="hicache-bench-") as folder:
        sidecar = Sidecar(options.device, folder)
        try:
            with hicache.Client(sidecar.target) as client:
                for pages, tokens in ((4, 16),) if options.tiny else PROMPTS:
                    _prompt(machine, report, options, client, (pages, tokens))
        finally:
            sidecar.close()


def _prompt(machine: Machine, report, options, client, form: tuple[int, int]) -> None:
    pages, page_tokens = form
    shape = (2, 2 * pages, page_tokens, HEADS, DIM)
    page_bytes = LAYERS * 2 * page_tokens * HEADS * DIM * 2
    prompt = np.arange(pages * page_tokens, dtype=np.int32)
    rows = np.random.default_rng(5).integers(0, 256, (pages, page_bytes), np.uint8)
    cache = client.namespace(
        model="bench", page_bytes=page_bytes, page_tokens=page_tokens, layers=LAYERS, salt=str(page_tokens)
    )
    cache.store(prompt, [row.data for row in rows])
    with cache.fetch(prompt, device=True, wait_ms=30_000) as lease:
        if len(lease) != pages:
            raise harness.BenchError(f"{len(lease)} of {pages} pages are in the device tier")
        _check(machine, lease, rows)
    _time(machine, report, options, (cache, prompt, pages, page_tokens))
    _load(machine, report, (client, cache, prompt, rows), shape)


def _read(machine: Machine, lease) -> list:
    return lease.tensors() if machine.is_cuda else []  # a pool that is no GPU's is not shared


def _check(machine: Machine, lease, rows: np.ndarray) -> None:
    found = _read(machine, lease)
    if machine.is_cuda and not np.array_equal(torch.cat([part.cpu() for part in found]).numpy(), rows):
        raise harness.BenchError("tensors(): wrong bytes")


def _time(machine: Machine, report, options, what) -> None:
    """From the call to tensors; the release is not counted."""
    cache, prompt, pages, page_tokens = what
    taken, parts = [], 0
    for number in range((5 if options.tiny else ROUNDS) + 5):
        begin = time.perf_counter_ns()
        lease = cache.fetch(prompt, device=True)
        found = _read(machine, lease)
        end = time.perf_counter_ns()
        parts = len(found)
        if len(lease) != pages:
            raise harness.BenchError("a page has left the device tier")
        lease.release()
        if number >= 5:
            taken.append((end - begin) / 1e6)
    median = statistics.median(taken)
    report.row(
        "ipc", pages=pages, page_tokens=page_tokens, tensors=parts, median_ms=median,
        p99_ms=sorted(taken)[len(taken) * 99 // 100],
    )  # fmt: skip
    report.bar(f"fetch to tensors, {pages} x {page_tokens} tokens, ms", median, 1.0, at_most=True)


def _load(machine: Machine, report, what, shape: tuple[int, ...]) -> None:
    """Device slots into KV of this process, by the sidecar, and from there the bytes."""
    client, cache, prompt, rows = what
    pages, page_tokens = len(rows), shape[2]
    if machine.is_cuda:
        layers = [torch.zeros(shape, dtype=torch.bfloat16, device=machine.device) for _ in range(LAYERS)]
    else:
        memory = KvMemory(LAYERS * (int(np.prod(shape)) * 2 + 256))
        layers = [memory.tensor(shape, torch.bfloat16) for _ in range(LAYERS)]
    blocks = np.random.default_rng(6).permutation(shape[1])[:pages]
    try:
        kv = client.register_kv(layers, layout="kv-nhd")
    except UnsupportedError as error:
        report.skip("ipc load", str(error))
        return
    taken = []
    with kv, cache.fetch(prompt, device=True) as lease:
        places = kv.places(blocks, page_tokens)
        for _ in range(machine.repetitions + 3):
            begin = time.perf_counter_ns()
            loaded = lease.load(kv, places).result(60)
            taken.append((time.perf_counter_ns() - begin) / 1e6)
            if not loaded.ok:
                raise harness.BenchError(f"load: {loaded}")
    planes = [plane.cpu() for layer in layers for plane in kernels.planes(layer, "kv-nhd")]
    found = torch.zeros(rows.shape, dtype=torch.uint8)
    kernels.pack_units(planes, torch.from_numpy(places), found, page_tokens)
    if not np.array_equal(found.numpy(), rows):
        raise harness.BenchError("load from device slots: wrong bytes")
    median = statistics.median(taken[3:])
    report.row("ipc load", pages=pages, median_ms=median, gb_s=rows.nbytes / median / 1e6)
