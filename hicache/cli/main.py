"""The ``hicache`` command: finds the sub-command, imports only that one, and turns errors into one line.

Exit codes: 0 done and fine; 1 done, and something was found wrong; 2 bad usage or settings; 3 the sidecar
refused or could not be reached; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence

from hicache.errors import ErrorCode, HicacheError
from hicache.version import __version__

EXIT_OK, EXIT_WRONG, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

_USAGE_CODES = frozenset({ErrorCode.INVALID, ErrorCode.UNSUPPORTED})


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A sub-command; its module offers ``configure(parser)`` and ``run(arguments) -> exit code``."""

    name: str
    module: str
    help: str


COMMANDS = (
    Command("serve", "hicache.cli.serve", "run the sidecar"),
    Command("demo", "hicache.cli.demo", "show a sidecar at work, with every byte verified"),
    Command("replay", "hicache.cli.replay", "drive a sidecar with a recorded trace"),
    Command("sim", "hicache.cli.sim", "replay a trace under policies and capacities, and report"),
    Command("trace", "hicache.cli.trace", "statistics of traces, conversion, generation"),
    Command("stats", "hicache.cli.stats", "show what a running sidecar holds and does"),
    Command("tree", "hicache.cli.tree", "show the tree of cached prefixes"),
    Command("advise", "hicache.cli.advise", "say what more or less room, or another policy, would do"),
    Command("doctor", "hicache.cli.doctor", "check this machine and say what to change"),
    Command("policy", "hicache.cli.policy", "list eviction policies, or check one of your own"),
    Command("check", "hicache.cli.check", "verify a disk folder offline"),
    Command("disk", "hicache.cli.disk", "look into, compact, export or import a disk folder offline"),
    Command("publish", "hicache.cli.publish", "tell routers over ZMQ which blocks a sidecar holds"),
    Command("admin", "hicache.cli.admin", "check, clear or drain a running sidecar"),
)

EPILOG = """\
a first look:
  hicache demo                           starts a sidecar, drives it, checks every byte, cleans up
  hicache doctor                         is this machine fit?

a sidecar and its company:
  hicache serve --host-bytes 8GiB --disk-path /var/lib/hicache --disk-bytes 100GiB
  hicache stats                          in another terminal
  hicache tree
  hicache replay --trace trace.jsonl.zst

sizes are written 8GiB, 512MiB, 1.5GB or as bytes; durations 500ms, 30s, 5m, 1h.
exit codes: 0 fine; 1 something was found wrong; 2 bad usage or settings; 3 the sidecar refused or is not
there; 130 interrupted.
`hicache COMMAND --help` tells more.
"""


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser; only the sub-command ``wanted`` is imported, to start fast (None: none of them)."""
    parser = argparse.ArgumentParser(
        prog="hicache",
        description="A tiered prefix cache for LLM key/value pages, a sidecar beside an inference engine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hicache {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.name == wanted:
            module = importlib.import_module(command.module)
            module.configure(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; never raises for an error that hicache knows."""
    words = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in words if not word.startswith("-")), None)
    try:
        arguments = build_parser(wanted).parse_args(words)
        code: int = arguments.run(arguments)
    except HicacheError as error:
        sys.stderr.write(f"hicache: error: {error}\n")
        return EXIT_USAGE if error.code in _USAGE_CODES else EXIT_REFUSED
    except OSError as error:
        if error.filename is None or isinstance(error, BrokenPipeError):
            return _lost_reader(error)
        sys.stderr.write(f"hicache: error: {error.filename}: {error.strerror}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        sys.stderr.write("hicache: interrupted\n")
        return EXIT_INTERRUPTED
    return code


def _lost_reader(error: OSError) -> int:
    """The reader of our output left: nothing to tell it. Anything else without a file's name is raised again."""
    if not isinstance(error, BrokenPipeError):
        raise error
    sys.stderr.close()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
