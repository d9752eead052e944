"""What the doctor says about engines: packages, settings key by key, sizes, a sidecar that is there or not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hicache.cli import doctor_engine, engine_probes, main
from hicache.cli.doctor_engine import Request
from hicache.cli.engine_probes import EngineFacts
from hicache.cli.probes import Probe
from hicache.cli.verdicts import Check, Verdict
from hicache.errors import ConfigError, UnavailableError
from hicache.rpc.client.results import Capabilities, TierInfo

SOCKET = "unix:///run/hicache.sock"
FACTS = EngineFacts(
    engine="vllm",
    distribution="vllm",
    version="0.32.1",
    versions={"protobuf": "6.33", "grpcio": "1.81", "numpy": "2.3"},
    clashes=(),
    adapter=Probe({"module": "hicache.integrations.vllm.connector"}),
    shared_memory_problem="",
    shm_bytes=8 << 30,
)
LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "dtype": "bfloat16",
    "max_position_embeddings": 8192,
}


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def worst(checks: list[Check]) -> Verdict:
    return max((check.verdict for check in checks), key=list(Verdict).index)


# --- packages


def test_the_versions_are_those_of_the_adapters() -> None:
    pytest.importorskip("torch")
    from hicache.integrations.vllm import engine

    assert (doctor_engine.TESTED["vllm"],) == engine.VERSIONS


@pytest.mark.parametrize(
    ("change", "name", "verdict", "says"),
    [
        ({}, "vllm", Verdict.FINE, "0.32.1"),
        ({"version": ""}, "vllm", Verdict.CHANGE, "with that interpreter"),
        ({"version": "0.33.0"}, "vllm", Verdict.CHANGE, "allow_other_versions"),
        ({"engine": "transformers", "version": "4.57"}, "transformers", Verdict.ADVICE, "tested with 5.x"),
        ({"clashes": ("vllm asks for protobuf>=6",)}, "packages", Verdict.CHANGE, "protobuf>=6"),
        ({"versions": {"numpy": "2.3"}}, "packages", Verdict.CHANGE, "protobuf, grpcio missing"),
        ({"adapter": Probe({}, "ImportError: no")}, "adapter", Verdict.CHANGE, "ImportError"),
        ({"shared_memory_problem": "denied"}, "engine's memory", Verdict.CHANGE, "PID namespace"),
        ({"shm_bytes": 64 << 20}, "engine's /dev/shm", Verdict.ADVICE, "--shm-size"),
    ],
)
def test_packages(change: dict[str, Any], name: str, verdict: Verdict, says: str) -> None:
    checks = doctor_engine.judge_packages(dataclasses.replace(FACTS, **change))
    check = found(checks)[name]
    assert check.verdict is verdict
    assert says in check.found + check.advice
    assert worst(checks) is verdict


def test_probes_of_this_interpreter() -> None:
    facts = engine_probes.gather("sglang", 0)
    assert facts.shared_memory_problem == ""
    assert "numpy" in facts.versions
    if not facts.version:
        assert "not installed" in facts.adapter.problem
    assert engine_probes.installed(("no-such-package", "numpy"))[0] == "numpy"


def test_clashing_requirements_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("packaging")
    needs = [
        "protobuf>=99",
        "grpcio",
        "numpy<1; python_version < '3'",
        "torch>=99; extra == 'gpu'",
        "other>=9",
    ]
    monkeypatch.setattr(
        engine_probes.importlib.metadata, "requires", lambda name: needs if name == "vllm" else None
    )
    assert [text.partition(",")[0] for text in engine_probes.clashes("vllm")] == [
        "vllm asks for protobuf>=99"
    ]


# --- settings


def vllm(extra: dict[str, Any] | None = None, **change: Any) -> str:
    given = doctor_engine.vllm_config(SOCKET) | change
    given["kv_connector_extra_config"] |= extra or {}
    return json.dumps({key: value for key, value in given.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "verdict", "says"),
    [
        ("", Verdict.FINE, "pages of 32 tokens, 2 blocks of 16"),
        (vllm({"page_tokens": 64}), Verdict.FINE, "pages of 64 tokens"),
        (vllm({"page_tokens": 40}), Verdict.CHANGE, "page_tokens 40"),
        (vllm({"endpont": "x"}), Verdict.CHANGE, "did you mean 'endpoint'"),
        (vllm({"endpoint": "localhost:1"}), Verdict.CHANGE, "must be a unix socket"),
        (vllm(kv_connector="LMCacheConnector"), Verdict.CHANGE, 'set "kv_connector": "HiCacheConnector"'),
        (vllm(kv_connector_module_path=None), Verdict.CHANGE, "kv_connector_module_path is None"),
        (vllm(kv_role="kv_producer"), Verdict.CHANGE, "kv_both"),
        (vllm(kv_load_failure_policy="fail"), Verdict.ADVICE, "end with an error"),
        (vllm(kv_load_failure_policy="ignore"), Verdict.CHANGE, "recompute"),
        (vllm(kv_load_failure_polcy="fail"), Verdict.CHANGE, "did you mean 'kv_load_failure_policy'"),
        (vllm(endpoint=SOCKET), Verdict.CHANGE, "known keys: kv_connector, engine_id"),
        (vllm(kv_port=1, engine_id="e"), Verdict.FINE, "pages of 32 tokens"),
        ('{"kv_connector_extra_config": 1}', Verdict.CHANGE, "kv_connector_extra_config is missing"),
        ("{'single': 1}", Verdict.CHANGE, "no JSON"),
        ("[]", Verdict.CHANGE, "a JSON object is wanted"),
    ],
)
def test_vllm_settings_are_checked_key_by_key(text: str, verdict: Verdict, says: str) -> None:
    checks = doctor_engine.judge_settings(Request("vllm", SOCKET, text)).checks
    assert worst(checks) is verdict
    assert any(says in check.found + check.advice for check in checks)


def test_all_that_is_wrong_is_said_at_once() -> None:
    checks = doctor_engine.judge_settings(Request("vllm", SOCKET, vllm({"endpont": ""}, kv_role="x"))).checks
    wrong = [check.found for check in checks if check.verdict is Verdict.CHANGE]
    assert [("kv_role" in text, "endpont" in text) for text in wrong] == [(True, False), (False, True)]


@pytest.mark.parametrize("endpoint", [SOCKET, "localhost:1"])
def test_a_wrong_setting_is_not_offered_to_paste(endpoint: str) -> None:
    request = Request("vllm", endpoint, vllm({"endpont": ""}))
    report = doctor_engine.examine(request, FACTS, lambda _: Silent(), "", "")  # type: ignore[arg-type,return-value]
    words = shlex.split(report.command)
    assert worst(doctor_engine.judge_settings(Request("vllm", "", words[-1])).checks) is Verdict.FINE
    advice = found(report.checks)["sidecar"].advice
    assert advice.startswith("start it: hicache serve --socket-path /")


def sglang(**change: Any) -> str:
    return json.dumps(doctor_engine.sglang_config(SOCKET) | change)


@pytest.mark.parametrize(
    ("text", "verdict", "says"),
    [
        ("", Verdict.FINE, "pages of 64 tokens"),
        (sglang(deadline_ms=900, load_wait_ms=100), Verdict.FINE, ""),
        (sglang(dedline_ms=900), Verdict.CHANGE, "did you mean 'deadline_ms'"),
        (sglang(allocator="default"), Verdict.ADVICE, "copied once more"),
        (sglang(class_name="HiCacheFile"), Verdict.CHANGE, "HiCacheStorageBackend"),
        ("@config.json", Verdict.CHANGE, "give the JSON itself"),
    ],
)
def test_sglang_settings_are_checked_key_by_key(text: str, verdict: Verdict, says: str) -> None:
    checks = doctor_engine.judge_settings(Request("sglang", SOCKET, text)).checks
    assert worst(checks) is verdict
    assert any(says in check.found + check.advice for check in checks)


@pytest.mark.parametrize(("engine", "flag"), [("vllm", "kv-transfer"), ("sglang", "backend-extra")])
def test_what_is_offered_to_paste_is_right(engine: str, flag: str) -> None:
    words = shlex.split(doctor_engine.command(Request(engine, SOCKET), SOCKET, "/models/my llama"))
    assert "/models/my llama" in words
    (at,) = [number for number, word in enumerate(words) if flag in word]
    judged = doctor_engine.judge_settings(Request(engine, "unix:///other", words[at + 1]))
    assert (judged.endpoint, worst(judged.checks)) == (SOCKET, Verdict.FINE)


def test_transformers_have_no_settings() -> None:
    request = Request("transformers", SOCKET, block_tokens=16)
    assert doctor_engine.judge_settings(request).page_tokens == 16
    assert "PrefixStore" in doctor_engine.command(request, SOCKET, "")


# --- models and sizes


@pytest.mark.parametrize(
    ("change", "token_bytes", "doubt"),
    [
        ({}, 131072, ""),
        ({"dtype": None, "torch_dtype": "float32"}, 262144, ""),
        ({"head_dim": 256}, 262144, ""),
        ({"num_key_value_heads": None}, 524288, ""),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 36864, ""),
        ({"text_config": LLAMA}, 131072, "more than text"),
        ({"sliding_window": 4096}, 131072, "sliding windows"),
        ({"sliding_window": 4096, "use_sliding_window": False}, 131072, ""),
        ({"layer_types": ["mamba", "full_attention"]}, 131072, "layers of mamba"),
        ({"is_encoder_decoder": True}, 131072, "encoder-decoder"),
        ({"rope_scaling": {"type": "dynamic"}}, 131072, "rope type dynamic"),
    ],
    ids=str,
)
def test_models(change: dict[str, Any], token_bytes: int, doubt: str) -> None:
    model = engine_probes.model_facts(LLAMA | change)
    assert model.token_bytes == token_bytes
    assert model.doubts == ((doubt,) if doubt else ())
    checks = found(doctor_engine.judge_sizes(model, {}, 32, Request("vllm", SOCKET)))
    assert ("model" in checks) == bool(doubt)
    if doubt == "encoder-decoder":
        assert checks["model"].verdict is Verdict.CHANGE


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    for text, why in (("", "config.json"), ("[]", "not a model's"), ("{}", "has no num_hidden_layers")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=why):
            engine_probes.read_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert engine_probes.read_model(str(tmp_path), "fp8").token_bytes == 65536
    with pytest.raises(ConfigError, match="--kv-dtype"):
        engine_probes.read_model(str(tmp_path / "config.json"), "int3")


def test_rooms_are_counted_in_tokens() -> None:
    model = engine_probes.model_facts(LLAMA)  # 4 MiB a page of 32 tokens
    tiers = {"host": 8 << 30, "small": 64 << 20, "tiny": 1 << 20}
    checks = found(doctor_engine.judge_sizes(model, tiers, 32, Request("vllm", SOCKET)))
    assert checks["page"].found.startswith("4.00 MiB for 32 tokens")
    assert checks["room in host"].found == "65,536 tokens in 8.00 GiB"
    assert [checks[f"room in {name}"].verdict for name in tiers] == [
        Verdict.FINE,
        Verdict.ADVICE,
        Verdict.CHANGE,
    ]
    assert doctor_engine.page_bytes_of(model, 32, ranks=8) == 4 << 20
    assert doctor_engine.page_bytes_of(model, 32, ranks=16) == 8 << 20, "each head is held twice"


# --- the sidecar


class Silent:
    """A client of nobody."""

    def __enter__(self) -> Silent:
        raise UnavailableError("nobody listens")

    def __exit__(self, *_: object) -> None:
        raise AssertionError


def test_an_absent_sidecar_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    report = doctor_engine.examine(
        Request("vllm", SOCKET),
        FACTS,
        lambda _: Silent(),
        str(tmp_path),
        "",  # type: ignore[arg-type,return-value]
    )
    checks = found(report.checks)
    assert checks["sidecar"].verdict is Verdict.CHANGE
    assert "nobody listens" in checks["sidecar"].found
    assert report.command.startswith("vllm serve")


def test_a_client_that_does_not_load_is_a_finding() -> None:
    def connect(_: str) -> Any:
        raise ModuleNotFoundError("No module named 'google'")

    checks = found(doctor_engine.examine(Request("sglang", SOCKET), FACTS, connect, "", "").checks)
    assert "No module named 'google'" in checks["sidecar"].found
    assert checks["sidecar"].verdict is Verdict.CHANGE


class Remote:
    """A client whose sidecar passes no memory."""

    missing_pages = 0

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def connect(self) -> Capabilities:
        return Capabilities("1", b"", (TierInfo("disk", "disk", 1 << 30, True, False),), "", 1, 1, 1)

    def namespace(self, **_: object) -> Remote:
        return self

    @contextlib.contextmanager
    def reserve(self, *_: object, **__: object) -> Iterator[Remote]:
        yield self

    def abort(self) -> None:
        return


def test_a_sidecar_without_shared_memory_is_a_finding() -> None:
    checks = found(doctor_engine.judge_sidecar(Remote(), 1))  # type: ignore[arg-type]
    assert checks["shared memory"].verdict is Verdict.CHANGE


@pytest.mark.slow
def test_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from hicache.cli.sidecar import Sidecar

    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 1}))
    with Sidecar(tmp_path, ("--host-bytes", "16MiB", "--no-prefault")) as sidecar:
        words = ["doctor", "--engine", "transformers", "--model", str(tmp_path), "--host-bytes", "16MiB"]
        code = main.main([*words, "--target", sidecar.target, "--json"])
        report = json.loads(capsys.readouterr().out)
        checks = {check["name"]: check for check in report["checks"]}
        assert checks["shared memory"]["verdict"] == "fine"
        assert checks["adapter"]["found"].startswith("hicache.integrations.transformers")
        assert checks["room in host"]["found"].startswith("4,096 tokens")
        assert sidecar.target in report["command"]
        assert code == (not report["fit"])


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "x"],
        ["--kv-transfer-config", "{}"],
        ["--engine", "sglang", "--kv-transfer-config", "{}"],
        ["--engine", "vllm", "--tensor-parallel-size", "0"],
    ],
)
def test_flags_that_do_not_go_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", *words]) == 2
    assert "hicache" in capsys.readouterr().err
