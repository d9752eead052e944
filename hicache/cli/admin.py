"""``hicache admin``: an operator's calls to a running sidecar."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hicache.cli import link, units
from hicache.cli.stats import plain
from hicache.errors import ConfigError, NotFoundError
from hicache.types import Namespace, SymbolKind

if TYPE_CHECKING:
    from hicache.rpc.client import Client, NamespaceHandle

EPILOG = """\
examples:
  hicache admin check                     run the engine's own invariant check
  hicache admin clear                     drop everything that is not leased or pinned
  hicache admin drain --grace 30s         stop gracefully, as SIGTERM does
  hicache admin pin --namespace 3f9a12c07b21d0e4 --tokens @system-prompt.txt --tier host --ttl 8h
  hicache admin unpin 7                   end the pin that `pin` gave this number
  hicache admin evict --namespace '{"model": "m", "page_bytes": 4096, "page_tokens": 16}' --tokens 1,2,3

--namespace: the first 8 or more hexadecimal digits of its fingerprint, which engines log when they find the sidecar
(it must hold pages), or the fields it is opened with, as a JSON object. --tokens: the prompt's token ids, or, in a
namespace of hashes, its block hashes in hexadecimal; commas, spaces and brackets between them do not matter. A
partial last page does not count; pages with extra keys (images) cannot be named. `evict` moves a prefix and all that
continues it out of --tier, or of all tiers. A pin outlives this command: it lasts for --ttl, or until `unpin`, or
until the sidecar ends.

