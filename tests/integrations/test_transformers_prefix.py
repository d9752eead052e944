"""PrefixStore against a sidecar in memory: what it computes, what it survives, what it refuses."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import pytest

WHY = "needs the extra: pip install 'hicache[transformers]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

from hicache.errors import (  # noqa: E402 - after the skips
    CorruptError,
    DeniedError,
    ExhaustedError,
    HicacheError,
    InvalidArgumentError,
    UnavailableError,
    UnsupportedError,
)
from hicache.integrations.transformers import PrefixStore  # noqa: E402
from hicache.integrations.transformers import pages as paging  # noqa: E402
from hicache.integrations.transformers.identity import active_adapters, namespace_fields  # noqa: E402
from hicache.integrations.transformers.support import shape_of  # noqa: E402

PAGE_TOKENS = 8


def prompt(tokens: int, seed: int = 1) -> Any:
    return torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(seed))


def split(model: Any, ids: Any, at: int) -> tuple[Any, Any]:
    """The suffix's logits and the cache, where the prefix was computed in one piece and kept in memory."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :at], past_key_values=cache)
        return model(input_ids=ids[:, at:], past_key_values=cache).logits, cache


def bits(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def store_of(sidecar: Any, model: Any, **settings: Any) -> Any:
    return PrefixStore(sidecar, model, **{"page_tokens": PAGE_TOKENS, **settings})


# --- what it does


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_is_computed_once(make_model: Callable[..., Any], sidecar: Any, dtype: str) -> None:
    model, ids = make_model(dtype=dtype), prompt(45)
    first, second = store_of(sidecar, model), store_of(sidecar, model)
    done = first.prefill(ids[:, :40])
    assert (done.cached_tokens, done.computed_tokens) == (0, 40)
    assert done.stored.committed.stored_pages == 5
    again = second.prefill(ids)
    logits, cache = split(model, ids, 40)
    assert (again.cached_tokens, again.computed_tokens) == (40, 5)
    assert again.stored.present_pages == 5
    assert torch.equal(again.outputs.logits, logits)
    for mine, theirs in zip(again.outputs.past_key_values.layers, cache.layers, strict=True):
        assert bits(mine.keys) == bits(theirs.keys)
        assert bits(mine.values) == bits(theirs.values)
    assert second.counts.cached_tokens == 40
    assert second.counts.computed_tokens == 5


def test_the_model_sees_the_suffix_only(model: Any, sidecar: Any, computed: list[int]) -> None:
    prefixes = store_of(sidecar, model)
    prefixes.prefill(prompt(45), logits_to_keep=1)
    assert prefixes.prefill(prompt(45), logits_to_keep=1).outputs.logits.shape == (1, 1, 97)
    assert computed == [45, 5]


def test_the_last_token_is_always_computed(model: Any, sidecar: Any) -> None:
    prefixes, ids = store_of(sidecar, model), prompt(24)
    assert prefixes.prefill(ids).stored.committed.stored_pages == 3
    assert prefixes.load(ids).cached_tokens == 16
    assert prefixes.load(ids[:, :8]).cached_tokens == 0
    assert prefixes.load(ids[0]).cached_tokens == 16, "one sequence may come without a batch dimension"


def test_generation_goes_on_from_a_loaded_cache(model: Any, sidecar: Any, computed: list[int]) -> None:
    prefixes, ids = store_of(sidecar, model), prompt(40)
    prefixes.prefill(ids)
    wanted = model.generate(
        ids, past_key_values=split(model, ids[:, :33], 32)[1], max_new_tokens=20, do_sample=False
    )
    computed.clear()
    cache = prefixes.load(ids).cache
    found = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert torch.equal(found[:, 40:45], wanted[:, 40:45])
    assert computed[0] == 8
    stored = prefixes.store(found, cache)  # the answer, for the next turn
    assert stored.present_pages == 5
    assert prefixes.load(torch.cat([found, ids], dim=1)).cached_tokens == 56


def test_windows_are_prefilled_whole(make_model: Callable[..., Any], sidecar: Any) -> None:
    import transformers

    config = make_model().config.to_dict() | {"sliding_window": 16, "model_type": "mistral"}
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    prefixes, ids = store_of(sidecar, model), prompt(45)
    first = prefixes.prefill(ids).outputs
    again = prefixes.prefill(ids)
    assert again.cached_tokens == 40
    assert torch.allclose(again.outputs.logits, first.logits[:, 40:], atol=1e-5)
    with torch.no_grad():
        within = transformers.DynamicCache(config=model.config)
        model(ids[:, :15], past_key_values=within)
    assert prefixes.store(ids[:, :15], within).present_pages == 1, "the window is not full yet"


def test_less_than_a_page_is_nothing_to_store(model: Any, sidecar: Any) -> None:
    assert store_of(sidecar, model).prefill(prompt(7)).stored.committed.stored_pages == 0
    assert not sidecar.pages


# --- what it survives


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_corrupt_page_ends_the_prefix(
    model: Any, sidecar: Any, bad: int, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes, ids = store_of(sidecar, model), prompt(45)
    prefixes.prefill(ids)
    sidecar.faults.corrupt_pages = frozenset({bad})
    with caplog.at_level(logging.WARNING):
        done = prefixes.prefill(ids)
    assert done.cached_tokens == bad * PAGE_TOKENS
    assert "checksum differs" in caplog.text
    if bad:
        assert torch.equal(done.outputs.logits, split(model, ids, bad * PAGE_TOKENS)[0])
    assert prefixes.counts.failed_loads == 1
    assert [lease.releases for lease in sidecar.leases] == [1, 1]


def test_a_lost_lease_keeps_what_was_copied(
    model: Any, sidecar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, ids = store_of(sidecar, model), prompt(45)
    prefixes.prefill(ids)
    monkeypatch.setattr(paging, "BATCH_BYTES", 2 * prefixes.page_bytes)
    sidecar.faults.lost_from = 3
    assert prefixes.load(ids).cached_tokens == 2 * PAGE_TOKENS
    assert sidecar.leases[-1].releases == 1


@pytest.mark.parametrize("fault", [UnavailableError, ExhaustedError, CorruptError, HicacheError])
def test_a_failing_sidecar_costs_computing_only(
    model: Any, sidecar: Any, fault: type[HicacheError], computed: list[int]
) -> None:
    prefixes, ids = store_of(sidecar, model), prompt(45)
    prefixes.prefill(ids)
    sidecar.faults.call = fault("no")
    done = prefixes.prefill(ids)
    assert done.cached_tokens == 0
    assert done.stored is None
    assert computed == [45, 45]
    assert (prefixes.counts.failed_loads, prefixes.counts.failed_stores) == (1, 1)
    with pytest.raises(fault):
        prefixes.store(ids, done.outputs.past_key_values)


def test_a_sidecar_out_of_reach_is_waited_for_once(model: Any, sidecar: Any) -> None:
    prefixes = store_of(sidecar, model)
    sidecar.attached = False
    assert prefixes.prefill(prompt(45)).stored is None
    assert prefixes.counts.failed_stores == 1


def test_what_the_caller_must_mend_is_raised(model: Any, sidecar: Any) -> None:
    prefixes = store_of(sidecar, model)
    sidecar.faults.call = DeniedError("not yours")
    with pytest.raises(DeniedError):
        prefixes.prefill(prompt(45))
    assert prefixes.counts.failed_loads == 0


# --- what it refuses


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"attention_chunk_size": 16}, "chunked attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer 0 .*Linear"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"is_causal": False}, "bidirectional"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rope type longrope"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_models_that_no_prefix_determines_are_refused(
    model: Any, sidecar: Any, change: dict[str, Any], why: str
) -> None:
    for name, value in change.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(UnsupportedError, match=why):
        store_of(sidecar, model)


