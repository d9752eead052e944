"""Digests of configurations: never another one for a configuration that had one, since pages are found by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hicache.errors import UnsupportedError
from hicache.integrations.configs import NOT_IDENTITY, config_digest

PLAIN = {
    "model_type": "llama",
    "hidden_size": 64,
    "rms_norm_eps": 1e-5,
    "_name_or_path": "/a/b",
    "use_cache": True,
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "dynamic"},
    "eos_token_id": [1, 2],
    "name": "Größe",
    "odd": None,
}
ODD = {
    "model_type": "x",
    "dtype": "no matter",
    "when": Path("a"),
    "layers": {1: "a", 2: "b"},
    "t": (1, 2.5, True),
    "empty": {},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN, "d6798efeec1584fa8020c6f085afc83a68795f428674735d7120dbfe729c6e1c"),
        (ODD, "315347d83f2abe8208197ac30f3b94c67209e478d5d3e1f010184f615df89b44"),
        ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
    ],
    ids=["plain", "odd", "empty"],
)
def test_digests_stay_as_they_are(config: dict[str, Any], expected: str) -> None:
    assert config_digest(config) == expected
    shuffled = dict(reversed(config.items())) | dict.fromkeys(NOT_IDENTITY, "whatever")
    assert config_digest(shuffled) == expected


def test_what_else_counts() -> None:
    assert config_digest(PLAIN, {"/dtype": "float32"}) != config_digest(PLAIN, {"/dtype": "bfloat16"})
    assert config_digest(PLAIN, {}) == config_digest(PLAIN)


def test_keys_of_any_kind_have_a_digest_that_tells_them_apart() -> None:
    configs: list[dict[Any, Any]] = [
        {"map": {1: "a", "1": "b"}},
        {"map": {1: "b", "1": "a"}},
        {"map": {1: "a", None: "b"}},
        {"map": {(1, 2): "a"}},
        {"map": [{(1, 2): "b"}]},
        {7: "a", "map": 1},
    ]
    digests = [config_digest(config, {"/dtype": "float32"}) for config in configs]
    assert len(set(digests)) == len(configs)
    swapped = {"map": dict(reversed(configs[0]["map"].items()))}
    assert config_digest(swapped, {"/dtype": "float32"}) == digests[0], "in whatever order they come"


def test_a_configuration_without_end_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(UnsupportedError, match="no digest"):
        config_digest(endless)
    with pytest.raises(UnsupportedError, match="no digest"):
        config_digest({"map": {1: endless, "1": endless}})
