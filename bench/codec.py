"""Codecs side by side on pages of real K/V: ratio, compress and decompress speed of one thread.

    python bench/codec.py [--count 8] [--repetitions 9] [--cases minilm causal ...] [--no-peers]

Contenders take their samples in turn, all in one process; speeds are raw bytes over process CPU time, medians of at
least seven samples. Ours are whole records: checksums of the page and of what is stored, both verified on reading; the
others check nothing. Every lossless round trip is compared once. Writes ``bench/results/codec.json``.

Peers (blosc2, zipnn) need ``bench/peers/setup.sh codec`` once; everything then runs in that environment. The pages
come from ``bench/kv.py``, the first time in the project's environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import kv
import numpy as np
import zstandard
from xxhash import xxh3_64_intdigest

from hicache import heap
from hicache.tier.codec import PageCodec, decode
from hicache.tier.codec.estimate import entropy_bits
from hicache.tier.codec.forms import Form, rest_bytes, split_exponents
from hicache.tier.codec_names import FAST, LOSSLESS, LOSSY, RAW
from hicache.types import Namespace

KEY = bytes(32)
FORMS = {"bfloat16": Form.BFLOAT16, "float16": Form.FLOAT16, "float32": Form.FLOAT32}
Encode = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Pages to compress."""

    kind: str
    page_bytes: int = 2 << 20
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.dtype} {self.page_bytes >> 10} KiB"


CASES = (
    Case("minilm"),
    Case("causal"),
    Case("gauss"),
    Case("zeros"),
    Case("minilm", 16 * 9216),
    Case("causal", 16 * 4096),
    Case("minilm", dtype="float16"),
    Case("minilm", dtype="float32"),
    Case("bytes", dtype="int8"),
)


def pages_of(case: Case, count: int) -> kv.U8:
    if case.kind == "bytes":  # as incompressible as int8 noise
        return np.random.default_rng(0).integers(0, 256, (count, case.page_bytes), dtype=np.uint8)
    return np.array(kv.pages(case.kind, case.page_bytes, count, dtype=case.dtype))


def ours(case: Case, name: str) -> tuple[Encode, Encode]:
    form = kv.shape(case.kind)
    tokens = max(1, case.page_bytes // form.token_bytes(case.dtype))
    codec = name if name in (RAW, *LOSSY) else LOSSLESS
    counts = {"layers": form.layers, "kv_heads": form.kv_heads, "head_size": form.head_size}
    spec = Namespace("bench", tokens, case.page_bytes, kv_dtype=case.dtype, codec=codec, **counts)
    page_codec = PageCodec(spec, setting=FAST if name == FAST else LOSSLESS)
    into = np.empty(case.page_bytes, np.uint8)

    def back(record: Any) -> Any:
        found = decode(record, KEY, memoryview(into))
        assert not found.reason, found.reason
        return into

    return lambda page: page_codec.encode(memoryview(page), KEY).record, back


def zstd(level: int) -> tuple[Encode, Encode]:
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return compressor.compress, decompressor.decompress


def copy_and_hash(case: Case) -> tuple[Encode, Encode]:
    into = np.empty(case.page_bytes, np.uint8)

    def copy(page: Any) -> Any:
        made = page.copy()
        xxh3_64_intdigest(made)
        return made

    def back(made: Any) -> Any:
        np.copyto(into, made)
        xxh3_64_intdigest(into)
        return into

    return copy, back


def peers(case: Case) -> dict[str, tuple[Encode, Encode]]:
    import blosc2
    import zipnn

    item = kv.item_bytes(case.dtype) if case.dtype in FORMS else 1
    blosc2.set_nthreads(1)
    found: dict[str, tuple[Encode, Encode]] = {
        "blosc2 zstd-1 shuffle": (
            lambda page: blosc2.compress2(
                page,
                codec=blosc2.Codec.ZSTD,
                clevel=1,
                filters=[blosc2.Filter.SHUFFLE],
                typesize=item,
                nthreads=1,
            ),
            lambda made: blosc2.decompress2(made, nthreads=1),
        )
    }
    if case.dtype in FORMS:
        net = zipnn.ZipNN(bytearray_dtype=case.dtype, threads=1)
        # It works on the bytearray that it is given; making that is not timed against it.
        found["zipnn"] = (net.compress, net.decompress)
    return found


def contenders(case: Case, *, with_peers: bool) -> dict[str, tuple[Encode, Encode]]:
    lossy = LOSSY if case.dtype in {"bfloat16", "float16"} else ()
    found = {f"hicache {name}": ours(case, name) for name in (LOSSLESS, FAST, RAW, *lossy)}
    found["copy and hash"] = copy_and_hash(case)
    found |= {f"zstd {level}": zstd(level) for level in (-5, 1, 3)}
    return found | peers(case) if with_peers else found


def sample(
    some: Sequence[Any], name: str, codec: tuple[Encode, Encode], *, check: bool
) -> tuple[float, float, int]:
    """CPU seconds to compress and to decompress the pages, and the bytes they became."""
    given = [bytearray(page) for page in some] if name == "zipnn" else some
    began = time.process_time()
    made = [codec[0](page) for page in given]
    half = time.process_time()
    for one in made:
        codec[1](one)
    took = time.process_time() - half
    if check:
        for page, one in zip(some, made, strict=True):
            assert bytes(codec[1](one)) == page.tobytes(), f"{name} does not round-trip"
    return half - began, took, sum(len(one) for one in made)


def measure(case: Case, some: kv.U8, repetitions: int, *, with_peers: bool) -> list[dict[str, Any]]:
    """One row a contender."""
    taking_part = contenders(case, with_peers=with_peers)
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in taking_part}
    for repetition in range(repetitions + 1):
        for name, codec in taking_part.items():
            lossless = not name.endswith(LOSSY)
            got = sample(list(some), name, codec, check=lossless and not repetition)
            if repetition:
                taken[name].append(got)
    rows = []
    for name, samples in taken.items():
        compress, decompress = (statistics.median(s[at] for s in samples) for at in (0, 1))
        rows.append(
            {
                "case": case.name,
                "contender": name,
                "ratio": some.nbytes / samples[-1][2],
                "compress_gb_s": some.nbytes / 1e9 / compress,
                "decompress_gb_s": some.nbytes / 1e9 / decompress,
                "samples": len(samples),
            }
        )
    return rows


