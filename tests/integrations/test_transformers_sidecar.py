"""PrefixStore through a real sidecar, between processes, and after the sidecar was killed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from sidecars import Sidecar

WHY = "needs the extra: pip install 'hicache[transformers]'"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

import hicache  # noqa: E402 - after the skips
from hicache.integrations.transformers import PrefixStore  # noqa: E402

WORKER = "prefix_worker"
sys.path.insert(0, str(Path(__file__).parent))
worker: Any = importlib.import_module(WORKER)
SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
PAGES = worker.PREFIX_TOKENS // worker.PAGE_TOKENS
DTYPES = pytest.mark.parametrize("dtype", worker.DTYPES)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_folder(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(seed=5, **SIZES, **HEADS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    folder = tmp_path_factory.mktemp("sidecar")
    disk = ("--disk-path", str(folder / "disk"), "--disk-bytes", "256MiB")
    with Sidecar(folder, ("--host-bytes", "64MiB", "--no-prefault", "--grace", "1s", *disk)) as running:
        yield running


@pytest.fixture(scope="module")
def work(sidecar: Sidecar, model_folder: Path) -> Iterator[Callable[..., Any]]:
    """Runs worker processes, which share libraries that were imported before and no more; what they say, by dtype."""
    nursery = Nursery([WORKER])

    def work(role: str, out: Path) -> Any:
        said = out.with_suffix(".log")
        with said.open("wb") as errors:
            words = [role, sidecar.target, str(model_folder), str(out)]
            child = nursery.fork(f"{WORKER}:main", words, stderr=errors.fileno(), environ=os.environ)
        try:
            assert child.wait(100) == 0, said.read_text()
        finally:
            child.kill()
            child.stdin.close()
            child.stdout.close()
        return torch.load(out, weights_only=False)

    yield work
    nursery.close()


@pytest.fixture(scope="module")
def computed(work: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return work("compute", tmp_path_factory.mktemp("compute") / "out")


@pytest.fixture(scope="module")
def loaded(computed: Any, work: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return work("load", tmp_path_factory.mktemp("load") / "out")


@pytest.fixture(scope="module")
def after_kill(loaded: Any, work: Any, sidecar: Sidecar, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pid = sidecar.pid
    sidecar.kill()
    sidecar.start()
    assert sidecar.pid != pid
    with hicache.Client(sidecar.target) as client:
        assert all(tier.pages == 0 for tier in client.admin.stats().tiers if tier.kind != "disk")
    return work("load", tmp_path_factory.mktemp("again") / "out")


def bits(tensors: Any) -> list[bytes]:
    return [bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in tensors]


def check_loaded(computed: Any, found: Any) -> None:
    """What another process was given is what the first one had, and all it computed is the suffix."""
    assert found["loaded_tokens"] == found["cached_tokens"] == worker.PREFIX_TOKENS >= 1000
    assert bits(found["kv"]) == bits(computed["kv"])
    assert found["embedded"] == [worker.SUFFIX_TOKENS]
    assert found["suffix"].shape[1] == worker.SUFFIX_TOKENS
    assert torch.equal(found["suffix"], computed["suffix"])
    assert bits(found["kv_after"]) == bits(computed["kv_after"])


@DTYPES
def test_the_prefix_is_stored_durably(computed: Any, dtype: str) -> None:
    found = computed[dtype]
    assert found["embedded"][0] == worker.PREFIX_TOKENS
    assert (found["stored"].stored_pages, found["stored"].durable_pages) == (PAGES, PAGES)


@DTYPES
def test_another_process_goes_on_bit_by_bit(computed: Any, loaded: Any, dtype: str) -> None:
    check_loaded(computed[dtype], loaded[dtype])


@DTYPES
def test_the_suffix_is_close_to_one_full_prefill(computed: Any, loaded: Any, dtype: str) -> None:
    tolerance = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
    assert torch.allclose(loaded[dtype]["suffix"], computed[dtype]["full"], rtol=tolerance, atol=tolerance)


@DTYPES
def test_what_differs_gets_nothing(loaded: Any, dtype: str) -> None:
    others = loaded[dtype]["others"]
    assert others == dict.fromkeys(others, 0)
    assert others.keys() >= {"revision", "lora", "dtype", "page size", "weights"}


@DTYPES
def test_a_killed_sidecar_gives_it_all_back(computed: Any, after_kill: Any, dtype: str) -> None:
    check_loaded(computed[dtype], after_kill[dtype])


def test_another_process_generates_from_what_the_first_stored(
    after_kill: Any, work: Any, tmp_path: Path
) -> None:
    first = work("generate", tmp_path / "first")["float32"]
    again = work("generate", tmp_path / "again")["float32"]
    assert first["loaded"] == [70, 0], "row 0 begins as the other tests' prompt, and row 1 with 70 of padding"
    assert first["stored"].committed.stored_pages == 1 + 3, (
        "four pages of row 0 were there; the fifth is the answer's"
    )
    for found in (first, again):
        assert torch.equal(found["found"], found["alone"])
        assert found["stored"] is not None
    # row 0: four pages, 256 columns; row 1: 70 of padding and three pages, 262
    assert again["loaded"] == [256, 186]
    assert again["embedded"][0] == 2 * (310 - 256)


def test_nothing_is_held_afterwards(after_kill: Any, sidecar: Sidecar) -> None:
    with hicache.Client(sidecar.target) as client:
        stats = client.admin.stats()
        assert (stats.leases, stats.reservations) == (0, 0)
        check = client.admin.check()
        assert check.ok, check.problem


def test_a_sidecar_that_dies_costs_computing_only(
    make_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    ids = torch.randint(0, 97, (1, 45), generator=torch.Generator().manual_seed(1))
    sidecar = Sidecar(tmp_path, ("--host-bytes", "8MiB", "--no-prefault"))
    with sidecar, hicache.Client(sidecar.target) as client:
        prefixes = PrefixStore(client, model, page_tokens=8, timeout_s=0.5, wait_ms=100)
        first = prefixes.prefill(ids)
        sidecar.kill()
        again = prefixes.prefill(ids)
        assert again.stored is None
        assert torch.equal(again.outputs.logits, first.outputs.logits)
        sidecar.start()
        client.connect()
        assert prefixes.prefill(ids).stored is not None
        assert prefixes.prefill(ids).cached_tokens == 40
    assert prefixes.counts.failed_loads == 1
    assert "the rest is recomputed" in caplog.text
