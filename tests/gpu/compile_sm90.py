"""Compiles the kernels for an H100-class GPU, which needs none, and prints what the machine code does. Run by a test.

python tests/gpu/compile_sm90.py          one line of JSON a kernel
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import paged_triton
import quant_triton
import triton
import xxh3_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ADDRESSES = {"planes", "places", "rows", "targets", "sources", "refused", "table", "scratch", "out"}


def compile_it(name, kernel, constants, *, sixteen=(), **options):
    """sixteen: arguments that are multiples of 16, as a launch would find out by itself."""
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else "i64" if n in ADDRESSES else "i32" for n in names}
    known = {(names.index(n),): [["tt.divisibility", 16]] for n in sixteen}
    values = {(names.index(n),): value for n, value in constants.items()}
    made = triton.compile(
        ASTSource(kernel, types, values, known), target=GPUTarget("cuda", 90, 32), options=options
    )
    ptx = made.asm["ptx"]
    found = {
        "kernel": name,
        "bytes": len(made.asm["cubin"]),
        "wide_loads": len(re.findall(r"ld\.global[^;]*(?:v2\.b64|v4\.b32)", ptx)),
        "wide_stores": len(re.findall(r"st\.global[^;]*(?:v2\.b64|v4\.b32)", ptx)),
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)),
        "spills": len(re.findall(r"\.local", ptx)),
    }
    print(json.dumps(found), flush=True)


def main():
    move = {
        "UNIT": 4096,
        "H": 1,
        "D": 4096,
        "STRIDE_T": 0,
        "STRIDE_H": 0,
        "STRIDE_D": 1,
        "WORD": 8,
        "ALIGNED": True,
    }
    compile_it("pack", paged_triton._move_units, {**move, "PACK": True, "BLOCK": 2048})
    compile_it("unpack", paged_triton._move_units, {**move, "PACK": False, "BLOCK": 2048, "block": 1})
    rows = {"WORD": 8, "ALIGNED": True, "BLOCK": 2048}
    compile_it("move_rows", paged_triton._move_rows, rows, sixteen=["words"])
    compile_it("sums", xxh3_triton._sum_blocks, {"BLOCKS": 16})
    compile_it("chain", xxh3_triton._chain_rows, {"ROWS": 4, "AHEAD": 8}, num_warps=1)
    unit = {
        "UNIT": 16384,
        "H": 1,
        "D": 16384,
        "S_T": 0,
        "S_H": 0,
        "S_D": 1,
        "HALF": False,
        "GROUPS": 32,
        "ALIGNED": True,
    }
    for name, codec in quant_triton._NAMES.items():
        constants = {**unit, "CODEC": codec}
        compile_it(
            f"{name} in",
            quant_triton._encode,
            {**constants, "LEAST": -124},
            sixteen=["group_count"],
            enable_fp_fusion=False,
        )
        compile_it(
            f"{name} out", quant_triton._decode, constants, sixteen=["group_count"], enable_fp_fusion=False
        )


if __name__ == "__main__":
    main()
