"""How much sooner vLLM's first token comes where the prompt is in hicache, and how much prefill that saves.

    python bench/vllm_ttft.py [--rounds 9] [--tokens 2000] [--threads 1]

Each round asks one new prompt four times, in turn: of a vLLM without the connector (it computes everything), of the
same vLLM again (from its own cache: the floor), of a vLLM that stores it in the sidecar, and of one whose own cache is
empty, which loads it. Then a trace with much reuse: conversations of several turns that wander between two engines.
Needs ``make e2e``'s environment; writes ``bench/results/vllm_ttft.json``.
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
from engines_kit import Engine, Host, SidecarBox, environment, hicache_connector  # noqa: E402
from engines_models import Models, prompt  # noqa: E402

BAR = 5.0
PACKAGES = ("hicache", "numpy", "grpcio", "protobuf")
SESSIONS, TURNS, SHARED_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 6, 4, 1200, 120, 32


def first_ms(engine: Engine, tokens: list[int], *, external: int, local: int = 0) -> float:
    """Time to the first token; the tokens must come from where they are said to."""
    got = engine.run([tokens], new_tokens=4)
    if (got.external, got.local) != (external, local):
        raise harness.BenchError(f"{got.external} tokens from hicache, {local=}: {external} were expected")
    first = got.answers[0].first_s
    assert first is not None
    return first * 1e3


def ttft(engines: dict[str, Engine], box: SidecarBox, rounds: int, tokens: int) -> dict[str, Any]:
    """The four of each round."""
    taken: dict[str, list[float]] = {"recompute": [], "own_cache": [], "store": [], "hit": []}
    hit = (tokens - 1) // 32 * 32
    for number in range(rounds + 1):
        given = prompt(5000 + number, tokens)
        row = {
            "recompute": first_ms(engines["without"], given, external=0),
            "own_cache": first_ms(engines["without"], given, external=0, local=hit),
            "store": first_ms(engines["storer"], given, external=0),
        }
        box.wait_idle()
        row["hit"] = first_ms(engines["loader"], given, external=hit)
        if number:
            for name, value in row.items():
                taken[name].append(value)
            print(
                f"  round {number}: {row['recompute']:.0f} / {row['hit']:.1f} ms", file=sys.stderr, flush=True
            )
    return {
        "tokens": tokens,
        "rounds": rounds,
        **{f"{name}_ms": statistics.median(values) for name, values in taken.items()},
        "recompute_over_hit": statistics.median(
            a / b for a, b in zip(taken["recompute"], taken["hit"], strict=True)
        ),
        "hit_over_own_cache": statistics.median(
            a / b for a, b in zip(taken["hit"], taken["own_cache"], strict=True)
        ),
    }


def trace(engines: dict[str, Engine], box: SidecarBox) -> dict[str, Any]:
    """Conversations with one long instruction in common; every turn is answered by the other engine.

    Both sides answer the same requests: without the connector twice, so that each of its engines, too, has what it
    computed itself in its own cache (emptied between turns, as if others had needed the blocks).
    """
    shared = prompt(9000, SHARED_TOKENS)
    talks = [shared + prompt(9100 + number, TURN_TOKENS) for number in range(SESSIONS)]
    total = {"without_ms": 0.0, "with_ms": 0.0}
    counts = {"prompt_tokens": 0, "external_tokens": 0, "computed_with": 0, "computed_without": 0}
    for turn in range(TURNS):
        for number, talk in enumerate(talks):
            turns = {
                "without": engines["without"],
                "with": engines[("storer", "loader")[(turn + number) % 2]],
            }
            tokens: dict[str, list[int]] = {}
            for name, engine in turns.items():
                engine.reset()
                got = engine.run([talk], new_tokens=ANSWER_TOKENS)
                first = got.answers[0].first_s
                assert first is not None
                total[f"{name}_ms"] += first * 1e3
                counts[f"computed_{name}"] += got.computed
                counts["external_tokens"] += got.external
                tokens[name] = got.tokens[0]
            counts["prompt_tokens"] += len(talk)
            assert tokens["with"] == tokens["without"], "the same answers"
            talks[number] = talk + tokens["with"] + prompt(9500 + 10 * turn + number, TURN_TOKENS)
            box.wait_idle()
    return {
        "requests": SESSIONS * TURNS,
        **counts,
        **{f"prefill_{name}": value for name, value in total.items()},
        "prefill_saved_ms": total["without_ms"] - total["with_ms"],
        "prefill_saved_share": 1 - total["with_ms"] / total["without_ms"],
    }


def measure(threads: int, rounds: int, tokens: int) -> dict[str, Any]:
    """One set of engines."""
    options = {
        "max_model_len": 4096,
        "num_gpu_blocks_override": 512,
        "environ": {"OMP_NUM_THREADS": str(threads)},
    }
    with (
        Host(environment("vllm")) as host,
        tempfile.TemporaryDirectory(prefix="hicache-models-") as models,
        tempfile.TemporaryDirectory(prefix="hc-") as folder,
        SidecarBox(Path(folder), (), host="2GiB", disk="", start=True) as box,
    ):
        model = Models(host, Path(models))("large")
        connector = hicache_connector(box.target)
        with (
            host.running(model, **options) as without,
            host.running(model, connector=connector, **options) as storer,
            host.running(model, connector=connector, **options) as loader,
        ):
            engines = {"without": without, "storer": storer, "loader": loader}
            found = ttft(engines, box, rounds, tokens)
            return {**found, "trace": trace(engines, box), "engine": host.versions}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="prompts, each asked four times (at least 7)")
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt")
    parser.add_argument("--threads", type=int, default=2, help="of vLLM's computation")
    parser.add_argument("--name", default="vllm_ttft")
    args = parser.parse_args()
    if args.rounds < harness.MIN_REPETITIONS:
        raise harness.BenchError(f"at least {harness.MIN_REPETITIONS} rounds")
    found = measure(args.threads, args.rounds, args.tokens)
    saved = found["trace"]
    print(
        f"{args.tokens} tokens: recompute {found['recompute_ms']:.0f} ms, from hicache {found['hit_ms']:.1f} ms: "
        f"{found['recompute_over_hit']:.1f}x sooner (bar {BAR}); vLLM's own cache {found['own_cache_ms']:.1f} ms\n"
        f"trace: {saved['prefill_saved_ms'] / 1e3:.1f} s of {saved['prefill_without_ms'] / 1e3:.1f} s of prefill "
        f"saved ({saved['prefill_saved_share']:.0%}), {saved['external_tokens']} of {saved['prompt_tokens']} tokens"
    )
    harness.write(args.name, {"bar": BAR, "threads": args.threads, **found}, PACKAGES)


if __name__ == "__main__":
    harness.run(main)