exit codes: 0 fine; 1 the check found a violation, whose story is printed, or nothing of the prompt to pin is cached;
2 bad usage, no such tier; 3 the sidecar is not there, or refused (no such namespace).
"""

ACTIONS = ("check", "clear", "drain", "pin", "unpin", "evict")
#: Which flags belong to which actions.
_FLAGS = {
    "pin_id": ("unpin",),
    "namespace": ("pin", "evict"),
    "tokens": ("pin", "evict"),
    "tier": ("pin", "evict"),
    "ttl": ("pin",),
    "grace": ("drain",),
}
_NEEDED = {"pin_id", "namespace", "tokens"}
_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Check, clear or drain a running sidecar; pin or evict a prefix in it."
    parser.epilog = EPILOG
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("pin_id", metavar="PIN", nargs="?", help="unpin: the pin's number")
    parser.add_argument("--namespace", metavar="FINGERPRINT|JSON", help="pin, evict: whose pages")
    parser.add_argument("--tokens", metavar="IDS|@FILE", help="pin, evict: the prompt whose pages are meant")
    parser.add_argument(
        "--tier", metavar="NAME", help="pin: where to keep them, default the first; evict: which to leave"
    )
    parser.add_argument("--ttl", metavar="DURATION", help="pin: for how long; default: until unpin")
    parser.add_argument("--grace", metavar="DURATION", help="drain: time for saving pages; default 10s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    link.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it and say what happened. Returns the exit code."""
    _check_flags(arguments)
    act: dict[str, Callable[[Client, argparse.Namespace], int]] = {
        "check": _check,
        "clear": _clear,
        "drain": _drain,
        "pin": _pin,
        "unpin": _unpin,
        "evict": _evict,
    }
    with link.connect(arguments, "admin") as client:
        return act[arguments.action](client, arguments)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a flag that this action does not have, and for one that it misses."""
    for name, actions in _FLAGS.items():
        shown = "PIN" if name == "pin_id" else f"--{name}"
        given = getattr(arguments, name) is not None
        if given and arguments.action not in actions:
            raise ConfigError(f"{shown}: is for {' and '.join(actions)}, not for {arguments.action}")
        if not given and name in _NEEDED and arguments.action in actions:
            raise ConfigError(f"{arguments.action}: {shown} is missing", hint="see `hicache admin --help`")


def _check(client: Client, arguments: argparse.Namespace) -> int:
    result = client.admin.check()
    _say(arguments, plain(result), "check: fine" if result.ok else f"check: VIOLATION: {result.problem}")
    return 0 if result.ok else 1


def _clear(client: Client, arguments: argparse.Namespace) -> int:
    cleared = client.admin.clear()
    _say(arguments, plain(cleared), f"dropped {cleared.pages:,} pages, kept {cleared.kept_pages:,}")
    return 0


def _drain(client: Client, arguments: argparse.Namespace) -> int:
    grace_ms = _duration_ms("--grace", arguments.grace or "10s")
    client.admin.drain(grace_ms)
    _say(arguments, {"grace_ms": grace_ms}, "the sidecar drains and stops")
    return 0


def _pin(client: Client, arguments: argparse.Namespace) -> int:
    ttl_ms = _duration_ms("--ttl", arguments.ttl) if arguments.ttl else 0
    namespace = _namespace(client, arguments.namespace)
    tokens, extra_keys = _prompt(arguments.tokens, namespace.spec)
    pinned = client.admin.pin(namespace, tokens, arguments.tier or 0, ttl_ms=ttl_ms, extra_keys=extra_keys)
    text = f"pin {pinned.pin}: {pinned.pages:,} pages" if pinned.pin else "nothing of this prompt is cached"
    _say(arguments, plain(pinned), text)
    return 0 if pinned.pin else 1


def _unpin(client: Client, arguments: argparse.Namespace) -> int:
    if not arguments.pin_id.isdecimal() or not int(arguments.pin_id):
        raise ConfigError(
            f"PIN: {arguments.pin_id!r} is no pin's number", hint="`hicache admin pin` gives it"
        )
    client.admin.unpin(int(arguments.pin_id))
    _say(arguments, {"pin": int(arguments.pin_id)}, f"pin {arguments.pin_id} is over, or never was")
    return 0


def _evict(client: Client, arguments: argparse.Namespace) -> int:
    namespace = _namespace(client, arguments.namespace)
    tokens, extra_keys = _prompt(arguments.tokens, namespace.spec)
    evicted = client.admin.evict(namespace, tokens, arguments.tier, extra_keys=extra_keys)
    where = f"out of {arguments.tier}" if arguments.tier else "out of all tiers"
    text = f"moved {evicted.pages:,} pages {where}, kept {evicted.kept_pages:,} that are leased or pinned"
    _say(arguments, plain(evicted), text)
    return 0


# --- what the flags mean


def _duration_ms(flag: str, text: str) -> int:
    try:
        return units.parse_duration_ms(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error.message}", hint=error.hint) from None


def _namespace(client: Client, text: str) -> NamespaceHandle:
    """The namespace that is meant. Raises ConfigError, and NotFoundError for a fingerprint that holds no pages."""
    if _FINGERPRINT.fullmatch(text.lower()):
        found = _by_fingerprint(client, text.lower())
        fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
        del fields["tenant"]
    else:
        fields = _fields(text)
    return client.namespace(**fields)


def _by_fingerprint(client: Client, prefix: str) -> Namespace:
    """From a snapshot of what is readable, since the sidecar lists no namespaces."""
    from hicache.rpc.client.watch import WatchKind

    found: dict[bytes, Namespace] = {}
    with client.watch() as batches:
        for batch in batches:
            for event in batch.events:
                if event.namespace.fingerprint.hex().startswith(prefix):
                    found[event.namespace.fingerprint] = event.namespace.spec
            if batch.kind is WatchKind.CAUGHT_UP:
                break
    if len(found) > 1:
        raise ConfigError(
            f"--namespace: {len(found)} namespaces begin with {prefix}", hint="give more digits"
        )
    if not found:
        raise NotFoundError(f"no namespace {prefix} holds pages that can be read")
    return next(iter(found.values()))


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    known = {each.name for each in dataclasses.fields(Namespace)} - {"tenant"}
    if not isinstance(fields, dict):
        raise ConfigError(
            f"--namespace: {text!r} is neither 8 or more hexadecimal digits nor a JSON object",
            hint='for example {"model": "m", "page_tokens": 16, "page_bytes": 4096}',
        )
    if strange := sorted(fields.keys() - known):
        raise ConfigError(
            f"--namespace: unknown field {strange[0]!r}", hint=f"known: {', '.join(sorted(known))}"
        )
    if missing := sorted({"model", "page_bytes"} - fields.keys()):
        raise ConfigError(f"--namespace: the field {missing[0]} is missing")
    return fields


def _prompt(text: str, spec: Namespace) -> tuple[Sequence[int] | Sequence[bytes], list[bytes] | None]:
    """The prompt, and its pages' extra keys, which are empty. Raises ConfigError for what is no prompt."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--tokens: cannot read {text[1:]}: {error}") from error
    words = re.sub(r"[\s,\[\]\"']+", " ", text).split()
    try:
        if spec.symbol_kind is SymbolKind.HASHES:
            return [bytes.fromhex(word) for word in words], None
        tokens = [int(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"--tokens: {error}", hint="token ids, or block hashes in hexadecimal") from error
    pages = len(tokens) // spec.page_tokens
    return tokens, [b""] * pages if spec.extra_key_bytes else None


def _say(arguments: argparse.Namespace, found: dict[str, object], text: str) -> None:
    print(json.dumps(found) if arguments.json else text)
