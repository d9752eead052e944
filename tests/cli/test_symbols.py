"""The symbols of a trace's ids."""

from __future__ import annotations

from hicache.cli.symbols import SYMBOL_BYTES, Symbols


def test_symbols_are_the_same_in_every_process_and_for_one_salt_only() -> None:
    symbols = Symbols("a")
    assert symbols.of((1, 2)) == Symbols("a").of((1,)) + Symbols("a").of((2,))
    assert Symbols("b").of((1,)) != symbols.of((1,))
    assert len(symbols.of((0, -1, 2**70))) == 3 * SYMBOL_BYTES
