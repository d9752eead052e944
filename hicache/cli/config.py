"""Settings from defaults, a TOML file, the environment and flags; the only reader of the environment.

A later source wins over an earlier one: defaults < file < ``HICACHE_*`` < flags. An unknown key in a file
is an error that names the nearest key; an unknown ``HICACHE_*`` variable that looks like a setting is warned
about.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from hicache.cli.settings import Kind, ServeConfig, Setting, Value, parse, settings_of, show
from hicache.errors import ConfigError

_Config = TypeVar("_Config")

PREFIX = "HICACHE_"
CONFIG_VARIABLE = "HICACHE_CONFIG"


def environment() -> dict[str, str]:
    """Our own variables."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def child_environment() -> dict[str, str]:
    """The environment for a sidecar of our own: without our variables, so that flags alone decide."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def default_socket_path() -> str:
    """Where ``hicache serve`` listens and the other commands look, when nothing is said."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime_dir and Path(runtime_dir).is_dir():
        return str(Path(runtime_dir) / "hicache.sock")
    return str(Path(tempfile.gettempdir()) / f"hicache-{os.getuid()}" / "hicache.sock")


def prepare_socket_dir(socket_path: str) -> None:
    """Make the directory of the default socket, 0700. Raises ConfigError where another user owns it."""
    parent = Path(socket_path).parent
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        owner = parent.lstat()
    except OSError as error:
        raise ConfigError(f"--socket-path: cannot make {parent}: {error.strerror}") from error
    if socket_path == default_socket_path() and (owner.st_uid != os.getuid() or parent.is_symlink()):
        raise ConfigError(f"--socket-path: {parent} belongs to another user", hint="choose another path")


# --- flags


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    only: tuple[str, ...] = (),
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """One flag for each setting of ``cls`` (or of those named), grouped by section.

    ``defaults`` tell, by name, what a command does without a flag where that is not the setting's own default.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for found in settings_of(cls):
        if only and found.name not in only:
            continue
        group = groups.setdefault(found.section, parser.add_argument_group(f"{found.section} settings"))
        shown = defaults.get(found.name, show(found, found.default))
        text = found.help.partition("; default")[0] if found.name in defaults else found.help
        text += f"; default {shown}" if shown and "; default" not in text else ""
        extra: dict[str, Any] = {"metavar": "|".join(found.choices) or found.kind.value}
        if found.kind is Kind.SWITCH:
            extra = {"action": argparse.BooleanOptionalAction}
        group.add_argument(found.flag, dest=found.name, default=argparse.SUPPRESS, help=text, **extra)


def flags_given(arguments: argparse.Namespace, cls: type) -> dict[str, object]:
    """The settings that were given as flags, by name, unparsed."""
    given = vars(arguments)
    return {found.name: given[found.name] for found in settings_of(cls) if found.name in given}


# --- layers


def load(
    cls: type[_Config],
    *,
    flags: Mapping[str, object],
    variables: Mapping[str, str],
    file: str = "",
) -> _Config:
    """The configuration: ``flags`` over ``variables`` over the file over defaults. Raises ConfigError.

    ``file`` is a path; empty: the one that ``HICACHE_CONFIG`` names, if any.
    """
    known = settings_of(cls)
    path = file or variables.get(CONFIG_VARIABLE, "")
    values = read_file(Path(path), known) if path else {}
    for found in known:
        if found.variable in variables:
            values[found.name] = parse(found, variables[found.variable], found.variable)
        if found.name in flags:
            values[found.name] = parse(found, flags[found.name], found.flag)
    typed: dict[str, Any] = dict(values)
    return cls(**typed)


def load_serve(arguments: argparse.Namespace) -> ServeConfig:
    """The configuration of a sidecar from a command's arguments, the process environment and ``--config``."""
    return load(
        ServeConfig,
        flags=flags_given(arguments, ServeConfig),
        variables=environment(),
        file=str(vars(arguments).get("config") or ""),
    )


def read_file(path: Path, known: tuple[Setting, ...]) -> dict[str, Value]:
    """The settings of a TOML file, by name. Raises ConfigError naming file, key and nearest key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not TOML: {error}") from error
    sections = {found.section for found in known}
    values: dict[str, Value] = {}
    for section, table in document.items():
        if section not in sections:
            raise _unknown(path, "", section, [*sections, *(found.key for found in known)], known)
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: [{section}] must be a table")
        names = {found.key: found for found in known if found.section == section}
        for key, raw in table.items():
            if key not in names:
                raise _unknown(path, section, key, [found.key for found in known], known)
            values[names[key].name] = parse(names[key], raw, f"{path}: {section}.{key}")
    return values


def _unknown(path: Path, section: str, key: str, names: list[str], known: tuple[Setting, ...]) -> ConfigError:
    homes = {found.key: f"{found.section}.{found.key}" for found in known}
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = "see `hicache serve --print-config`"
    if near:
        hint = f"did you mean {homes.get(near[0], f'[{near[0]}]')}?"
    return ConfigError(f"{path}: unknown key {f'{section}.{key}' if section else key}", hint=hint)


def suspicious_variables(variables: Mapping[str, str], known: tuple[Setting, ...]) -> list[str]:
    """One warning for each ``HICACHE_*`` variable that is no setting but nearly one."""
    names = [CONFIG_VARIABLE, *(found.variable for found in known)]
    warnings = []
    for variable in sorted(variables.keys() - set(names)):
        near = difflib.get_close_matches(variable, names, n=1, cutoff=0.85)
        if near:
            warnings.append(f"{variable} is not a setting and is ignored (did you mean {near[0]}?)")
    return warnings


def to_toml(config: object) -> str:
    """The whole configuration as TOML that ``load`` reads back as the same."""
    lines: list[str] = []
    section = ""
    for found in settings_of(type(config)):
        if found.section != section:
            section = found.section
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines.append(f"{found.key} = {_toml_value(found, getattr(config, found.name))}  # {found.help}")
    return "\n".join(lines) + "\n"


def _toml_value(found: Setting, value: Value) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{uid}" = {json.dumps(name)}' for uid, name in sorted(value.items())) + "}"
    if found.kind in {Kind.SWITCH, Kind.COUNT, Kind.SHARE}:
        return show(found, value)
    return json.dumps(show(found, value), ensure_ascii=False)
