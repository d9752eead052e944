"""Long random walks of the engine machine: what Hypothesis' short runs do not reach.

A walk is one number. A failure prints it; ``HICACHE_TEST_SEED`` and the walk's number repeat it.
"""

from __future__ import annotations

import inspect
import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_machine import ADMISSION_NAMES, BASES, OPTIONAL, POLICY_NAMES, SETUPS, EngineMachine, pack

from hicache.types import Ack, WritePolicy

WALKS = int(os.environ.get("HICACHE_TEST_WALKS", "160"))
STEPS = 150
INVARIANTS = ("collect_reservations", "matches_only_what_was_stored", "disk_is_closed")


class Walker:
    """Draws rules and their arguments."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.machine = EngineMachine()
        self.trail: list[tuple[str, dict[str, object]]] = []

    def prompt(self) -> bytes:
        draw = self.random
        if draw.random() < 0.7:
            base = draw.choice(BASES)
            return pack(base[: draw.randint(1, 6)] + [draw.randint(0, 3) for _ in range(draw.randint(0, 5))])
        return pack([draw.randint(0, 2) for _ in range(draw.randint(1, 9))])

    def argument(self, name: str) -> object:
        draw = self.random
        choices = {
            "session": lambda: draw.randint(1, 2),
            "namespace": lambda: draw.choice([1, 1, 2, 3]),
            "prompt": self.prompt,
            "index": lambda: draw.randint(0, 5),
            "ack": lambda: draw.choice(list(Ack)),
            "most": lambda: draw.choice([0, 0, 2]),
            "wait": lambda: draw.choice([0, 0, 500]),
            "into": lambda: draw.choice([-1, -1, 0, 1, 2, 3]),
            "pages": lambda: draw.randint(0, 9),
            "ms": lambda: draw.choice([1, 100, 400, 1200]),
            "ttl": lambda: draw.choice([0, 500]),
            "limit": lambda: draw.randint(1, 6),
            "grace": lambda: draw.choice([0, 5000]),
            "seed": lambda: draw.randint(0, 65535),
            "luck": lambda: draw.randint(0, 40),
            "promote": lambda: draw.random() < 0.7,
        }
        return choices[name]() if name in choices else draw.random() < 0.5

    def start(self) -> None:
        draw = self.random
        self.call(
            "start",
            setup=draw.choice(sorted(SETUPS)),
            policy=draw.choice(POLICY_NAMES),
            admission=draw.choice(ADMISSION_NAMES),
            write=draw.choice(list(WritePolicy)),
            bounds=draw.choice([(1, 4), (3, 4), (64, 1), (64, 32)]),
            low=draw.choice([0.0, 0.3]),
            found=[(self.argument("namespace"), self.prompt()) for _ in range(draw.randint(0, 4))],
            torn=draw.choice([0, 0, 1, 2, 3]),
            enabled=set(draw.sample(OPTIONAL, draw.randint(2, len(OPTIONAL)))),
        )

    def call(self, name: str, **arguments: object) -> None:
        self.trail.append((name, arguments))
        getattr(self.machine, name)(**arguments)
        for invariant in INVARIANTS:
            getattr(self.machine, invariant)()

    def walk(self, steps: int) -> None:
        self.start()
        weights = {name: 1.0 for name, needs, _ in RULES if not needs or needs in self.machine.enabled}
        weights |= {"store": 4.0, "fetch": 3.0, "finish_copy": 3.0}
        if "commit" in weights:
            weights |= {"commit": 3.0, "reserve": 2.0}
        names = sorted(weights)
        drawn = self.random.choices(
            names, [weights[name] for name in names], k=self.random.randint(10, steps)
        )
        parameters = {name: names for name, _, names in RULES}
        for name in drawn:
            self.call(name, **{parameter: self.argument(parameter) for parameter in parameters[name]})
        self.machine.teardown()


def _rules() -> list[tuple[str, str, tuple[str, ...]]]:
    """Every rule of the machine: its name, what switches it on, its arguments."""
    return [
        (name, getattr(function, "needs", ""), tuple(inspect.signature(function).parameters)[1:])
        for name, function in vars(EngineMachine).items()
        if hasattr(function, "hypothesis_stateful_rule") or hasattr(function, "needs")
    ]


RULES = _rules()


@pytest.mark.parametrize("part", range(4))
def test_walk(part: int, seed: int) -> None:
    """Whatever happens in whatever order, the engine keeps its invariants and the tiers hold what it believes."""
    for number in range(part, WALKS, 4):
        walker = Walker(f"{seed}/{number}")
        try:
            walker.walk(STEPS)
        except Exception as error:
            trail = "\n".join(f"{name}(**{arguments})" for name, arguments in walker.trail[-40:])
            raise AssertionError(
                f"walk {number} of seed {seed}, step {len(walker.trail)}: {error}\n{trail}"
            ) from error
