"""The chart of miss ratios of a report of ``hicache sim``, as an SVG of its own for the README.

hicache sim --trace mooncake_conversation.jsonl.zst --policy lru,sieve,s3fifo,arc,adaptive --out DIR
python bench/figure.py DIR/report.html docs/miss-ratio.svg
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_LEGEND_ROOM = 36
_KEPT_STYLE = re.compile(r"(svg|\.[sf]\d|\.d\d|\.ref|\.best|\.hide)")


def figure(page: str) -> str:
    """The first chart of a report with its style and a legend; light and dark as the reader's system."""
    style = page[page.index("<style>") + 7 : page.index("</style>")]
    colours = style[: style.index("* {")]
    kept = "\n".join(line for line in style.splitlines() if _KEPT_STYLE.match(line))
    chart = page[page.index("<svg", page.index("<h2>Miss ratio")) :]
    chart = chart[: chart.index("</svg>")]
    head, _, inside = chart.partition(">")
    width, height = (float(word) for word in re.findall(r'viewBox="0 0 (\S+) (\S+)"', head)[0])
    shown, at = [], 40.0
    for look, name in re.findall(r'<path class="line ([^"]*)" d="M0 5 H26"/></svg>([^<]*)<', page):
        y = height + 16
        shown.append(f'<path class="line {look}" d="M{at} {y} h24"/>')
        shown.append(f'<text class="name" x="{at + 30}" y="{y + 4}">{name}</text>')
        at += 60 + 8 * len(name)
    tall = height + _LEGEND_ROOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width:.0f}" '
        f'height="{tall:.0f}" font-family="system-ui, sans-serif"><style>\n{colours}{kept}\n</style>'
        f'<rect width="{width}" height="{tall}" fill="var(--paper)"/>{inside}{"".join(shown)}</svg>\n'
    )


def main() -> None:
    """Read a report, write its chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(figure(options.report.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
