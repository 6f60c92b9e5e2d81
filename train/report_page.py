"""The pieces of a report: HTML and SVG that need nothing from anywhere else."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fcfcfb; --soft: #5d6670; --line: #d9dde1; --card: #f2f3f4;
  --c0: #2563b5; --c1: #c2540a; --c2: #1f7f4c; --c3: #a3298c; --c4: #7a5f00; --c5: #0c7d8c; --c6: #b3263a;
  --c7: #6549c9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #15181c; --soft: #9aa4ae; --line: #333a42;
  --card: #1e2329; --c0: #6ea8f0; --c1: #f0954d; --c2: #5fc98f; --c3: #e07fcb; --c4: #d6b744; --c5: #4fc3d4;
  --c6: #f0788a; --c7: #a893f5 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1280px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .2rem 0 }  h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
header p { margin: 0; color: var(--soft) }
.scroll { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal }
th { color: var(--soft); font-weight: 600; white-space: nowrap }  td.number { text-align: right; white-space: nowrap }
td.text { max-width: 40rem; overflow-wrap: break-word }
pre { background: var(--card); padding: .7rem; overflow-x: auto; white-space: pre-wrap; font-size: .82rem;
  border-radius: 4px }
summary { cursor: pointer; color: var(--soft); padding: .2rem 0 }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)) }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)) }
figure { margin: 0; min-width: 0 }  figcaption { font-size: .85rem; color: var(--soft) }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
svg { width: 100%; height: auto; display: block }  svg text { fill: var(--soft); font-size: 12px }
svg .axis { stroke: var(--line); fill: none }  svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.legend { font-size: .8rem; display: flex; flex-wrap: wrap; gap: 0 1rem }  .legend i { font-style: normal }
""" + "".join(
    f".c{k} {{ stroke: var(--c{k}) }} i.c{k}, circle.c{k} {{ color: var(--c{k}); fill: var(--c{k}) }}\n"
    for k in range(8)
)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 56, 20, 10, 30  # of a chart, and the room around its lines
MOST_POINTS = 400  # of a line: a chart is not twice as wide in pixels


def page(title: str, about: str, parts: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{name}</h1><p>{html.escape(about)}</p></header>\n"
        f"<main>{''.join(parts)}</main></body></html>\n"
    )


def section(title: str, inside: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{inside}</section>\n"


def details(title: str, inside: str, open_at_first: bool = False) -> str:
    return f"<details{' open' * open_at_first}><summary>{html.escape(title)}</summary>{inside}</details>\n"


def grid(parts: Sequence[str], wide: bool = False) -> str:
    return f'<div class="grid{" wide" * wide}">{"".join(parts)}</div>\n' if parts else ""


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>\n"


def code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>\n"


def picture(file: Path) -> str:
    """A PNG, inside the page."""
    data, name = base64.b64encode(file.read_bytes()).decode(), html.escape(file.stem)
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{name}</figcaption></figure>\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for every name that a row has a value for."""
    columns = [n for n in dict.fromkeys(n for row in rows for n in row) if any(row.get(n) is not None for row in rows)]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in columns)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f'<td class="{"number" if number else "text"}">{html.escape(shown(value))}</td>'


def shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"
    if isinstance(value, bool) or not isinstance(value, int):
        return "–" if value is None else str(value)
    return f"{value:,}" if abs(value) >= 1e5 else str(value)


# ---- charts ----------------------------------------------------------------------------------------------------------


def chart(title: str, lines: Mapping[str, Points], marks: bool = False) -> str:
    """Lines over optimizer steps; where there are eight or more, colours come again. marks: a dot for each point."""
    lines = {name: thinned(of) for name, points in lines.items() if (of := [p for p in points if math.isfinite(p[1])])}
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    xs, ys = ticks(*_ends([x for x, _ in every])), ticks(*_ends([y for _, y in every]))
    across, up = _scale(xs, LEFT, WIDTH - RIGHT), _scale(ys, HEIGHT - BOTTOM, TOP)
    drawn = [
        f'<path class="axis" d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{_short(y)}</text>'
        for y in ys
    ]
    drawn += [f'<text x="{across(x):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{_short(x)}</text>' for x in xs]
    for number, (name, points) in enumerate(lines.items()):
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
        drawn.append(f'<path class="c{number % 8}" d="M{path}"/>')
        for x, y in points if marks or len(points) == 1 else ():
            told = f"{html.escape(name)}, step {x:g}: {y:.6g}"
            place = f'class="c{number % 8}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6"'
            drawn.append(f"<circle {place}><title>{told}</title></circle>")
    shown_title = html.escape(title)
    legend = "".join(f'<i class="c{k % 8}">● {html.escape(name)}</i>' for k, name in enumerate(lines))
    return (
        f'<figure><figcaption>{shown_title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{shown_title} over optimizer steps">{"".join(drawn)}</svg>'
        + (f'<div class="legend">{legend}</div>' if len(lines) > 1 else "")
        + "</figure>\n"
    )


def thinned(points: Points) -> Points:
    """At most MOST_POINTS of a line: of each stretch its least and its greatest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from one at or below `low` to one at or above `high`."""
    raw = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1e-30) else (low - 0.5, high + 0.5)


def _scale(marks: Sequence[float], start: float, end: float) -> Any:
    return lambda value: start + (value - marks[0]) / (marks[-1] - marks[0]) * (end - start)


def _short(value: float) -> str:
    """At most six characters or so, for the side of a chart."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"