def test_models_of_more_than_text_are_refused(model: Any, sidecar: Any) -> None:
    text = types.SimpleNamespace()
    config = types.SimpleNamespace(model_type="llava", get_text_config=lambda **_: text)
    with pytest.raises(UnsupportedError, match="llava takes more than text"):
        PrefixStore(sidecar, types.SimpleNamespace(config=config))  # type: ignore[arg-type]


def test_models_that_are_not_all_here_are_refused(make_model: Callable[..., Any], sidecar: Any) -> None:
    with pytest.raises(UnsupportedError, match="one device, not on meta"):
        store_of(sidecar, make_model().to("meta"))
    parallel = make_model()
    parallel._tp_size = 2
    with pytest.raises(UnsupportedError, match="tensor parallel"):
        store_of(sidecar, parallel)


def test_prompts_of_more_than_one_sequence_are_refused(model: Any, sidecar: Any) -> None:
    prefixes, ids = store_of(sidecar, model), prompt(16)
    mask = torch.ones_like(ids)
    for call in (prefixes.load, prefixes.prefill):
        with pytest.raises(UnsupportedError, match="batch of 2"):
            call(ids.repeat(2, 1))
        with pytest.raises(InvalidArgumentError, match="input_ids must be integers"):
            call(ids.float())
        with pytest.raises(InvalidArgumentError, match="input_ids must be integers"):
            call(ids[:, :0])
        with pytest.raises(InvalidArgumentError, match="does not go with"):
            call(ids, mask[:, 1:])
        mask[0, 0] = 0
        with pytest.raises(UnsupportedError, match="padding"):
            call(ids, mask)
        mask[0, 0] = 1
        call(ids, mask)


