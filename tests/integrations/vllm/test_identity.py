from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_kit import MODEL, make_facts, make_settings

from hicache import keys
from hicache.errors import ConfigError, UnsupportedError
from hicache.integrations.vllm import weights
from hicache.integrations.vllm.engine import EngineFacts, LayerFacts, ModelFacts
from hicache.integrations.vllm.identity import adapter_digest, namespace_fields
from hicache.integrations.vllm.weights import folder_digest
from hicache.rpc.client.arguments import make_namespace

NAMED = make_settings(model_identity="my-model@3")


def fingerprint(facts: EngineFacts, settings: Any = NAMED, **keywords: str) -> bytes:
    return keys.fingerprint(make_namespace(**namespace_fields(facts, settings, **keywords)).spec)


BASE = make_facts()
OTHERS: dict[str, EngineFacts] = {
    "version": make_facts(version="0.32.1"),
    "kv dtype": make_facts(kv_dtype="uint8/fp8"),
    "windows": make_facts(attention="FullAttentionSpec window 128 chunk None"),
    "backend": make_facts(backend="cuda:FLASH_ATTN"),
    "layout": make_facts(layout="LBNHC"),
    "isa": make_facts(isa="amx"),
    "block size": make_facts(block_size=64),
    "heads": make_facts(kv_heads=4, head_size=16),
    "ranks": make_facts(world=2),
    "dtype": make_facts(model=dataclasses.replace(MODEL, dtype="float32")),
    "quantisation": make_facts(model=dataclasses.replace(MODEL, quantization="awq")),
    "rope": make_facts(
        model=dataclasses.replace(MODEL, config={**MODEL.config, "rope_parameters": {"rope_theta": 5e5}})
    ),
}
OTHERS["a layer's name"] = dataclasses.replace(
    BASE, layers=(LayerFacts("elsewhere", BASE.layers[0].block_bytes), *BASE.layers[1:])
)


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_changes_the_kv_or_its_bytes_changes_the_namespace(what: str) -> None:
    assert fingerprint(OTHERS[what]) != fingerprint(BASE)


def test_what_changes_neither_leaves_it() -> None:
    same = dataclasses.replace(
        BASE,
        rank=0,
        num_blocks=9999,
        steps_ahead=1,
        model=dataclasses.replace(
            MODEL, name="elsewhere", max_model_len=99, config={**MODEL.config, "use_cache": False}
        ),
    )
    assert fingerprint(same) == fingerprint(BASE)


def test_pages_adapters_salts_and_names() -> None:
    fields = namespace_fields(make_facts(world=2), make_settings(model_identity="m", page_tokens=96))
    assert (fields["page_tokens"], fields["world_size"]) == (96, 2)
    assert fields["page_bytes"] == 2 * 3 * BASE.part_block_bytes
    prints = {
        fingerprint(BASE),
        fingerprint(BASE, adapter="lora:1"),
        fingerprint(BASE, salt="s"),
        fingerprint(BASE, make_settings(model_identity="my-model@4")),
        fingerprint(BASE, make_settings(model_identity="my-model@3", page_tokens=64)),
    }
    assert len(prints) == 5
    with pytest.raises(ConfigError, match="not a multiple"):
        namespace_fields(BASE, make_settings(model_identity="m", page_tokens=40))


def test_the_longest_context_counts_where_rope_depends_on_it() -> None:
    def revision(kind: str, length: int) -> str:
        config = {"text_config": {"rope_parameters": {"rope_type": kind}}}
        return revision_of(dataclasses.replace(MODEL, config=config, max_model_len=length))

    assert revision("longrope", 4096) != revision("longrope", 8192)
    assert revision("llama3", 4096) == revision("llama3", 8192)


def revision_of(model: ModelFacts) -> str:
    return namespace_fields(make_facts(model=model), NAMED)["revision"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "llama", "hidden_size": 64, "use_cache": True, "rope": {"rope_type": "llama3"}},
            "1821f3d721978fa73651119bb8ea9e208212cbb5fad375356842c529f3fe589f",
        ),
        (
            {"text": {"rope_type": "dynamic"}, "layers": {1: "a", 2: None}, "dtype": "no matter"},
            "3ed3983301c441e2a60c9b28040a17d8ddf02848d5c3eff3af721a82d3fdc105",
        ),
    ],
    ids=["llama", "dynamic"],
)
def test_the_digest_of_a_configuration_is_what_pages_on_disks_have(
    config: dict[str, Any], expected: str
) -> None:
    model = dataclasses.replace(MODEL, config=config, quantization="awq")
    assert revision_of(model) == f"named:my-model@3 config:{expected}"


def test_a_configuration_with_odd_keys_has_an_identity_too() -> None:
    odd = dataclasses.replace(MODEL, config={"layers": {1: "a", "b": 2}})
    other = dataclasses.replace(MODEL, config={"layers": {1: "a", "b": 3}})
    assert revision_of(odd) != revision_of(other)


# --- weights


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    said = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(said)) + said + b"".join(tensors.values()))


