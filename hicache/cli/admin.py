"""``hicache admin``: an operator's calls to a running sidecar."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hicache.cli import link, units
from hicache.cli.stats import plain

if TYPE_CHECKING:
    from hicache.rpc.client import Client

EPILOG = """\
examples:
  hicache admin check                     run the engine's own invariant check
  hicache admin clear                     drop everything that is not leased or pinned
  hicache admin drain --grace 30s         stop gracefully, as SIGTERM does

exit codes: 0 fine; 1 the check found a violation, whose story is printed.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Check, clear or drain a running sidecar."
    parser.epilog = EPILOG
    parser.add_argument("action", choices=("check", "clear", "drain"), help="what to do")
    parser.add_argument(
        "--grace", metavar="DURATION", default="10s", help="drain: time for saving pages; default 10s"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    link.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it and say what happened."""
    with link.connect(arguments, "admin") as client:
        if arguments.action == "check":
            return _check(client, as_json=arguments.json)
        if arguments.action == "clear":
            cleared = client.admin.clear()
            _say(
                arguments,
                plain(cleared),
                f"dropped {cleared.pages:,} pages, kept {cleared.kept_pages:,}",
            )
        else:
            grace_ms = units.parse_duration_ms(arguments.grace)
            client.admin.drain(grace_ms)
            _say(arguments, {"grace_ms": grace_ms}, "the sidecar drains and stops")
    return 0


def _check(client: Client, *, as_json: bool) -> int:
    result = client.admin.check()
    if as_json:
        print(json.dumps(plain(result)))
    else:
        print("check: fine" if result.ok else f"check: VIOLATION: {result.problem}")
    return 0 if result.ok else 1


def _say(arguments: argparse.Namespace, found: dict[str, object], text: str) -> None:
    print(json.dumps(found) if arguments.json else text)
