"""What the connector costs vLLM where nothing is ever reused: throughput with it beside throughput without it.

    python bench/vllm_overhead.py [--rounds 21] [--prompts 3] [--threads 1 2]

Two vLLM engines (on the CPU, ``.venv-vllm``) live side by side; one has the connector and a sidecar. Each round gives
both, in turn, the same prompts, which nobody has seen before: every page is stored, none is found. Who begins changes
from round to round. ``--threads``: of vLLM's computation; with 1 the connector's threads and the sidecar have a core
of their own here, with 2 they take from vLLM what they need. Needs ``make e2e``'s environment; writes
``bench/results/vllm_overhead.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(HERE), str(HERE.parent), str(TESTS / "engines"), str(TESTS / "shared")]

import harness  # noqa: E402
from engines_kit import Engine, Host, Round, SidecarBox, environment, hicache_connector  # noqa: E402
from engines_models import Models, prompt  # noqa: E402

BAR = 0.95
TOKENS, NEW_TOKENS = 1000, 16
LEAST_PREFILL_S = 0.1
PACKAGES = ("hicache", "numpy", "grpcio", "protobuf")


def prefill_s(engine: Engine, seed: int) -> float:
    """How long one prompt takes alone until its first token."""
    first = engine.run([prompt(seed, TOKENS)], new_tokens=1).answers[0].first_s
    assert first is not None
    return first


def sample(engine: Engine, prompts: list[list[int]]) -> dict[str, float]:
    """One round of one engine. Nothing must be found."""
    got: Round = engine.run(prompts, new_tokens=NEW_TOKENS, seconds_max=600.0)
    assert (got.external, got.local) == (0, 0), "nothing was to be reused"
    tokens = len(prompts) * (TOKENS + NEW_TOKENS)
    return {"tokens_per_s": tokens / got.seconds, "wall_s": got.seconds, "cpu_s": got.cpu_s}


def measure(host: Host, model: Path, threads: int, rounds: int, prompts: int) -> dict[str, Any]:
    """Both engines in turn."""
    options = {
        "max_model_len": 2048,
        "num_gpu_blocks_override": 512,
        "environ": {"OMP_NUM_THREADS": str(threads)},
    }
    with (
        tempfile.TemporaryDirectory(prefix="hc-") as folder,
        SidecarBox(Path(folder), (), host="1GiB", disk="", start=True) as box,
        host.running(model, **options) as without,
        host.running(model, connector=hicache_connector(box.target), **options) as with_it,
    ):
        alone_s = statistics.median(prefill_s(without, -1 - place) for place in range(5))
        if alone_s < LEAST_PREFILL_S:
            raise harness.BenchError(f"a prefill takes {alone_s * 1e3:.0f} ms: too small a model to tell")
        taken: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
        for number in range(rounds + 1):
            given = [prompt(1000 * number + place, TOKENS) for place in range(prompts)]
            order = [("without", without), ("with", with_it)]
            for name, engine in order if number % 2 else reversed(order):
                got = sample(engine, given)
                if number:  # the first round warms up
                    taken[name].append(got)
            if number:
                ratio = taken["with"][-1]["tokens_per_s"] / taken["without"][-1]["tokens_per_s"]
                print(f"  round {number}: {ratio:.3f}", file=sys.stderr, flush=True)
        metrics = with_it.ask("metrics")
        box.wait_idle()
        stats = box.stats()
    pairs = list(zip(taken["with"], taken["without"], strict=True))
    return {
        "prefill_1000_tokens_ms": alone_s * 1e3,
        "rounds": rounds,
        "prompts_per_round": prompts,
        "throughput_ratio": statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs),
        "throughput_ratio_min": min(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs),
        "throughput_ratio_max": max(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs),
        "cpu_ratio": statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in pairs),
        **{
            f"{name}_{field}": statistics.median(each[field] for each in taken[name])
            for name in taken
            for field in ("tokens_per_s", "cpu_s")
        },
        "stored_pages": stats.tree_pages + sum(tier.evicted_pages for tier in stats.tiers),
        "connector": {key: value for key, value in metrics.items() if "hicache" in key and value},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21, help="samples of each engine (at least 7)")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of a round, all at once")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of vLLM's computation")
    parser.add_argument("--name", default="vllm_overhead")
    args = parser.parse_args()
    if args.rounds < harness.MIN_REPETITIONS:
        raise harness.BenchError(f"at least {harness.MIN_REPETITIONS} rounds")
    found: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for threads in args.threads:
        with (
            Host(environment("vllm")) as host,
            tempfile.TemporaryDirectory(prefix="hicache-models-") as folder,
        ):
            versions = host.versions
            model = Models(host, Path(folder))("large")
            row = found[f"threads_{threads}"] = measure(host, model, threads, args.rounds, args.prompts)
        print(
            f"{threads} threads: {row['throughput_ratio']:.3f}x of vLLM without ({row['throughput_ratio_min']:.3f}"
            f"..{row['throughput_ratio_max']:.3f}), CPU {row['cpu_ratio']:.3f}x, prefill of 1000 tokens "
            f"{row['prefill_1000_tokens_ms']:.0f} ms; bar {BAR}"
        )
    harness.write(args.name, {"bar": BAR, "engine": versions, "rows": found}, PACKAGES)


if __name__ == "__main__":
    harness.run(main)