def random_bytes(count: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).tobytes()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are sampled from 1 KiB on, so that a test's are."""
    monkeypatch.setattr(weights, "WHOLE_BYTES", 1024)
    monkeypatch.setattr(weights, "SAMPLE_BYTES", 16)


def test_a_digest_of_few_bytes_sees_each_of_them(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    data = bytearray(random_bytes(5000, 1))
    write_safetensors(file, {"a": bytes(data[:2000]), "b": bytes(data[2000:])})
    first = folder_digest(tmp_path)
    data[3333] ^= 1
    write_safetensors(file, {"a": bytes(data[:2000]), "b": bytes(data[2000:])})
    assert folder_digest(tmp_path) != first


@pytest.mark.usefixtures("small_steps")
def test_samples_of_large_files_see_every_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model-00001-of-00002.safetensors"
    tensors = {name: random_bytes(5000, seed) for seed, name in enumerate("abc")}
    write_safetensors(file, tensors)
    first = folder_digest(tmp_path)
    assert folder_digest(tmp_path) == first
    for name in tensors:
        changed = {**tensors, name: random_bytes(5000, 99)}
        write_safetensors(file, changed)
        assert folder_digest(tmp_path) != first, name
    write_safetensors(file, {"x": tensors["a"], "b": tensors["b"], "c": tensors["c"]})
    assert folder_digest(tmp_path) != first, "another tensor of the same bytes"
    write_safetensors(file, tensors)
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    (elsewhere / file.name).write_bytes(file.read_bytes())
    assert folder_digest(elsewhere) == first, "a copy is the same model"


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_files_of_other_formats_are_sampled_evenly(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(random_bytes(9000, 1))
    first = folder_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert folder_digest(tmp_path) == first, "no weights"
    assert folder_digest(tmp_path / name) == first
    (tmp_path / "modeling_mine.py").write_text("# the model's own code")
    assert folder_digest(tmp_path) != first
    (tmp_path / "modeling_mine.py").unlink()
    (tmp_path / name).write_bytes(random_bytes(9000, 2))
    assert folder_digest(tmp_path) != first
    (tmp_path / name).write_bytes(random_bytes(9000, 1) + b"\0")
    assert folder_digest(tmp_path) != first, "longer"


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 60) + bytes(3000),
        struct.pack("<Q", 10) + b"not json!!" + bytes(3000),
        struct.pack("<Q", 12) + b'{"a": {}}   ' + bytes(3000),
        struct.pack("<Q", 12) + b"[1, 2, 3, 4]" + bytes(3000),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UnsupportedError, match="not a safetensors file"):
        folder_digest(tmp_path)


def test_weights_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    settings = make_settings()
    with pytest.raises(UnsupportedError, match="set model_identity"):
        namespace_fields(BASE, settings)
    for path, why in ((tmp_path, "no weights"), (tmp_path / "gone", "cannot be read")):
        model = dataclasses.replace(MODEL, path=str(path))
        with pytest.raises(UnsupportedError, match=why):
            namespace_fields(make_facts(model=model), settings)


def test_the_weights_tell_models_apart_and_their_place_does_not(tmp_path: Path) -> None:
    def at(folder: str, seed: int) -> bytes:
        (tmp_path / folder).mkdir()
        write_safetensors(tmp_path / folder / "model.safetensors", {"a": random_bytes(100, seed)})
        model = ModelFacts(folder, "", str(tmp_path / folder), "auto", "", MODEL.config, "bfloat16", 4096)
        return fingerprint(make_facts(model=model), make_settings())

    assert at("one", 1) == at("copy", 1) != at("two", 2)


@pytest.mark.parametrize("load_format", ["dummy", "tensorizer", "ipc_cache", "modelexpress", "someones_own"])
def test_weights_that_need_not_be_those_in_the_folder_need_a_name(tmp_path: Path, load_format: str) -> None:
    """A trainer starts engines with made-up weights and gives them its own: two runs have the same configuration."""
    write_safetensors(tmp_path / "model.safetensors", {"a": random_bytes(100, 1)})
    model = dataclasses.replace(MODEL, path=str(tmp_path), load_format=load_format)
    with pytest.raises(UnsupportedError, match=load_format):
        namespace_fields(make_facts(model=model), make_settings())
    assert fingerprint(make_facts(model=model), make_settings(model_identity="run 7, step 100"))


def test_an_adapter_is_its_configuration_and_its_weights(tmp_path: Path) -> None:
    def adapter(folder: str, seed: int, rank: int) -> str:
        home = tmp_path / folder
        home.mkdir()
        write_safetensors(home / "adapter_model.safetensors", {"a": random_bytes(100, seed)})
        (home / "adapter_config.json").write_text(json.dumps({"r": rank}))
        return adapter_digest(folder, str(home))

    assert adapter("a", 1, 8) == adapter("copy", 1, 8)
    assert len({adapter("b", 1, 8), adapter("c", 2, 8), adapter("d", 1, 16)}) == 3
    with pytest.raises(UnsupportedError, match="no folder"):
        adapter_digest("x", "someone/adapter")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(UnsupportedError, match="cannot be read"):
        adapter_digest("a", str(tmp_path / "a"))
