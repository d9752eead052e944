"""The command line as a whole: help that teaches, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from hicache.cli import main
from hicache.cli.main import COMMANDS, build_parser
from hicache.cli.serve import service_options
from hicache.cli.settings import ServeConfig
from hicache.errors import ConfigError
from hicache.policy import POLICIES

ZOO = ", ".join(sorted(POLICIES))


def sub_parser(name: str) -> argparse.ArgumentParser:
    for action in build_parser(name)._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = action.choices[name]
            assert isinstance(found, argparse.ArgumentParser)
            return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_help_explains_every_flag_and_gives_examples(name: str) -> None:
    parser = sub_parser(name)
    text = parser.format_help()
    undocumented = [action.option_strings for action in parser._actions if not action.help]
    assert not undocumented
    assert parser.description
    assert f"hicache {name}" in (parser.epilog or "")
    assert "--json" in text or name in {"serve", "publish"}


def test_the_top_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(f"{command.name} " in text and command.help in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["serve", "--host-bytes", "8G"],
            "--host-bytes: '8G' is not a size (GiB counts in 1024s, GB in 1000s)",
        ),
        (
            ["serve", "--config", "/nowhere.toml"],
            "--config: cannot read /nowhere.toml: No such file or directory",
        ),
        (
            ["replay", "--trace", "/nowhere.zst"],
            "--trace: cannot read /nowhere.zst: No such file or directory",
        ),
        (["admin", "pin", "--namespace", "{}"], "pin: --tokens is missing (see `hicache admin --help`)"),
        (["admin", "unpin"], "unpin: PIN is missing (see `hicache admin --help`)"),
        (["admin", "check", "--tier", "host"], "--tier: is for pin and evict, not for check"),
        (["demo", "--policy", "nosuch"], f"--policy: unknown eviction policy 'nosuch' (one of {ZOO})"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == main.EXIT_USAGE
    shown = capsys.readouterr()
    assert shown.err == f"hicache: error: {message}\n"
    assert not shown.out


@pytest.mark.parametrize(
    "setting",
    ["policy", "device_policy", "disk_policy", "admission", "host_admission", "disk_admission"],
)
def test_unknown_names_are_refused_for_tiers_that_are_left_out_too(setting: str) -> None:
    flag, kind = f"--{setting.replace('_', '-')}", setting.rpartition("_")[2]
    with pytest.raises(ConfigError, match=f"^{flag}: unknown (eviction )?{kind} 'foo'"):
        service_options(ServeConfig(**{setting: "foo"}))


def test_nobody_there_is_one_line_and_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"unix://{tmp_path}/no.sock"
    assert main.main(["stats", "--once", "--target", target, "--timeout", "300ms"]) == main.EXIT_REFUSED
    shown = capsys.readouterr().err
    assert shown.startswith("hicache: error: ")
    assert shown.count("\n") == 1
    assert f"{tmp_path}/no.sock" in shown


def test_only_the_wanted_command_is_imported() -> None:
    """`hicache serve` must not pay for rich, numpy and the rest before it serves."""
    program = (
        "import sys; from hicache.cli.main import build_parser; build_parser('serve');"
        "print(*sorted({'rich', 'torch', 'numpy', 'hicache.cli.demo', 'hicache.rpc.client'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_print_config_is_toml_that_says_where_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "--host-bytes", "3GiB", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert 'host_bytes = "3GiB"' in shown
    assert "[tiers]" in shown
