"""Small JSON files that are either the old one or the new one, whatever happens; and what a file takes on the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path


def read_json(path: Path) -> dict[str, object]:
    """A small JSON object; an empty one for a file that is missing or unreadable."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, object]) -> None:
    """Replace a small JSON file, durably. Raises OSError."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    fsync_folder(path.parent)


def du_bytes(path: Path) -> int:
    """What ``du`` shows for one file or folder: its length may be more, where it has holes. Raises OSError."""
    return path.lstat().st_blocks * 512


def fsync_folder(path: Path) -> None:
    """The names in a folder are on the medium. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
