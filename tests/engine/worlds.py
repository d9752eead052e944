"""Small worlds for the engine's tests: a shell with one namespace and one session, and words for prompts."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from shell import PAGE_BYTES, Shell, tier

from hicache.engine import EngineOptions
from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.types import Namespace, Residency, TierKind, TierSpec, WritePolicy

DEVICE, HOST, DISK = TierKind.DEVICE, TierKind.HOST, TierKind.DISK
ME, OTHER = 1, 2  # sessions
NS, LORA, TENANT = 1, 2, 3  # namespaces
WIDTH = 4


def pages(*tokens: int) -> bytes:
    """A prompt of one-token pages."""
    return b"".join(token.to_bytes(WIDTH, "little") for token in tokens)


def line(start: int, count: int) -> bytes:
    """``count`` pages that no other line shares."""
    return pages(*range(start, start + count))


def world(*tiers: TierSpec, check: bool = True, **settings: object) -> Shell:
    """A shell with sessions ME and OTHER, and namespaces NS, LORA (another adapter) and TENANT (another tenant)."""
    settings = {"write_policy": WritePolicy.BACK, "free_low_fraction": 0.0, "default_ttl_ms": 1000} | settings
    shell = Shell(EngineOptions(tiers, **settings), check=check)  # type: ignore[arg-type]
    shell.open_namespace(NS, Namespace("m", 1, PAGE_BYTES))
    shell.open_namespace(LORA, Namespace("m", 1, PAGE_BYTES, adapter="lora"))
    shell.open_namespace(TENANT, Namespace("m", 1, PAGE_BYTES, tenant="other"))
    shell.handle(ev.SessionOpened(ME, "default"))
    shell.handle(ev.SessionOpened(OTHER, "default"))
    return shell


def fetch(
    shell: Shell, prompt: bytes, *, session: int = ME, namespace: int = NS, **fields: object
) -> act.FetchResult:
    """Fetch, with the bytes of what is granted verified."""
    answer = shell.ask(ev.Fetch, session=session, namespace=namespace, prompt=prompt, **fields)
    assert isinstance(answer, act.FetchResult)
    shell.verify(namespace, prompt, answer)
    return answer


def put(
    shell: Shell, prompt: bytes, *, session: int = ME, namespace: int = NS, **fields: object
) -> act.CommitResult:
    """Store; it must be taken."""
    answer = shell.store(session, namespace, prompt, **fields)
    assert isinstance(answer, act.CommitResult), answer
    return answer


def matched(shell: Shell, prompt: bytes, namespace: int = NS) -> int:
    """How many pages of a prompt are known."""
    return shell.engine.match(namespace, prompt).pages


def where(shell: Shell, prompt: bytes, namespace: int = NS) -> list[str]:
    """By tier, the state of a prompt's last page: R, D, F or -."""
    tree = shell.engine._core.namespaces[namespace].tree
    runs, _ = tree.runs(tree.trace(prompt))
    letters = {
        Residency.ABSENT: "-",
        Residency.FILLING: "F",
        Residency.RESIDENT: "R",
        Residency.DRAINING: "D",
    }
    return [letters[Residency(state)] for state in runs[-1].state] if runs else []


def used(shell: Shell, index: int) -> int:
    """Bytes that a tier's ledger says are held."""
    return shell.engine.stats().tiers[index].used_bytes


__all__ = [
    "DEVICE", "DISK", "HOST", "LORA", "ME", "NS", "OTHER", "PAGE_BYTES", "TENANT", "WIDTH", "Shell", "act", "ev",
    "fetch", "line", "matched", "pages", "put", "tier", "used", "where", "world",
]  # fmt: skip
