"""Watchers' events: whether changes are announced, and surveys of what there is."""

from __future__ import annotations

from hicache.engine.actions import SurveyDone
from hicache.engine.core import Core
from hicache.engine.events import SurveyClosed, SurveyNext, SurveyOpened, Watching
from hicache.engine.news import News
from hicache.engine.survey import Survey


def watching(core: Core, event: Watching) -> None:
    """Somebody watches, or nobody does any more. Idempotent."""
    if not event.on:
        core.news = None
    elif core.news is None:
        core.news = News(core)


def survey_opened(core: Core, event: SurveyOpened) -> None:
    """Begin a survey; it has told nothing yet. Ignored while nobody watches."""
    if core.news is not None:
        core.news.surveys[event.survey] = Survey(event.survey, event.tenant, list(core.namespaces.values()))


def survey_next(core: Core, event: SurveyNext) -> None:
    """Tell its next piece."""
    survey = core.news.surveys.get(event.survey) if core.news is not None else None
    if core.news is not None and survey is not None and core.news.advance(survey):
        del core.news.surveys[event.survey]
        core.emit(SurveyDone(event.survey))


def survey_closed(core: Core, event: SurveyClosed) -> None:
    """Whoever wanted it has gone."""
    if core.news is not None:
        core.news.surveys.pop(event.survey, None)