def test_caches_that_lack_tokens_are_refused(model: Any, sidecar: Any) -> None:
    prefixes, ids = store_of(sidecar, model), prompt(40)
    config = model.config
    static = transformers.StaticCache(config=config, max_cache_len=64)
    with pytest.raises(UnsupportedError, match="StaticCache cannot be stored"):
        prefixes.store(ids, static)
    sliding = transformers.DynamicCache()
    sliding.layers = [transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=16) for _ in range(2)]
    with torch.no_grad():
        model(ids, past_key_values=sliding)
    with pytest.raises(UnsupportedError, match="holds the last 15 tokens of 40: its window has passed"):
        prefixes.store(ids, sliding)
    cache = split(model, ids, 39)[1]
    cache.offloading = True
    with pytest.raises(UnsupportedError, match="offloading"):
        prefixes.store(ids, cache)
    assert not sidecar.pages


def test_caches_of_other_shapes_are_refused(make_model: Callable[..., Any], sidecar: Any) -> None:
    model, ids = make_model(), prompt(40)
    prefixes = store_of(sidecar, model)
    with pytest.raises(InvalidArgumentError, match="not all of them filled"):
        prefixes.store(ids, transformers.DynamicCache(config=model.config))
    with pytest.raises(InvalidArgumentError, match=r"bfloat16.*not torch.float32"):
        prefixes.store(ids, split(make_model(dtype="bfloat16"), ids, 39)[1])
    with pytest.raises(InvalidArgumentError, match="layer 0 holds"):
        prefixes.store(ids, split(make_model(num_key_value_heads=4), ids, 39)[1])
    with pytest.raises(UnsupportedError, match="batch of 2"):
        prefixes.store(ids, split(model, ids.repeat(2, 1), 39)[1])
    model.train()
    with pytest.raises(InvalidArgumentError, match="training mode"):
        prefixes.prefill(ids)


# --- what never meets


def fields_of(model: Any, page_tokens: int = PAGE_TOKENS, **settings: Any) -> dict[str, Any]:
    shape = shape_of(model.config, page_tokens, model.dtype)
    return dict(namespace_fields(model, shape, **settings))


def test_one_model_is_one_namespace_wherever_it_lies(make_model: Callable[..., Any], tmp_path: Any) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab"]
    assert fields_of(model) == fields_of(loaded[0]) == fields_of(loaded[1])
    with_revision = [fields_of(each, revision="v1") for each in loaded]
    assert with_revision[0] != with_revision[1], "a revision goes with a name"


def test_what_differs_never_meets(make_model: Callable[..., Any]) -> None:
    nudged = make_model()
    with torch.no_grad():
        weight = nudged.model.layers[1].self_attn.k_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)
    model = make_model()
    others = {
        "weights": fields_of(make_model(seed=1)),
        "one bit of a weight": fields_of(nudged),
        "dtype": fields_of(make_model(dtype="bfloat16")),
        "rope": fields_of(make_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
        "norm": fields_of(make_model(rms_norm_eps=1e-5)),
        "attention": fields_of(make_model(attn_implementation="eager")),
        "page size": fields_of(model, page_tokens=16),
        "adapter": fields_of(model, adapter="legal"),
        "salt": fields_of(model, salt="alice"),
    }
    model.config.name_or_path = "acme/llama"
    others |= {name: fields_of(model, revision=name) for name in ("v1", "v2")}
    others["plain"] = fields_of(make_model())
    for name, fields in others.items():
        assert [other for other in others if others[other] == fields] == [name]


def test_a_revision_needs_a_name(model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="without a model's name"):
        fields_of(model, revision="v1")


def test_weights_that_cannot_be_read_need_a_revision(make_model: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be digested"):
        fields_of(make_model().to("meta"))


class Tuned(torch.nn.Module):
    """What PEFT puts in the place of a layer, as far as we look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.active_adapters = ["legal"]
        self.disable_adapters = False


def test_an_adapter_switched_is_another_model(model: Any, sidecar: Any) -> None:
    assert not active_adapters(model)
    tuned = model.tuned = Tuned()
    model.peft_config = {"legal": object(), "medical": object()}
    prefixes = store_of(sidecar, model)
    assert prefixes.namespace.spec.adapter == "active:legal"
    prefixes.prefill(prompt(20))
    tuned.active_adapters = ["medical"]
    for call in (prefixes.load, prefixes.prefill):
        with pytest.raises(InvalidArgumentError, match="'medical', and were 'legal'"):
            call(prompt(20))
    assert store_of(sidecar, model).load(prompt(20)).cached_tokens == 0
    tuned.disable_adapters = True
    assert not store_of(sidecar, model).namespace.spec.adapter
    tuned.disable_adapters = False
    model.config.name_or_path = "acme/llama"
    with pytest.raises(InvalidArgumentError, match="a revision does not tell their weights"):
        store_of(sidecar, model, revision="v1")
    assert store_of(sidecar, model, revision="v1", adapter="medical-3").load(prompt(20)).cached_tokens == 0
