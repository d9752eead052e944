"""``hicache policy``: the zoo as a table, and a check of anyone's own policy against the contract of the seam."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hicache.cli.main import EXIT_OK, EXIT_WRONG
from hicache.policy import ADMISSIONS, ZOO, make_policy
from hicache.policy.conformance import check_policy

EPILOG = """\
examples:
  hicache policy list
  hicache policy list --json | jq '.policies | keys'
  hicache policy check slru:protected=0.5
  hicache policy check py:my_policy:MyPolicy        start from examples/policy_template.py

docs/POLICIES.md compares them and explains `adaptive`. exit codes: 0 fine; 1 the contract is broken; 2 no such
policy or parameter.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Define the arguments."""
    parser.description = "List the eviction policies, or check one, your own too, against the contract."
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="ACTION", required=True, help="what to do")
    listing = actions.add_parser("list", help="all policies: name, source, state per run, parameters")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    listing.set_defaults(act=_list)
    check = actions.add_parser("check", help="does a policy keep the contract?")
    check.add_argument(
        "name", metavar="NAME", help="py:module:Class, or a name of the list; the current folder is searched"
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of lines")
    check.set_defaults(act=_check)


def run(arguments: argparse.Namespace) -> int:
    """Do it. Returns the exit code."""
    code: int = arguments.act(arguments)
    return code


def _list(arguments: argparse.Namespace) -> int:
    if arguments.json:
        zoo = {
            name: {"source": entry.source, "state": entry.state, "parameters": entry.parameters()}
            for name, entry in ZOO.items()
        }
        print(json.dumps({"policies": zoo, "admissions": sorted(ADMISSIONS)}, indent=2))
        return EXIT_OK
    rows = [("policy", "source", "state per run", "parameters")]
    for name, entry in ZOO.items():
        parameters = ",".join(f"{key}={value}" for key, value in entry.parameters().items())
        rows.append((name, entry.source, entry.state, parameters or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        sys.stdout.write("  ".join([*cells, row[3]]) + "\n")
    sys.stdout.write(
        f"\nparameters go into the name (slru:protected=0.5); one's own: py:module:Class"
        f"\nadmissions: {', '.join(sorted(ADMISSIONS))}\n"
    )
    return EXIT_OK


def _check(arguments: argparse.Namespace) -> int:
    sys.path.insert(0, str(Path.cwd()))
    make_policy(arguments.name)  # a name that cannot be loaded is an error of usage
    broken = 0
    found = check_policy(lambda: make_policy(arguments.name))
    if arguments.json:
        told = [{"promise": promise, "problem": problem or ""} for promise, problem in found]
        print(json.dumps(told, indent=2))
        return EXIT_WRONG if any(each["problem"] for each in told) else EXIT_OK
    for promise, problem in found:
        sys.stdout.write(f"{'BROKEN' if problem else 'ok    '}  {promise}\n")
        if problem:
            broken += 1
            sys.stdout.write(f"        {problem}\n")
    verdict = f"{broken} broken" if broken else "keeps the contract"
    sys.stdout.write(f"{arguments.name}: {verdict}\n")
    return EXIT_WRONG if broken else EXIT_OK
