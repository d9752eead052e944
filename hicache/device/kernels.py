"""The door to ``kernels/``: one typed wrapper a kernel, loaded when it is first called.

``kernels/`` travels inside the package as ``_kernels`` and stands at the top of a checkout; it is loaded by
file location, so that both work alike. What each kernel does is said beside it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hicache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels")


def gather_pages(pool: Tensor, indices: Tensor, out: Tensor) -> None:
    """``out[i] = pool[indices[i]]``."""
    _load("pages").gather_pages(pool, indices, out)


def scatter_pages(staging: Tensor, pool: Tensor, indices: Tensor) -> None:
    """``pool[indices[i]] = staging[i]``."""
    _load("pages").scatter_pages(staging, pool, indices)


def pack_layers(layers: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """Layer-first paged KV to page-first pages."""
    _load("pages").pack_layers(layers, blocks, out)


def unpack_layers(pages: Tensor, layers: Sequence[Tensor], blocks: Tensor) -> None:
    """Page-first pages back to layer-first paged KV."""
    _load("pages").unpack_layers(pages, layers, blocks)


@functools.cache
def _load(name: str) -> ModuleType:
    """A module of kernels/. Raises ConfigError where neither folder has it."""
    for folder in FOLDERS:
        path = folder / f"{name}.py"
        if not path.is_file():
            continue
        spec = importlib.util.spec_from_file_location(f"hicache_kernels_{name}", path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    raise ConfigError(
        f"the kernels are missing: no {name}.py in {' or '.join(map(str, FOLDERS))}",
        hint="install hicache from a wheel, or keep kernels/ beside hicache/ in a checkout",
    )
