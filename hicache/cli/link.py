"""How the commands reach a running sidecar: the flags they share, and the client made from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hicache.cli import config
from hicache.cli.settings import ClientConfig
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from hicache.rpc.client import Client
    from hicache.rpc.client.arguments import OptionFields


def add_flags(parser: argparse.ArgumentParser, *, without_target: str = "") -> None:
    """Add ``--target`` and its company; ``without_target`` tells what happens without it, if that is special."""
    config.add_flags(parser, ClientConfig, defaults={"target": without_target} if without_target else {})


def load(arguments: argparse.Namespace) -> ClientConfig:
    """The settings in effect: flags over ``HICACHE_*`` variables over defaults."""
    flags = config.flags_given(arguments, ClientConfig)
    return config.load(ClientConfig, flags=flags, variables=config.environment())


def connect(arguments: argparse.Namespace, name: str) -> Client:
    """A client of the sidecar that the flags name, attached. Raises UnavailableError when none answers."""
    settings = load(arguments)
    return open_client(settings.target or f"unix://{config.default_socket_path()}", name, settings)


def open_client(target: str, name: str, settings: ClientConfig | None = None) -> Client:
    """A client of ``target``, to be used with ``with``."""
    from hicache.rpc.client import Client

    return Client(target, **client_fields(settings or ClientConfig(), name))


def client_fields(settings: ClientConfig, name: str) -> OptionFields:
    """What a client of either kind is made with. Raises ConfigError for a file that cannot be read."""
    from hicache.rpc.client import Tls

    seconds = settings.timeout_ms / 1000
    return {
        "name": f"hicache {name}",
        "timeout_s": seconds,
        "connect_timeout_s": seconds,
        "token": _read(settings.auth_token_file, "--auth-token-file").strip(),
        "tls": Tls(root_certificates=_read(settings.tls_ca, "--tls-ca").encode())
        if settings.tls_ca
        else None,
    }


def _read(path: str, flag: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error
