"""The page itself: what was asked, what was found, charts, tables, and everything needed to run it again."""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import json
from collections.abc import Sequence

from hicache.sim.packed import TraceFacts
from hicache.sim.report import sections
from hicache.sim.report.sections import Looks
from hicache.sim.summary import Line


@dataclasses.dataclass(frozen=True, slots=True)
class Story:
    """What a report tells. ``references``: curves beside the policies', by name: (pages, hit ratio)."""

    facts: TraceFacts
    lines: Sequence[Line]
    references: dict[str, list[tuple[int, float]]]
    baseline: str
    page_bytes: int
    version: str
    command: str
    sources: dict[str, str]  # of constants and prices


def render(story: Story) -> str:
    """The whole page."""
    style, script = _asset("style.css"), _asset("script.js")
    looks = Looks([line.policy for line in story.lines], story.references)
    body = "".join(
        [_head(story), _findings(story), _picker(story, looks), *_charts(story, looks), _foot(story)]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>hicache sim: {html.escape(story.facts.name)}</title><style>{style}</style></head>"
        f'<body>{body}<div id="tip"></div><script>{script}</script></body></html>\n'
    )


def _asset(name: str) -> str:
    return importlib.resources.files("hicache.sim.report").joinpath(name).read_text(encoding="utf-8")


def _head(story: Story) -> str:
    facts, one = story.facts, story.lines[0].one
    config = one["config"]
    cells = {
        "requests": f"{facts.requests:,}",
        "blocks": f"{facts.blocks:,}",
        "different blocks": f"{facts.unique_blocks:,}",
        "tokens a block": f"{facts.block_tokens:,}",
        "a cache without end hits": f"{facts.bound:.4f}",
        "model": str(config["model"]),
        "hardware": str(config["hardware"]),
        "one block's KV": sections.size(story.page_bytes),
        "warm-up": f"{one['warmup']['requests']:,} requests",
        "seeds": ", ".join(sorted({str(r["config"]["seed"]) for line in story.lines for r in line.results})),
    }
    shown = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in cells.items()
    )
    return (
        f"<h1>What a cache would do for {html.escape(facts.name)}</h1>"
        f'<p class="soft">Replayed through the engine of hicache {html.escape(story.version)} by <code>hicache sim'
        f'</code>. Trace SHA-256 <code>{facts.sha256}</code>.</p><dl class="facts">{shown}</dl>'
    )


def _findings(story: Story) -> str:
    found = sections.findings(story.lines, story.baseline, story.page_bytes)
    return f"<h2>In short</h2><ul class='findings'>{''.join(f'<li>{each}</li>' for each in found)}</ul>"


def _picker(story: Story, looks: Looks) -> str:
    points = list(dict.fromkeys(sections.point(line) for line in story.lines))
    chosen = points[len(points) // 2]
    options = "".join(
        f"<option{' selected' if each == chosen else ''}>{html.escape(each)}</option>" for each in points
    )
    legend = "".join(
        f'<button data-of="{html.escape(name)}"><svg viewBox="0 0 26 10"><path class="line {look}" d="M0 5 H26"/>'
        f"</svg>{html.escape(name)}</button>"
        for name, look in looks.all.items()
    )
    return (
        f'<div class="bar"><label>capacity and mode <select id="pick">{options}</select></label>'
        f'<div class="legend" title="click to hide or show">{legend}</div></div>'
    )


def _charts(story: Story, looks: Looks) -> list[str]:
    return [
        sections.curves(story.lines, story.references, looks, story.page_bytes),
        sections.differences(story.lines, story.baseline, looks),
        sections.tiers(story.lines),
        sections.moved(story.lines),
        sections.prefill(story.lines, looks),
        sections.first_tokens(story.lines, looks),
        sections.money(story.lines, looks),
        sections.equivalence(story.lines, story.page_bytes),
        sections.table(story.lines, story.baseline),
    ]


def _foot(story: Story) -> str:
    one = story.lines[0].one
    config = html.escape(json.dumps(one["config"], indent=2))
    sources = "".join(
        f"<li>{html.escape(name)}: {html.escape(text)}</li>" for name, text in story.sources.items()
    )
    return (
        "<h2>How to run it again</h2>"
        f"<p><code>{html.escape(story.command)}</code></p>"
        f"<p>Warm-up: {html.escape(one['warmup']['rule'])}. Intervals: 95 %, bootstrap over stretches of consecutive "
        "requests; differences on the same draws. TTFT in instant mode is that of an idle machine.</p>"
        f"<ul>{sources}</ul><details><summary>Settings of the first cell</summary><pre>{config}</pre></details>"
    )
