"""Every command that the documents show exists, with every flag it is shown with."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hicache.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("examples/*.md")]
)
_NAMES = "|".join(command.name for command in COMMANDS)
_SHOWN = re.compile(rf"(?:^\s*(?:\$ )?|`)(hicache (?:{_NAMES})\b[^`#\n]*)", re.MULTILINE)


def shown(text: str) -> Iterator[str]:
    """Commands in console blocks and between backticks, without comments."""
    for found in _SHOWN.finditer(text):
        yield found[1].strip()


def sub_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: sub
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, sub in action.choices.items()
    }


def unknown_words(command: str) -> list[str]:
    """What of a shown command the parser does not know: its action, or flags. ``a|b`` stands for both."""
    words = shlex.split(command.replace("\\|", "|"))[1:]
    parser = sub_parsers(build_parser(words[0]))[words[0]]
    actions = sub_parsers(parser)
    parsers, unknown = [parser], []
    if actions and len(words) > 1:
        named = words[1].split("|")
        unknown += [each for each in named if each not in actions and not each.startswith("-")]
        parsers = [actions[each] for each in named if each in actions] or [parser]
    for word in words:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--[a-z][a-z-]*", flag):
            unknown += [flag for each in parsers if flag not in each._option_string_actions]
    return unknown


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(path: Path) -> None:
    wrong = {command: bad for command in shown(path.read_text()) if (bad := unknown_words(command))}
    assert not wrong


def test_the_search_finds_commands_and_what_is_wrong_with_them() -> None:
    text = "$ hicache serve --host-bytes 8GiB   # more\nsay `hicache disk stats|compact DIR --colour` or `hicache sim`"
    assert list(shown(text)) == [
        "hicache serve --host-bytes 8GiB",
        "hicache disk stats|compact DIR --colour",
        "hicache sim",
    ]
    assert unknown_words("hicache disk stats|shrink DIR --colour") == ["shrink", "--colour"]
    assert sum(len(list(shown(path.read_text()))) for path in DOCS) > 40


def test_links_between_documents_lead_somewhere() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
