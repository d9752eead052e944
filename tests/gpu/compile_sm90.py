"""Launches the kernels as the door does, for an H100-class GPU that is not there, and prints what was compiled.

Triton's own way to a launch is taken up to the launch itself: it types the arguments by their values, specialises,
compiles down to machine code. No GPU is needed. Run by a test.

python tests/gpu/compile_sm90.py          one line of JSON a kernel; "made": what was compiled anew for these launches
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hicache.device import kernels

paged, paged_triton, quant_triton, xxh3_triton = (
    kernels._load(name) for name in ("paged", "paged_triton", "quant_triton", "xxh3_triton")
)

#: Addresses as CUDA gives them: of tables, of which some are no multiples of 16.
AT = [0x7F00_0000_0000 + n * 0x1_0000_0008 for n in range(8)]


class Hopper:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


made: dict[str, list] = {}  # kernel -> what its launches compiled


def stop_short(self, *args, grid, warmup, _run=JITFunction.run, **kwargs):
    """Everything that a launch does but for the launch."""
    assert all(0 < size < 2**31 for size in grid)
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    found = made.setdefault(self.__name__, [])
    if kernel not in found:
        found.append(kernel)
    return kernel


def tell(name, *kernels, launches):
    made.clear()
    for launch in launches:
        launch()
    compiled = [kernel for kernel_name in kernels for kernel in made[kernel_name]]
    ptx = compiled[0].asm["ptx"]
    found = {
        "kernel": name,
        "made": len(compiled),
        "bytes": len(compiled[0].asm["cubin"]),
        "wide_loads": len(re.findall(r"ld\.global[^;]*(?:v2\.b64|v4\.b32)", ptx)),
        "wide_stores": len(re.findall(r"st\.global[^;]*(?:v2\.b64|v4\.b32)", ptx)),
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)),
        "spills": len(re.findall(r"\.local", ptx)),
    }
    print(json.dumps(found), flush=True)


#: Llama-3-8B: pages of one block of 16 tokens.
LLAMA = paged.Geometry(
    pages=64,
    units=1,
    unit_tokens=16,
    block=16,
    heads=8,
    dim=128,
    width=2,
    strides=(16384, 1024, 128, 1),
    first_byte=0,
)
TOKENS = dataclasses.replace(LLAMA, units=16, unit_tokens=1, block=1, strides=(1024, 1024, 128, 1))


def units(geometry, *, pack, host_rows):
    """A page, many, one layer of many in the middle of a page: the same kernel."""

    def launch(pages, planes, first):
        some = dataclasses.replace(geometry, pages=pages, first_byte=first)
        tables = (*AT[:3], planes)
        paged_triton.move_units(some, tables, aligned_to=16, pack=pack, host_rows=host_rows)

    return [
        lambda a=arguments: launch(*a)
        for arguments in ((64, 64, 0), (1, 64, 0), (3, 2, 5 * geometry.plane_bytes), (1, 1, 16))
    ]


def rows():
    """Pages of many sizes, in any number."""
    return [
        lambda n=count, b=size: paged_triton.move_rows(AT[1], AT[2], n, b, aligned_to=16)
        for count in (64, 1, 3, 16)
        for size in (2 << 20, 64 << 10, 36 << 10)
    ]


def hashes():
    return [
        lambda n=count, b=size: xxh3_triton.hash_rows(AT[0], AT[1], n, b, scratch=AT[2], out=AT[3])
        for count in (64, 1, 3, 16)
        for size in (2 << 20, 65536, 36 << 10)
    ]


def quants(codec, *, encode):
    run = paged_triton.Run.of(LLAMA, 2, widest=2)
    common = {"page_planes": 64, "half": False, "run": run, "aligned": True}

    def launch(pages, planes):
        some = dataclasses.replace(LLAMA, pages=pages)
        if encode:
            quant_triton.encode(some, (*AT[:4], planes), codec, least=-124, **common)
        else:
            quant_triton.decode(some, (*AT[:3], planes), codec, **common)

    return [lambda a=arguments: launch(*a) for arguments in ((64, 64), (1, 64), (3, 2))]


def main():
    driver.set_active(Hopper())
    JITFunction.run = stop_short
    for where, host_rows in (("host", True), ("device", False)):
        for name, pack in (("pack", True), ("unpack", False)):
            launches = units(LLAMA, pack=pack, host_rows=host_rows)
            tell(f"{name} {where}", "_move_units", launches=launches)
    tell("unpack tokens", "_move_units", launches=units(TOKENS, pack=False, host_rows=True))
    tell("move_rows", "_move_rows", launches=rows())
    tell("sums", "_sum_blocks", launches=hashes())
    tell("chain", "_chain_rows", launches=hashes())
    for codec in quant_triton._NAMES:
        tell(f"{codec} in", "_encode", launches=quants(codec, encode=True))
        tell(f"{codec} out", "_decode", launches=quants(codec, encode=False))


if __name__ == "__main__":
    main()
