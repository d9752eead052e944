"""A small Llama with random weights, and a sidecar in memory whose pages can be made to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hicache import keys
from hicache.errors import CorruptError, HicacheError, NotFoundError
from hicache.rpc.client import CommitResult, StoreResult, buffers, prompt
from hicache.rpc.client.arguments import make_namespace

WHY = "needs the extra: pip install 'hicache[transformers]'"


@dataclasses.dataclass
class Faults:
    """What goes wrong. ``lost_from``: the lease is lost when this page is read."""

    call: HicacheError | None = None
    corrupt_pages: frozenset[int] = frozenset()
    lost_from: int | None = None


@dataclasses.dataclass
class FakeSidecar:
    """The part of a Client that PrefixStore uses. Pages live by the keys that a real one would give them."""

    faults: Faults = dataclasses.field(default_factory=Faults)
    pages: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
    prompts: dict[bytes, list[int]] = dataclasses.field(default_factory=dict)  # what pages were stored for
    leases: list[FakeLease] = dataclasses.field(default_factory=list)
    fetches: int = 0
    attached: bool = True

    def namespace(self, **fields: Any) -> FakeNamespace:
        return FakeNamespace(self, make_namespace(**fields).spec)


class FakeNamespace:
    def __init__(self, sidecar: FakeSidecar, spec: Any) -> None:
        self.sidecar = sidecar
        self.spec = spec

    def _keys(self, tokens: Any) -> list[bytes]:
        if self.sidecar.faults.call is not None:
            raise self.sidecar.faults.call
        packed = prompt.pack(self.spec, tokens)
        return keys.chain_keys(keys.fingerprint(self.spec), packed, self.spec.symbol_bytes)

    def fetch(self, tokens: Any, *, wait_ms: int, timeout_s: float | None) -> FakeLease:
        found = []
        self.sidecar.fetches += 1
        for key in self._keys(tokens):
            if key not in self.sidecar.pages:
                break
            found.append(self.sidecar.pages[key])
        lease = FakeLease(found, self.sidecar.faults, self.spec.page_bytes)
        self.sidecar.leases.append(lease)
        return lease

    def reserve(self, tokens: Any, *, wait_ms: int, timeout_s: float | None) -> FakeReservation:
        wanted = self._keys(tokens)
        self.sidecar.prompts[wanted[-1]] = [int(token) for token in tokens]
        return FakeReservation(self.sidecar.pages, wanted, self.spec.page_bytes)


class FakeLease:
    def __init__(self, pages: list[bytes], faults: Faults, page_bytes: int) -> None:
        self._pages = pages
        self._faults = faults
        self._page_bytes = page_bytes
        self.releases = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __enter__(self) -> FakeLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.releases += 1

    def copy_into(self, into: Any, first: int, count: int, *, verify: str) -> int:
        assert verify == "on-copy"
        asked = range(first, first + count)
        if self._faults.lost_from is not None and self._faults.lost_from in asked:
            raise NotFoundError("the lease has expired")
        for row, page in zip(buffers.page_rows(into, self._page_bytes, count), asked, strict=True):
            row[:] = memoryview(self._pages[page])
        if self._faults.corrupt_pages.intersection(asked):
            raise CorruptError("a checksum differs")
        return count


class FakeReservation:
    def __init__(self, pages: dict[bytes, bytes], wanted: list[bytes], page_bytes: int) -> None:
        self._pages = pages
        self._wanted = wanted
        self._page_bytes = page_bytes

    def __enter__(self) -> FakeReservation:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def store(self, fill: Callable[[int, memoryview], object], *, durable: bool) -> StoreResult:
        missing = [page for page, key in enumerate(self._wanted) if key not in self._pages]
        for page in missing:
            data = bytearray(self._page_bytes)
            fill(page, memoryview(data))
            self._pages[self._wanted[page]] = bytes(data)
        return StoreResult(len(self._wanted) - len(missing), CommitResult(stored_pages=len(missing)))


@pytest.fixture
def sidecar() -> FakeSidecar:
    return FakeSidecar()


@pytest.fixture(scope="session")
def make_sidecar() -> Callable[[], FakeSidecar]:
    return FakeSidecar


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Makes a Llama with grouped-query attention and weights from a fixed seed; keywords go to its configuration."""
    pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)

    def make(seed: int = 0, dtype: str = "float32", **config: Any) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))
        return model.to(getattr(torch, dtype)).eval()

    return make


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture
def computed(model: Any) -> Iterator[list[int]]:
    """How many tokens the model embedded, call by call."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: counts.append(ids[0].numel())
    )
    yield counts
    hook.remove()
