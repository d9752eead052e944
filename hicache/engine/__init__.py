"""The pure engine: decisions only. Events in, actions out."""

from hicache.engine.engine import Engine
from hicache.engine.options import EngineOptions
from hicache.engine.views import EngineStats, MatchView, NodeView, OperationView, PagePlace, TierView

__all__ = [
    "Engine",
    "EngineOptions",
    "EngineStats",
    "MatchView",
    "NodeView",
    "OperationView",
    "PagePlace",
    "TierView",
]
