"""``hicache policy``: the table, and the checker on the template and on a broken policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hicache.cli.main import main
from hicache.policy import ZOO

ROOT = Path(__file__).resolve().parents[2]


def test_list_names_every_policy_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each, with parameters."""
    assert main(["policy", "list"]) == 0
    text = capsys.readouterr().out
    for name, entry in ZOO.items():
        assert any(line.startswith(name + " ") and entry.source in line for line in text.splitlines())
    assert "protected=0.8" in text
    assert "second-touch" in text


def test_check_passes_the_template_and_fails_a_broken_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0 and "keeps the contract", exit 1 with what is broken, exit 2 for what cannot be loaded."""
    monkeypatch.chdir(ROOT / "examples")
    assert main(["policy", "check", "py:policy_template:MyPolicy"]) == 0
    assert "keeps the contract" in capsys.readouterr().out
    (tmp_path / "broken_policy.py").write_text(
        "from hicache.policy.lru import LruPolicy\n"
        "class Mine(LruPolicy):\n"
        "    def hide(self, run):\n"
        "        self.find(run)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["policy", "check", "py:broken_policy:Mine"]) == 1
    text = capsys.readouterr().out
    assert "BROKEN" in text
    assert "hidden" in text
    assert main(["policy", "check", "py:nowhere:Mine"]) == 2


def test_both_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["policies"]["slru"]["parameters"]["protected"] == 0.8
    assert "second-touch" in told["admissions"]
    assert main(["policy", "check", "fifo", "--json"]) == 0
    assert all(not each["problem"] for each in json.loads(capsys.readouterr().out))
    assert main(["policy", "check", "py:json:JSONDecoder", "--json"]) == 1
    assert all(each["problem"] for each in json.loads(capsys.readouterr().out))
