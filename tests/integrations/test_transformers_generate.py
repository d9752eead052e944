"""generate() through a HiCacheCache: the same answers as without, whatever the sidecar has of the prompts.

Models are in float64, with norms and softmax in float32 as transformers has them: a computation that is split otherwise
differs by some 1e-7, what is wrong by far more. Where both sides are split alike, they are equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

WHY = "needs the extra: pip install 'hicache[transformers]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

from hypothesis import HealthCheck, given, settings  # noqa: E402 - after the skips
from hypothesis import strategies as st  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from hicache.integrations.transformers import HiCacheCache, PrefixStore  # noqa: E402

PAGE_TOKENS = 4
PAD = 96
CLOSE = 1e-5
EXAMPLES = 15


def ids_of(rows: list[list[int]]) -> tuple[Any, Any]:
    """Rows padded on the left, and their mask."""
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def tokens(count: int, seed: int = 1) -> list[int]:
    found = torch.randint(0, PAD, (count,), generator=torch.Generator().manual_seed(seed))
    return found.tolist()


def store_of(sidecar: Any, model: Any, **settings: Any) -> Any:
    return PrefixStore(sidecar, model, **{"page_tokens": PAGE_TOKENS, **settings})


MODE = {
    "max_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": PAD,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def plain(model: Any, ids: Any, mask: Any, **kwargs: Any) -> Any:
    return model.generate(ids, attention_mask=mask, **{**MODE, **kwargs})


def through(prefixes: Any, ids: Any, mask: Any, **kwargs: Any) -> tuple[Any, list[int]]:
    cache = HiCacheCache(prefixes)
    found = prefixes.generate(ids, cache=cache, attention_mask=mask, **{**MODE, **kwargs})
    return found, cache.loaded_tokens


def check_same(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(found.logits) == len(wanted.logits)
    for mine, theirs in zip(found.logits, wanted.logits, strict=True):
        assert torch.allclose(mine, theirs, rtol=CLOSE, atol=CLOSE)


@pytest.fixture(scope="module")
def family(make_model: Callable[..., Any]) -> dict[str, Any]:
    """Models of one size: all tokens seen by all, a window in each second layer, a window everywhere."""
    torch.set_num_threads(1)
    mixed = {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(3)
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads, **mixed))
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **heads, sliding_window=9))
    qwen = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=4)
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    )
    found = {"llama": make_model(), "gemma3": gemma, "mistral": mistral, "qwen2": qwen, "gpt2": gpt2}
    return {name: model.to(torch.float64).eval() for name, model in found.items()}


FAMILY = pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen2", "gpt2"])


# --- the same answers


@FAMILY
def test_the_second_call_loads_prompt_and_answer(family: Any, sidecar: Any, name: str) -> None:
    model, (ids, mask) = family[name], ids_of([tokens(30)])
    wanted = plain(model, ids, mask)
    first, loaded = through(store_of(sidecar, model), ids, mask)
    assert loaded == [0]
    check_same(first, wanted)
    prefixes = store_of(sidecar, model)
    again, loaded = through(prefixes, ids, mask)
    assert loaded == [28]
    check_same(again, wanted)
    turn, turn_mask = ids_of([first.sequences[0].tolist() + tokens(5, seed=2)])
    found, loaded = through(prefixes, turn, turn_mask)
    assert loaded == [32], "30 tokens, and the five of the answer that were fed back: 35"
    check_same(found, plain(model, turn, turn_mask))


@FAMILY
def test_a_padded_batch_takes_over_what_all_rows_have(family: Any, sidecar: Any, name: str) -> None:
    model = family[name]
    rows = [tokens(30, 1), tokens(17, 2), tokens(23, 3)]
    ids, mask = ids_of(rows)
    wanted = plain(model, ids, mask)
    through(store_of(sidecar, model), ids, mask)
    found, loaded = through(store_of(sidecar, model), ids, mask)
    # whole pages end in column 28 of row 0, in 13 + 16 of row 1, in 7 + 20 of row 2
    assert loaded == [27, 14, 20]
    check_same(found, wanted)


@FAMILY
def test_rows_of_a_batch_are_what_they_are_alone(family: Any, sidecar: Any, name: str) -> None:
    """Stored one by one without padding, loaded into a batch with padding, and the other way round."""
    model = family[name]
    rows = [tokens(26, 1), tokens(15, 2)]
    for row in rows:
        through(store_of(sidecar, model), *ids_of([row]))
    ids, mask = ids_of(rows)
    found, loaded = through(store_of(sidecar, model), ids, mask)
    assert loaded == [23, 12]  # 24 columns, 11 + 12
    check_same(found, plain(model, ids, mask))
    sidecar.pages.clear()
    through(store_of(sidecar, model), ids, mask)
    for row in rows:
        alone, loaded = through(store_of(sidecar, model), *ids_of([row]))
        assert loaded == [(len(row) - 1) // 4 * 4]
        check_same(alone, plain(model, *ids_of([row])))


def test_chunks_of_a_padded_batch_take_over_more_and_more(family: Any, sidecar: Any) -> None:
    """Columns of later chunks begin within pages, and not in the same place of each row."""
    model = family["llama"]
    ids, mask = ids_of([tokens(30, 1), tokens(17, 2), tokens(23, 3)])
    wanted = plain(model, ids, mask)
    through(store_of(sidecar, model), ids, mask)
    found, loaded = through(store_of(sidecar, model), ids, mask, prefill_chunk_size=9)
    assert loaded[0] > 15
    check_same(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True])
def test_equal_splits_give_equal_bits(
    make_model: Callable[..., Any], sidecar: Any, dtype: str, padded: bool
) -> None:
    """Beside a cache that was computed in this process, cut where ours was, and never left it."""
    model = make_model(dtype=dtype)
    ids, mask = ids_of([tokens(41, 1), tokens(30 if padded else 41, 2)])
    through(store_of(sidecar, model), ids, mask)
    found, loaded = through(store_of(sidecar, model), ids, mask)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    cache.crop(loaded[0] - ids.shape[1])
    wanted = plain(model, ids, mask, past_key_values=cache)
    assert loaded[0] >= 35
    assert torch.equal(found.sequences, wanted.sequences)
    for mine, theirs in zip(found.logits, wanted.logits, strict=True):
        assert torch.equal(mine, theirs)


def test_equal_splits_give_equal_bits_in_windows_too(family: Any, sidecar: Any) -> None:
    model = family["mistral"].to(torch.float32)
    try:
        ids, mask = ids_of([tokens(41, 1)])
        through(store_of(sidecar, model), ids, mask)
        found, loaded = through(store_of(sidecar, model), ids, mask)
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        cache.crop(loaded[0] - 41)
        wanted = plain(model, ids, mask, past_key_values=cache)
        assert loaded == [40]
        for mine, theirs in zip(found.logits, wanted.logits, strict=True):
            assert torch.equal(mine, theirs)
    finally:
        model.to(torch.float64)


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """A batch, what the sidecar has been given before, and how to generate."""
    lengths = draw(st.lists(st.integers(1, 26), min_size=1, max_size=3))
    shared = draw(st.integers(0, 20))
    seeds = [draw(st.sampled_from([1, 1, 2])) for _ in lengths]
    rows = [
        (tokens(shared, 9) + tokens(30, seed))[:count] for count, seed in zip(lengths, seeds, strict=True)
    ]
    stored = draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.integers(1, 26)), max_size=3))
    mode: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"num_beams": 2},
                {"num_beams": 3, "num_return_sequences": 2},
                {"do_sample": True, "num_return_sequences": 2},
                {"prefill_chunk_size": 5},
                {"prefill_chunk_size": 9, "num_beams": 2},
                {"eos_token_id": list(range(0, 97, 3))},
            ]
        )
    )
    return {
        "name": draw(st.sampled_from(["llama", "gemma3", "mistral", "gpt2"])),
        "page_tokens": draw(st.sampled_from([1, 2, 3, 4, 8])),
        "rows": rows,
        "stored": [rows[row][:count] for row, count in stored],
        "mode": mode,
        "corrupt": draw(st.frozensets(st.integers(0, 5), max_size=1)),
    }


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(world=worlds())
def test_no_batch_and_no_history_change_an_answer(
    family: Any, make_sidecar: Any, world: dict[str, Any]
) -> None:
    model, sidecar = family[world["name"]], make_sidecar()
    prefixes = store_of(sidecar, model, page_tokens=world["page_tokens"])
    for row in world["stored"]:
        ids, mask = ids_of([row])
        with HiCacheCache(prefixes) as cache, torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
    ids, mask = ids_of(world["rows"])
    sidecar.faults.corrupt_pages = world["corrupt"]
    for _ in range(2):  # the second time the answers are there as well
        torch.manual_seed(4)
        wanted = plain(model, ids, mask, **world["mode"])
        torch.manual_seed(4)
        found, loaded = through(prefixes, ids, mask, **world["mode"])
        check_same(found, wanted)
    each = loaded[:: len(loaded) // len(ids)]  # beams and samples of one prompt are alike
    assert all(0 <= count < len(row) for count, row in zip(each, world["rows"], strict=True))
    if "prefill_chunk_size" not in world["mode"]:
        starts = (mask == 0).sum(dim=1).tolist()
        assert len({start + count for start, count in zip(starts, each, strict=True) if count}) <= 1
    check_pages(sidecar, model, prefixes)


def check_pages(sidecar: Any, model: Any, prefixes: Any) -> None:
    """Every page in the sidecar is that of the tokens it is filed under, computed alone and in one piece."""
    for prompt in sidecar.prompts.values():
        fresh = type(sidecar)()
        alone = store_of(fresh, model, page_tokens=prefixes.page_tokens)
        with HiCacheCache(alone) as cache, torch.no_grad():
            model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
        assert fresh.pages
        for key, page in fresh.pages.items():
            mine, theirs = (
                torch.frombuffer(bytearray(each), dtype=torch.float64) for each in (sidecar.pages[key], page)
            )
            assert torch.allclose(mine, theirs, rtol=CLOSE, atol=CLOSE)
