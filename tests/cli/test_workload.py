"""The workload and its page contents: the same from the same seed, and different wherever a mistake could hide."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hicache.cli import payload
from hicache.cli.workload import TurnKind, WorkloadSpec, turns

SPEC = WorkloadSpec(seed=7, turns=120, system_tokens=256, users=4)


def test_equal_specs_give_equal_turns() -> None:
    for one, other in zip(turns(SPEC), turns(SPEC), strict=True):
        assert (one.kind, one.talk, one.prompt_tokens) == (other.kind, other.talk, other.prompt_tokens)
        assert np.array_equal(one.full, other.full)


def test_workers_share_system_prompts_and_nothing_else() -> None:
    mine, theirs = (
        list(turns(WorkloadSpec(seed=7, worker=worker, turns=120, system_prompts=1))) for worker in (0, 1)
    )
    shared = sum(
        1
        for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(mine[0].full, theirs[0].full, strict=False)
        )
    )
    assert shared > 100
    assert all(len(turn.full) > shared for turn in mine)
    assert mine[0].full[shared:].tobytes() != theirs[0].full[shared:].tobytes()


def test_conversations_grow_branch_and_return() -> None:
    latest: dict[int, np.ndarray] = {}
    kinds = set()
    for turn in turns(SPEC):
        kinds.add(turn.kind)
        assert 0 < turn.prompt_tokens < len(turn.full)
        if turn.kind in {TurnKind.GROW, TurnKind.REVISIT} and turn.talk in latest:
            before = latest[turn.talk]
            assert np.array_equal(turn.prompt[: len(before)], before)
        latest[turn.talk] = turn.full
    assert kinds == set(TurnKind)


def symbols(*pages: int) -> bytes:
    return b"".join(page.to_bytes(16, "little") for page in pages)


def test_a_page_depends_on_everything_before_it() -> None:
    base = payload.page_seeds("salt", symbols(1, 2, 3), 16)
    assert np.array_equal(payload.page_seeds("salt", symbols(1, 2, 3, 4), 16)[:3], base)
    assert payload.page_seeds("salt", symbols(9, 2, 3), 16)[2] != base[2]
    assert payload.page_seeds("other", symbols(1, 2, 3), 16)[0] != base[0]
    assert len(set(payload.page_seeds("salt", symbols(1, 1, 1), 16).tolist())) == 3


@pytest.mark.parametrize("page_bytes", [64, 100, 4096])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_wrong_byte_is_found(page_bytes: int, bf16: bool) -> None:
    maker = payload.PageMaker(page_bytes, bf16=bf16)
    seeds = payload.page_seeds("salt", symbols(*range(5)), 16)
    pages = maker.make(seeds)
    assert pages.shape == (5, page_bytes)
    assert np.array_equal(maker.make(seeds[3:4])[0], pages[3])
    assert maker.wrong_bytes(seeds, 2, pages[2:4]) == 0
    assert maker.wrong_bytes(seeds, 1, pages[2:4]) > page_bytes // 2
    broken = pages.copy()
    broken[4, page_bytes - 1] ^= 1
    assert maker.wrong_bytes(seeds, 0, memoryview(broken)) == 1


def test_bf16_pages_look_like_key_value_pages() -> None:
    """The high byte of each value carries about 3 bits, the low byte 8: what the disk codec counts on."""
    pages = payload.PageMaker(1 << 16, bf16=True).make(payload.page_seeds("salt", symbols(*range(8)), 16))

    def entropy_bits(plane: np.ndarray) -> float:
        share = np.bincount(plane.ravel(), minlength=256) / plane.size
        share = share[share > 0]
        return float(-(share * np.log2(share)).sum())

    assert 2.0 < entropy_bits(pages[:, 1::2]) < 4.0
    assert entropy_bits(pages[:, ::2]) > 7.5