def bounds(case: Case, some: kv.U8) -> dict[str, float]:
    """What order-0 coding of the exponents can reach at best: of all together, and of each channel by itself."""
    if case.dtype not in FORMS or case.kind == "zeros":
        return {}
    form, dims = FORMS[case.dtype], kv.shape(case.kind)
    token = dims.token_bytes(case.dtype)
    tokens = case.page_bytes // token
    whole = np.ascontiguousarray(some[:, : tokens * token]).reshape(-1)
    exponents = np.empty(len(whole) // kv.item_bytes(case.dtype), np.uint8)
    split_exponents(whole, form, exponents)
    channels = dims.kv_heads * dims.head_size
    columns = exponents.reshape(len(some), dims.layers * 2, tokens, channels).transpose(1, 3, 0, 2)
    each = columns.reshape(dims.layers * 2 * channels, -1)
    raw_bits = 8 * kv.item_bytes(case.dtype)
    # rest_bytes of a round number, so that nothing is rounded up
    rest_bits = rest_bytes(form, 8) if form is not Form.FLOAT32 else 24
    return {
        "order0": raw_bits / (rest_bits + entropy_bits(exponents)),
        "per_channel": raw_bits / (rest_bits + float(np.mean([entropy_bits(column) for column in each]))),
    }


def show(rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> None:
    base = {row["contender"]: row for row in rows}["zstd 1"]
    compress, decompress = base["compress_gb_s"], base["decompress_gb_s"]
    print(f"\n{rows[0]['case']}   bounds: {', '.join(f'{k} {v:.3f}' for k, v in limits.items()) or '-'}")
    for row in rows:
        of_bound = f"{row['ratio'] / limits['per_channel']:5.3f} of bound" if limits else ""
        print(
            f"  {row['contender']:<24} ratio {row['ratio']:8.3f}"
            f"  compress {row['compress_gb_s']:6.2f} GB/s ({row['compress_gb_s'] / compress:5.2f} x zstd-1)"
            f"  decompress {row['decompress_gb_s']:6.2f} GB/s"
            f" ({row['decompress_gb_s'] / decompress:5.2f} x)  {of_bound}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=8, help="pages of 2 MiB, or as many bytes (default 8)")
    parser.add_argument("--repetitions", type=int, default=9, help="samples a contender, at least 7")
    parser.add_argument("--cases", nargs="*", default=[], help="only kinds that start so")
    parser.add_argument("--no-peers", action="store_true", help="without blosc2 and zipnn")
    parser.add_argument("--name", default="codec", help="name of the result file")
    parser.add_argument("--note", default="", help="goes into the result file")
    return parser.parse_args()


def main() -> None:
    """Measure every case."""
    options = parse()
    if options.repetitions < harness.MIN_REPETITIONS:
        raise harness.BenchError(f"at least {harness.MIN_REPETITIONS} repetitions")
    cases = [case for case in CASES if not options.cases or case.kind in options.cases]
    counts = {case: max(options.count, options.count * (2 << 20) // case.page_bytes) for case in cases}
    pages = {case: pages_of(case, counts[case]) for case in cases}
    if not options.no_peers and "HICACHE_BENCH_INSIDE" not in os.environ:
        inside = {**os.environ, "HICACHE_BENCH_INSIDE": "1"}
        sys.exit(subprocess.call([harness.venv_python("codec"), __file__, *sys.argv[1:]], env=inside))
    heap.keep_freed(heap.COMMIT_BYTES)  # as the disk tier does; for everybody here
    rows, limits = [], {}
    for case in cases:
        limits[case.name] = bounds(case, pages[case])
        found = measure(case, pages[case], options.repetitions, with_peers=not options.no_peers)
        show(found, limits[case.name])
        rows += found
    packages = ("numpy", "zstandard", "xxhash", "blosc2", "zipnn")
    harness.write(options.name, {"note": options.note, "bounds": limits, "rows": rows}, packages)


if __name__ == "__main__":
    harness.run(main)
