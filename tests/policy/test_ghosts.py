"""Bounded memories: ghosts against a dict, the sketch against true counts, admissions by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.errors import ConfigError
from hicache.policy.admission import ADMISSIONS, Admission, CostAware, SecondTouch, TinyLfu, make_admission
from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.sketch import CountMin

ids = st.one_of(st.integers(0, 40), st.sampled_from([1 << 63, (1 << 64) - 1, 1 << 32, 7 << 58]))
steps = st.lists(st.tuples(st.sampled_from(["add", "pop", "get", "oldest", "resize"]), ids), max_size=200)


@given(st.integers(0, 30), steps)
def test_ghosts_equal_a_dict_in_order_of_arrival(limit, history):
    """Any history: the same ids in the same order with the same notes, never more than the limit."""
    table, model = GhostTable(limit), {}
    for note, (what, ghost) in enumerate(history):
        if what == "add":
            table.add(ghost, note)
            if limit:
                model.pop(ghost, None)
                model[ghost] = note
        elif what == "pop":
            assert table.pop(ghost) == model.pop(ghost, -1)
        elif what == "get":
            assert table.get(ghost) == model.get(ghost, -1)
        elif what == "oldest":
            assert table.take_oldest() == (model.pop(next(iter(model))) if model else -1)
        elif what == "resize":
            limit = ghost % 31
            table.resize(limit)
        while len(model) > limit:
            del model[next(iter(model))]
        assert list(table) == list(model)
        assert len(table) == len(model)
        assert sorted(table.notes()) == sorted(model.values())


def test_recall_forgets_a_stretch_if_its_first_page_is_there():
    """The first one's note; nothing is forgotten if the first is not there."""
    table = GhostTable(10)
    table.add_all([5, 6, 8], 3)
    assert table.recall([7, 5]) == -1
    assert table.recall([5, 6, 7]) == 3
    assert list(table) == [8]


def test_leading_counts_from_the_first_on():
    """The run of remembered pages at the front of a stretch."""
    table = GhostTable(10)
    table.add_all([5, 6, 8], 1)
    assert [table.leading(each) for each in ([5, 6, 7, 8], [7, 5], [], [8])] == [2, 0, 0, 1]
    assert list(table) == [8, 6, 5]  # the last page of a prompt leaves first


@pytest.mark.parametrize("count", [1_000, 50_000, 200_000])
def test_a_ghost_takes_at_most_64_bytes(count, rng: random.Random):
    """Measured when full, at sizes just before and after the arrays grow."""
    table = GhostTable(count)
    for _ in range(count):
        table.add(rng.getrandbits(64), 1)
    assert len(table) == count
    assert table.nbytes() / count <= 64
    for _ in range(count // 4):
        table.add(rng.getrandbits(64), 1)
    assert len(table) == count
    assert table.nbytes() / count <= 64


def test_sketch_never_counts_too_little(rng: random.Random):
    """Estimates are at least the true count up to the ceiling, mostly exact, half after a halving."""
    sketch, true = CountMin(4096), {}
    for _ in range(3000):
        ghost = rng.randrange(500)
        true[ghost] = true.get(ghost, 0) + 1
        sketch.add(ghost)
    assert all(sketch.estimate(ghost) >= count for ghost, count in true.items())
    assert sum(sketch.estimate(ghost) == count for ghost, count in true.items()) > 0.95 * len(true)
    sketch.halve()
    assert all(sketch.estimate(ghost) >= count // 2 for ghost, count in true.items())
    for _ in range(600):
        sketch.add(1)
    assert sketch.estimate(1) == 255
    assert sketch.nbytes() == 4 * 4096


def test_second_touch_admits_the_second_time():
    """A first comer is refused; a run that was used, or was refused before, is written."""
    admission = SecondTouch(remembered=2)
    info = RunInfo(4, 0)
    assert not admission.admit(info, 0, [1, 2])
    assert admission.admit(info, 0, [1, 2])
    assert admission.admit(info, 1, [7])
    for ghost in (10, 11, 12):
        assert not admission.admit(info, 0, [ghost])
    assert not admission.admit(info, 0, [10])  # forgotten: the memory holds two


def test_tinylfu_admits_what_is_seen_more_often_than_others():
    """Among many askers the popular pass and the singletons do not."""
    admission = TinyLfu(counters=1024)
    info = RunInfo(1, 0)
    popular = [admission.admit(info, 0, [5]) for _ in range(20)]
    assert popular[-1]
    assert not popular[0]
    assert not any(admission.admit(info, 0, [1000 + ghost]) for ghost in range(30))


def test_cost_admits_the_deep_first():
    """A deep page is worth a write at once, a shallow one after it came back."""
    admission = CostAware(write=0.5)
    assert admission.admit(RunInfo(4, 200), 0, [1])
    assert not admission.admit(RunInfo(4, 0), 0, [2])
    assert [admission.admit(RunInfo(4, 0), 0, [2]) for _ in range(3)][-1]
    assert admission.admit(RunInfo(4, 0), 3, [3])


def test_admissions_are_made_by_name():
    """Each name gives a fresh one; another name is an error that lists the known ones."""
    for name in ADMISSIONS:
        made: Admission = make_admission(name)
        assert isinstance(made.admit(RunInfo(1, 0), 1, [1]), bool)
    with pytest.raises(ConfigError, match="second-touch"):
        make_admission("sometimes")
