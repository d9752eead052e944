"""Where settings come from, which source wins, and what a mistake is answered with."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from hicache.cli import config
from hicache.cli.settings import Kind, ServeConfig, settings_of
from hicache.errors import ConfigError
from hicache.runtime.options import ServiceOptions
from hicache.types import WritePolicy


def written(folder: Path, text: str) -> str:
    path = folder / "hicache.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, '[tiers]\nhost_bytes = "1MiB"\ndisk_bytes = "2MiB"\ndevice_bytes = 3\n')
    loaded = config.load(
        ServeConfig,
        flags={"host_bytes": "10MiB"},
        variables={"HICACHE_HOST_BYTES": "5MiB", "HICACHE_DISK_BYTES": "6MiB"},
        file=file,
    )
    assert (loaded.host_bytes, loaded.disk_bytes, loaded.device_bytes) == (10 << 20, 6 << 20, 3)
    assert loaded.policy == ServeConfig().policy


def test_the_variable_names_a_file_and_the_flag_another(tmp_path: Path) -> None:
    file = written(tmp_path, '[policy]\ndefault_ttl = "5s"\n')
    variables = {"HICACHE_CONFIG": file}
    assert config.load(ServeConfig, flags={}, variables=variables).default_ttl_ms == 5000
    other = tmp_path / "other.toml"
    other.write_text("", encoding="utf-8")
    assert config.load(ServeConfig, flags={}, variables=variables, file=str(other)).default_ttl_ms == 30_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tiers]\nhost_byte = 1\n", r"unknown key tiers.host_byte \(did you mean tiers.host_bytes\?\)"),
        ("[server]\nhost_bytes = 1\n", r"unknown key server.host_bytes \(did you mean tiers.host_bytes\?\)"),
        ("host_bytes = 1\n", r"unknown key host_bytes \(did you mean tiers.host_bytes\?\)"),
        ("[tier]\nhost_bytes = 1\n", r"unknown key tier \(did you mean \[tiers\]\?\)"),
        ("[tiers]\nzzz = 1\n", r"unknown key tiers.zzz \(see `hicache serve --print-config`\)"),
        ("server = 1\n", r"\[server\] must be a table"),
        ('[tiers]\nhost_bytes = "8G"\n', r"tiers.host_bytes: '8G' is not a size"),
        ("[tiers]\nhost_bytes = true\n", "tiers.host_bytes: True does not fit"),
        ("[tiers]\nhost_bytes = -1\n", "tiers.host_bytes: '-1' is not a whole number"),
        ("[server]\ngrace = 30\n", 'server.grace: 30 does not fit.*in quotes, such as "30s"'),
        ("[policy]\nwrite_policy = 'never'\n", "policy.write_policy: 'never' is not one of write-through"),
        (
            "[server]\nallow_plain_tcp = 'perhaps'\n",
            "server.allow_plain_tcp: 'perhaps' is neither true nor false",
        ),
        ("[server\n", "is not TOML"),
    ],
)
def test_a_mistake_in_a_file_names_file_key_and_cure(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(ServeConfig, flags={}, variables={}, file=written(tmp_path, text))
    assert "hicache.toml" in str(caught.value)


def test_a_mistake_in_a_flag_or_variable_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^--grace: 'soon' is not a duration"):
        config.load(ServeConfig, flags={"grace_ms": "soon"}, variables={})
    with pytest.raises(ConfigError, match=r"^HICACHE_METRICS_PORT: 'x' is not a whole number"):
        config.load(ServeConfig, flags={}, variables={"HICACHE_METRICS_PORT": "x"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config: cannot read .*nowhere\.toml: No such file"):
        config.load(ServeConfig, flags={}, variables={}, file=str(tmp_path / "nowhere.toml"))


def test_what_is_printed_is_read_back_as_the_same(tmp_path: Path) -> None:
    changed = ServeConfig(
        socket_path='/run/"odd"/é.sock',
        socket_mode=0o660,
        tenants={1000: "red", 1001: 'b"lue'},
        metrics_port=9400,
        grace_ms=1500,
        allow_plain_tcp=True,
        host_bytes=(3 << 30) + 1,
        default_ttl_ms=90_000,
    )
    for settings in (ServeConfig(), changed):
        file = written(tmp_path, config.to_toml(settings))
        assert config.load(ServeConfig, flags={}, variables={}, file=file) == settings


def test_every_setting_has_a_flag_that_reaches_it() -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, ServeConfig)
    text = {
        Kind.SIZE: "3MiB",
        Kind.DURATION: "7s",
        Kind.COUNT: "4",
        Kind.SHARE: "0.5",
        Kind.MODE: "640",
        Kind.TENANTS: "7=x",
    }
    for found in settings_of(ServeConfig):
        other = [choice for choice in found.choices if choice != found.default]
        value = other[0] if found.choices else text.get(found.kind, "word")
        words = [found.flag, value]
        if found.kind is Kind.SWITCH:
            words = [found.flag.replace("--", "--no-") if found.default else found.flag]
        given = config.flags_given(parser.parse_args(words), ServeConfig)
        loaded = config.load(ServeConfig, flags=given, variables={})
        assert list(given) == [found.name]
        assert getattr(loaded, found.name) != found.default
        assert dataclasses.replace(loaded, **{found.name: found.default}) == ServeConfig()


def test_variables_that_nearly_are_settings_are_warned_about() -> None:
    known = settings_of(ServeConfig)
    variables = {"HICACHE_HOST_BYTE": "1", "HICACHE_HOST_BYTES": "1", "HICACHE_TEST_SEED": "1"}
    (warning,) = config.suspicious_variables(variables, known)
    assert "HICACHE_HOST_BYTE is not a setting" in warning
    assert "HICACHE_HOST_BYTES?" in warning


def test_the_default_socket_stands_in_a_directory_of_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert config.default_socket_path() == str(tmp_path / "hicache.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = Path(config.default_socket_path())
    config.prepare_socket_dir(str(path))
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_socket_directory_that_is_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = Path(config.default_socket_path())
    (tmp_path / "elsewhere").mkdir()
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="belongs to another user"):
        config.prepare_socket_dir(str(path))


def test_every_option_of_the_service_can_be_set_and_has_the_same_default() -> None:
    """``digest`` is for tests only; the host tier is on unless it is switched off."""
    mine = {found.name: found.default for found in settings_of(ServeConfig)}
    theirs = {field.name: field.default for field in dataclasses.fields(ServiceOptions)}
    assert theirs.keys() - mine.keys() == {"digest"}
    differing = {name for name in theirs.keys() & mine.keys() if theirs[name] != mine[name]}
    assert differing == {"host_bytes", "write_policy"}
    assert mine["write_policy"] == WritePolicy.SELECTIVE.value
