"""Stand-ins for modules that a peer imports and its measured part does not use.

Only the names given are stubbed, and only when they are not installed. A stub answers every attribute with
another stub, so that decorators, base classes and constants at module level pass; what is really called in a
measured path would give nonsense, so a measuring script checks its results (matched lengths, evicted tokens).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


class _AnythingMeta(type):
    """Makes a class that answers every attribute and call, and that can stand in isinstance() and class bases."""

    def __call__(cls, *args: object, **kwargs: object) -> object:
        if not cls.__dict__.get("_is_stub"):
            return super().__call__()
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]  # used as a decorator: give the function back
        return cls

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item: object) -> object:
        return cls


def _anything(name: str) -> type:
    return _AnythingMeta(name, (), {"_is_stub": True})


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        used.add(f"{self.__name__}.{name}")
        made = _anything(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        if fullname.split(".", maxsplit=1)[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StubModule(spec.name)
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        stubbed.add(module.__name__.split(".")[0])


#: Top-level names that were really replaced, and the attributes asked of them.
stubbed: set[str] = set()
used: set[str] = set()


def install(names: list[str]) -> None:
    """Stub those of ``names`` (top-level modules) that are not installed."""
    missing = frozenset(n for n in names if n not in sys.modules and importlib.util.find_spec(n) is None)
    sys.meta_path.append(_Finder(missing))
