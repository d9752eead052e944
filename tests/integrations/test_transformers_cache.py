"""HiCacheCache: the ways to use it, what it refuses, what it survives, and that doubt stores nothing."""

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
    DeniedError,
    HicacheError,
    InvalidArgumentError,
    UnavailableError,
    UnsupportedError,
)
from hicache.integrations.transformers import HiCacheCache, PrefixStore  # noqa: E402
from hicache.integrations.transformers.cache import kept_of, watched  # noqa: E402
from hicache.integrations.transformers.layers import WholeSlidingLayer  # noqa: E402

PAGE_TOKENS = 8
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def prompt(tokens: int, seed: int = 1, rows: int = 1) -> Any:
    return torch.randint(0, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def prefixes(sidecar: Any, model: Any) -> Any:
    return PrefixStore(sidecar, model, page_tokens=PAGE_TOKENS)


# --- ways to use it


def test_with_the_models_own_generate(model: Any, prefixes: Any, computed: list[int]) -> None:
    ids = prompt(40)
    with HiCacheCache(prefixes) as cache:
        wanted = model.generate(ids, past_key_values=cache, **GREEDY)
    assert cache.stored.committed.stored_pages == 5
    computed.clear()
    with HiCacheCache(prefixes) as cache:
        found = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(found, wanted)
    assert computed == [1] * 8, "of 40 tokens one is computed: the last page is cut"
    assert cache.loaded_tokens == [39]
    assert prefixes.counts.stored_pages == 5
    assert not model._forward_pre_hooks


def test_in_a_loop_of_ones_own(model: Any, prefixes: Any, computed: list[int]) -> None:
    ids = prompt(20)
    for wanted in ([20, 1, 1, 1, 9], [4, 1, 1, 1, 1]):
        computed.clear()
        with HiCacheCache(prefixes) as cache, torch.no_grad():
            fed, said = ids, []
            for _ in range(4):
                fed = model(fed, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
                said.append(fed)
            model(prompt(9, seed=2), past_key_values=cache, logits_to_keep=1)
        assert computed == wanted, "the second time the next turn's tokens are there as well"


def test_a_conversation_stores_as_it_grows(prefixes: Any) -> None:
    ids = prompt(20)
    for turn in range(3):
        cache = HiCacheCache(prefixes)
        answer = prefixes.generate(ids, cache=cache, **GREEDY)
        assert cache.loaded_tokens == [[0], [24], [40]][turn]
        ids = torch.cat([answer, prompt(6, seed=turn)], dim=1)


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_assisted_decoding(
    make_model: Callable[..., Any], model: Any, prefixes: Any, computed: list[int], kind: str
) -> None:
    ids = torch.cat([prompt(20)] * 3, dim=1)
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if kind == "assistant":
        how = {"assistant_model": make_model(seed=0)}
    wanted = model.generate(ids, **how, **GREEDY)
    assert torch.equal(prefixes.generate(ids, **how, **GREEDY), wanted)
    computed.clear()
    cache = HiCacheCache(prefixes)
    assert torch.equal(prefixes.generate(ids, cache=cache, **how, **GREEDY), wanted)
    assert cache.loaded_tokens[0] >= 56
    assert max(computed) < 20, "candidates are computed even where the sidecar has them"
    with HiCacheCache(prefixes) as cache:
        assert torch.equal(prefixes.model.generate(ids, past_key_values=cache, **how, **GREEDY), wanted)


def test_calls_that_want_all_outputs_are_computed_whole(model: Any, prefixes: Any) -> None:
    ids = prompt(20)
    prefixes.generate(ids, **GREEDY)
    for asked in (
        {},
        {"logits_to_keep": 0},
        {"labels": ids},
        {"output_hidden_states": True},
    ):
        with HiCacheCache(prefixes) as cache, torch.no_grad():
            found = model(ids, past_key_values=cache, **asked)
        assert cache.loaded_tokens == [0]
        if asked.get("logits_to_keep", 0) == 0:
            assert found.logits.shape[1] == 20
    answer = prefixes.generate(ids, return_dict_in_generate=True, output_hidden_states=True, **GREEDY)
    assert answer.hidden_states[0][0].shape[1] == 20


def test_within_a_wrapper_the_model_itself_is_watched(model: Any) -> None:
    wrapper = types.SimpleNamespace(get_base_model=lambda: model)
    assert watched(wrapper) is model
    assert watched(model) is model


def test_gradients_do_not_hinder(model: Any, prefixes: Any) -> None:
    with HiCacheCache(prefixes) as cache:
        model(prompt(20), past_key_values=cache).logits.sum().backward()
    assert cache.stored.committed.stored_pages == 2


def test_equal_rows_are_asked_for_and_stored_once(prefixes: Any, sidecar: Any) -> None:
    ids = prompt(20).repeat(3, 1)
    cache = HiCacheCache(prefixes)
    torch.manual_seed(0)
    prefixes.generate(ids, cache=cache, do_sample=True, max_new_tokens=2, num_return_sequences=2)
    assert sidecar.fetches == 1
    assert cache.stored.committed.stored_pages == 2
    assert cache.stored.present_pages == 0


def test_a_miss_is_not_asked_for_again(prefixes: Any, sidecar: Any) -> None:
    prefixes.generate(prompt(60), prefill_chunk_size=10, **GREEDY)
    assert sidecar.fetches == 1, "six chunks"


def test_a_chunk_takes_over_more(model: Any, prefixes: Any, computed: list[int]) -> None:
    ids = prompt(60)
    prefixes.generate(ids, **GREEDY)
    computed.clear()
    cache = HiCacheCache(prefixes)
    prefixes.generate(ids, cache=cache, prefill_chunk_size=20, **GREEDY)
    assert computed[:3] == [4, 1, 4], "what follows 16, the last of 40 whose page is cut, what follows 56"
    assert cache.loaded_tokens == [51]


def test_only_beams_that_were_given_back_are_stored(prefixes: Any, sidecar: Any) -> None:
    ids = prompt(16)
    answer = prefixes.generate(ids, num_beams=4, max_new_tokens=25, do_sample=False)
    given_back = answer[0, :40].tolist()
    assert all(given_back[: len(stored)] == stored for stored in sidecar.prompts.values() if len(stored) > 16)


def test_ends_of_padding_are_not_stored() -> None:
    rows = [(torch.tensor([1, 2, 3, 9, 9, 9]), 0), (torch.tensor([4, 5, 6, 7]), 2), (torch.tensor([9, 9]), 4)]
    assert kept_of(rows, None) == [4, 4, 1]
    assert kept_of(rows[:1], None) == [6], "a row alone ends where it ends"
    sequences = torch.tensor([[1, 2, 3, 8, 8, 8, 8], [0, 0, 4, 5, 6, 1, 1]])
    assert kept_of(rows, sequences) == [3, 3, 0]
    assert kept_of([], None) == []


# --- what transformers does to a cache


def test_rows_are_followed(model: Any, prefixes: Any, sidecar: Any) -> None:
    ids = prompt(16, rows=3)
    with HiCacheCache(prefixes) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.crop(-3)
        cache.crop(0)
        model(ids[[2, 2, 0, 0], 13:], past_key_values=cache)
        assert [row[0].tolist() for row in cache.sequences()] == ids[[2, 2, 0, 0]].tolist()
    assert sorted(sidecar.prompts.values()) == sorted(ids[[2, 0]].tolist())
    assert cache.loaded_tokens == [0] * 4
    with cache:
        cache.reset()
        model(ids, past_key_values=cache, logits_to_keep=1)
        assert cache.loaded_tokens == [0, 0, 0], "row 1 has none"
        with pytest.raises(InvalidArgumentError, match="in use"), cache:
            pass


def test_sliding_layers_forget_the_end_only() -> None:
    layer = WholeSlidingLayer(4)
    keys = torch.arange(20.0).view(1, 1, 10, 2)
    layer.crop(0)
    assert layer.update(keys[:, :, :3], keys[:, :, :3])[0].shape[2] == 3
    assert layer.update(keys[:, :, 3:8], keys[:, :, 3:8])[0].shape[2] == 8
    assert layer.get_mask_sizes(1) == (4, 5)
    layer.crop(-2)
    seen = layer.update(keys[:, :, 6:7], keys[:, :, 6:7])[0]
    assert torch.equal(seen, keys[:, :, 3:7])
    assert torch.equal(layer.keys, keys[:, :, :7])
    assert layer.get_seq_length() == 7


# --- what it refuses


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"attention_mask": [1, 1, 0, 1]}, "holes"),
        ({"attention_mask": [1, 1, 1, 0]}, "padding on the right"),
        ({"attention_mask": [1, 1, 1]}, r"mask \[1, 3\], not \[1, 4\]"),
        ({"attention_mask": [[[1] * 4] * 4]}, "does not tell plainly"),
        ({"position_ids": [1, 2, 3, 4]}, "do not count"),
        ({"position_ids": [[[0, 1, 2, 3]]]}, "position_ids"),
        ({"token_type_ids": [0, 0, 0, 1]}, "token_type_ids may change"),
        ({"attention_mask": [0, 1, 1, 1]}, "do not count"),
    ],
    ids=str,
)
def test_calls_that_no_prefix_determines_are_refused(
    model: Any, prefixes: Any, call: dict[str, Any], why: str
) -> None:
    given = {name: torch.tensor([value]) for name, value in call.items()}
    with pytest.raises(UnsupportedError, match=why), HiCacheCache(prefixes) as cache:
        model(prompt(4), past_key_values=cache, **given)
    assert not model._forward_pre_hooks


