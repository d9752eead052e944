"""A seeded multi-turn workload: what a chat service asks of a prefix cache, made from a seed.

Several system prompts are shared by many users. Each user has conversations that grow turn by turn; some
turns come back to an old conversation, some branch off from an earlier turn (a regenerated answer), some
open a new one. Popularity is skewed. Equal settings give equal turns in every process.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

VOCABULARY = 128_256


class TurnKind(enum.Enum):
    """How a turn relates to what was said before."""

    OPEN = "open"  # a new conversation below a shared system prompt
    GROW = "grow"  # the next turn of the latest conversation
    REVISIT = "revisit"  # the next turn of an older conversation
    BRANCH = "branch"  # another answer to an earlier question


@dataclasses.dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """Shape of a workload; lengths are means, in tokens. ``worker`` gives a process users of its own."""

    seed: int = 1
    worker: int = 0
    turns: int = 400
    system_prompts: int = 4
    system_tokens: int = 1024
    users: int = 8
    question_tokens: int = 160
    answer_tokens: int = 320
    max_tokens: int = 12_288
    revisit_share: float = 0.25
    branch_share: float = 0.10
    open_share: float = 0.15


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One request: look ``full[:prompt_tokens]`` up, then store ``full``, which adds the answer.

    ``talk`` numbers the conversation; its last ``full`` holds everything it said.
    """

    kind: TurnKind
    talk: int
    full: Tokens
    prompt_tokens: int

    @property
    def prompt(self) -> Tokens:
        """What the engine must prefill."""
        return self.full[: self.prompt_tokens]


@dataclasses.dataclass(slots=True)
class _Conversation:
    """Everything said so far, and the lengths at which questions ended (where a branch may start)."""

    talk: int
    tokens: Tokens
    questions: list[int]


def turns(spec: WorkloadSpec) -> Iterator[Turn]:
    """The turns of the workload, in order."""
    shared = np.random.Generator(np.random.SFC64(spec.seed))
    systems = [_tokens(shared, _length(shared, spec.system_tokens)) for _ in range(spec.system_prompts)]
    rng = np.random.Generator(np.random.SFC64([spec.seed, spec.worker + 1]))
    users: list[list[_Conversation]] = [[] for _ in range(spec.users)]
    for talk in range(spec.turns):
        yield _next_turn(spec, rng, systems, users[_skewed(rng, spec.users)], talk=talk)


def _next_turn(
    spec: WorkloadSpec,
    rng: np.random.Generator,
    systems: list[Tokens],
    mine: list[_Conversation],
    *,
    talk: int,
) -> Turn:
    kind, found = _choose(spec, rng, mine)
    if found is None:
        found = _Conversation(talk, systems[_skewed(rng, len(systems))], [])
        mine.append(found)
    if kind is TurnKind.BRANCH:
        prompt = found.tokens[: found.questions[int(rng.integers(len(found.questions)))]]
        found = _Conversation(talk, found.tokens, [q for q in found.questions if q < len(prompt)])
        mine.append(found)
    else:
        prompt = np.concatenate([found.tokens, _tokens(rng, _length(rng, spec.question_tokens))])
    full = np.concatenate([prompt, _tokens(rng, _length(rng, spec.answer_tokens))])
    found.tokens = full
    found.questions.append(len(prompt))
    return Turn(kind, found.talk, full, len(prompt))


def _choose(
    spec: WorkloadSpec, rng: np.random.Generator, mine: list[_Conversation]
) -> tuple[TurnKind, _Conversation | None]:
    dice = float(rng.random())
    if not mine or dice < spec.open_share or len(mine[-1].tokens) > spec.max_tokens:
        return TurnKind.OPEN, None
    if dice < spec.open_share + spec.branch_share:
        return TurnKind.BRANCH, mine[int(rng.integers(len(mine)))]
    if dice < spec.open_share + spec.branch_share + spec.revisit_share:
        old = mine[int(rng.integers(len(mine)))]
        return (TurnKind.REVISIT, old) if len(old.tokens) <= spec.max_tokens else (TurnKind.OPEN, None)
    return TurnKind.GROW, mine[-1]


def _tokens(rng: np.random.Generator, count: int) -> Tokens:
    return rng.integers(0, VOCABULARY, count, dtype=np.int32)


def _length(rng: np.random.Generator, mean: int) -> int:
    """Skewed to the right, as message lengths are; never 0."""
    return 1 + int(rng.gamma(2.0, mean / 2.0))


def _skewed(rng: np.random.Generator, count: int) -> int:
    """A number below ``count``, small ones more often (Zipf-like)."""
    weights = 1.0 / np.arange(1, count + 1)
    return int(rng.choice(count, p=weights / weights.sum()))