def test_embeddings_are_refused(model: Any, prefixes: Any) -> None:
    embeddings = model.get_input_embeddings()(prompt(4))
    with pytest.raises(UnsupportedError, match="embeddings name no tokens"):
        prefixes.generate(inputs_embeds=embeddings, **GREEDY)


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"cache_implementation": "static"}, UnsupportedError, "'static'"),
        ({"cache_implementation": "offloaded"}, UnsupportedError, "'offloaded'"),
        ({"cache_implementation": "quantized"}, UnsupportedError, "'quantized'"),
        ({"generation_config": {"cache_implementation": "static"}}, UnsupportedError, "'static'"),
        ({"use_cache": False}, InvalidArgumentError, "nothing to load"),
        ({"past_key_values": "odd"}, InvalidArgumentError, "its own cache"),
    ],
    ids=str,
)
def test_other_caches_are_refused(
    prefixes: Any, given: dict[str, Any], error: type[HicacheError], why: str
) -> None:
    if "generation_config" in given:
        given = {"generation_config": transformers.GenerationConfig(**given["generation_config"])}
    with pytest.raises(error, match=why):
        prefixes.generate(prompt(4), **given)


def test_a_dynamic_cache_may_be_named(prefixes: Any) -> None:
    assert prefixes.generate(prompt(4), cache_implementation="dynamic", **GREEDY).shape == (1, 12)


def test_the_pad_token_makes_a_mask_as_ever(model: Any, prefixes: Any) -> None:
    ids = prompt(20, rows=2)
    ids[0, :5] = 96
    wanted = model.generate(ids, pad_token_id=96, **GREEDY)
    for loaded in ([0, 0], [8, 13]):
        cache = HiCacheCache(prefixes)
        assert torch.equal(prefixes.generate(ids, cache=cache, pad_token_id=96, **GREEDY), wanted)
        assert cache.loaded_tokens == loaded
    ids[0, 9] = 96
    with pytest.raises(UnsupportedError, match="holes"):
        prefixes.generate(ids, pad_token_id=96, **GREEDY)


def test_out_of_place(model: Any, prefixes: Any) -> None:
    cache = HiCacheCache(prefixes)
    with pytest.raises(InvalidArgumentError, match="within its `with` block"):
        model.generate(prompt(4), past_key_values=cache, **GREEDY)
    with cache, torch.no_grad():
        with pytest.raises(InvalidArgumentError, match="use_cache=False"):
            model(prompt(4), past_key_values=cache, use_cache=False)
        model(prompt(4), past_key_values=cache)
        with pytest.raises(InvalidArgumentError, match="2 rows are fed to a cache of 1"):
            model(prompt(4, rows=2), past_key_values=cache)
        keys = torch.zeros(1, 2, 1, 16)
        cache.update(keys, keys, 0)
        with pytest.raises(InvalidArgumentError, match="5 columns, of which 4 were seen"):
            model(prompt(4), past_key_values=cache)
    assert cache.stored is None
    model.train()
    with pytest.raises(InvalidArgumentError, match="training mode"):
        prefixes.generate(prompt(4), **GREEDY)


def test_a_row_that_begins_elsewhere_is_refused(model: Any, prefixes: Any) -> None:
    mask = torch.ones(1, 8, dtype=torch.long)
    with torch.no_grad(), HiCacheCache(prefixes) as cache:
        model(prompt(4), past_key_values=cache)
        mask[0, 0] = 0
        with pytest.raises(InvalidArgumentError, match=r"begin in columns \[1\], and began in \[0\]"):
            model(prompt(4), past_key_values=cache, attention_mask=mask)


# --- doubt stores nothing


@pytest.mark.parametrize(
    "odd",
    [{"position_ids": torch.tensor([[7]])}, {"attention_mask": torch.tensor([[1, 1, 0] + [1] * 6])}],
    ids=str,
)
def test_an_odd_step_stores_nothing(
    model: Any, prefixes: Any, sidecar: Any, odd: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with HiCacheCache(prefixes) as cache, torch.no_grad(), caplog.at_level(logging.WARNING):
        model(prompt(8), past_key_values=cache)
        model(prompt(1), past_key_values=cache, **odd)
    assert cache.stored is None
    assert not sidecar.pages
    assert "not certain" in caplog.text
    assert prefixes.counts.failed_stores == 1


def test_many_steps_keep_few_doubts(model: Any, prefixes: Any) -> None:
    cache = HiCacheCache(prefixes)
    prefixes.generate(prompt(8), cache=cache, max_new_tokens=140, do_sample=False)
    assert len(cache._tracker._doubts) < 70
    assert cache.stored.committed.stored_pages == 18


def test_odd_masks_of_steps_are_refused(model: Any, prefixes: Any) -> None:
    padded = {"attention_mask": torch.tensor([[0] + [1] * 7]), "position_ids": torch.tensor([[0, *range(7)]])}
    with HiCacheCache(prefixes) as cache, torch.no_grad():
        model(prompt(8), past_key_values=cache, **padded)
        position = torch.tensor([[7]])
        with pytest.raises(UnsupportedError, match="rows are padded"):
            model(prompt(1), past_key_values=cache, position_ids=position)
        with pytest.raises(UnsupportedError, match="for 9 columns"):
            model(prompt(1), past_key_values=cache, position_ids=position, attention_mask=torch.ones(1, 8))


def test_an_exception_stores_nothing(model: Any, prefixes: Any, sidecar: Any) -> None:
    with pytest.raises(KeyError), HiCacheCache(prefixes) as cache, torch.no_grad():
        model(prompt(8), past_key_values=cache)
        raise KeyError
    assert not sidecar.pages
    assert not model._forward_pre_hooks


def test_nothing_fed_is_nothing_to_store(prefixes: Any) -> None:
    with HiCacheCache(prefixes) as cache:
        pass
    assert cache.stored.present_pages == 0


# --- what it survives


@pytest.mark.parametrize("fault", [UnavailableError, HicacheError])
def test_a_failing_sidecar_costs_computing_only(
    model: Any, prefixes: Any, sidecar: Any, fault: type[HicacheError]
) -> None:
    ids = prompt(20, rows=3)
    wanted = prefixes.generate(ids, **GREEDY)
    sidecar.faults.call = fault("no")
    cache = HiCacheCache(prefixes)
    assert torch.equal(prefixes.generate(ids, cache=cache, **GREEDY), wanted)
    assert (cache.loaded_tokens, cache.stored) == ([0, 0, 0], None)
    assert (prefixes.counts.failed_loads, prefixes.counts.failed_stores) == (1, 1), (
        "asked once, not three times"
    )


def test_a_lease_lost_shortens_all_rows(prefixes: Any, sidecar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hicache.integrations.transformers import pages

    ids = prompt(40, rows=2)
    wanted = prefixes.generate(ids, **GREEDY)
    monkeypatch.setattr(pages, "BATCH_BYTES", prefixes.page_bytes)
    for lost, loaded in ((3, 24), (0, 0)):
        sidecar.faults.lost_from = lost
        cache = HiCacheCache(prefixes)
        assert torch.equal(prefixes.generate(ids, cache=cache, **GREEDY), wanted)
        assert cache.loaded_tokens == [loaded, loaded]
    assert all(lease.releases == 1 for lease in sidecar.leases)


def test_what_the_caller_must_mend_is_raised(prefixes: Any, sidecar: Any) -> None:
    sidecar.faults.call = DeniedError("not yours")
    with pytest.raises(DeniedError):
        prefixes.generate(prompt(20), **GREEDY)
