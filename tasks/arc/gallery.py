"""One HTML file of a run's questions, answers and scores, which needs no other file and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.arc.grid import Episode, Grid
from tasks.arc.render import Panel, columns, printable, svg_panel, svg_patterns, svg_style

LARGEST, LEAST_CELL, MOST_CELL = 210, 7, 18  # pixels: of a grid's longer side, of a cell
STATES = {"solved": "solved", "wrong": "not solved", "unknown": "answer unknown"}


class Card(NamedTuple):
    episode: Episode
    attempts: list[Grid]
    scores: dict[str, float]  # by name, e.g. exact, shape, cell
    skill: str = ""
    confidence: Sequence[np.ndarray] = ()  # in each attempt, float [H, W]


def write_gallery(
    path: Path | str, title: str, cards: Sequence[Card], summary: Mapping[str, Mapping[str, float]]
) -> None:
    """Write a card for each question below a table of `summary`: for a skill or a baseline, its scores by name.

    Floats from 0 to 1 are shown as percentages, with bars; whole numbers (of questions) as they are; NaN as a dash.
    """
    names = list(dict.fromkeys(name for card in cards for name in card.scores))
    skills = sorted({card.skill for card in cards if card.skill})
    states = [_state(card) for card in cards]
    counts = ", ".join(f"{word} {states.count(state)}" for state, word in STATES.items() if state in states)
    title = _text(title)
    body = [
        f"<header><h1>{title}</h1><p>{len(cards)} questions: {counts or 'none'}</p></header>",
        _table(summary) if summary else "",
        f"<h2>Questions</h2>{_controls(names, skills, states)}<main>",
        *(_card(i, card, state, names) for i, (card, state) in enumerate(zip(cards, states, strict=True))),
        "</main>",
    ]
    Path(path).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}{svg_style()}</style></head>\n'
        f'<body><svg width="0" height="0" aria-hidden="true" class="defs">{svg_patterns()}</svg>\n'
        + "\n".join(body)
        + f"<script>{SCRIPT}</script></body></html>\n",
        encoding="utf-8",
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _right(card: Card) -> list[int]:
    """The numbers of the attempts that are the answer."""
    return [k for k, attempt in enumerate(card.attempts, 1) if np.array_equal(attempt, card.episode.query.output)]


def _state(card: Card) -> str:
    if card.episode.query.output is None:
        return "unknown"
    return "solved" if _right(card) else "wrong"


def _is_share(value: float) -> bool:
    return not isinstance(value, Integral) and 0 <= value <= 1


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    if isinstance(value, Integral):
        return str(value)
    return f"{100 * value:.1f} %" if _is_share(value) else f"{value:.4g}"


# ---- parts -----------------------------------------------------------------------------------------------------------


def _table(summary: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for scores in summary.values() for name in scores))
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
    rows = []
    for row, scores in summary.items():
        cells = "".join(_table_cell(scores[name]) if name in scores else "<td></td>" for name in names)
        rows.append(f'<tr><th scope="row">{_text(row)}</th>{cells}</tr>')
    return (
        '<h2 id="scores">Scores</h2><div class="scroll" role="region" aria-labelledby="scores" tabindex="0"><table>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table_cell(value: float) -> str:
    bar = f' style="--share:{100 * value:.1f}%"' if _is_share(value) else ""
    return f"<td{bar}>{_number(value)}</td>"


def _controls(names: list[str], skills: list[str], states: list[str]) -> str:
    """Hidden until the script, without which they do nothing, shows them."""

    def select(name: str, label: str, options: Mapping[str, str]) -> str:
        inner = "".join(f'<option value="{_text(value)}">{_text(text)}</option>' for value, text in options.items())
        return f'<label>{label} <select name="{name}">{inner}</select></label>'

    orders = {"": "as in the run"}
    for i, name in enumerate(names):
        orders |= {f"{i} 1": f"{name}, lowest first", f"{i} -1": f"{name}, highest first"}
    answers = {"": "all"} | {state: word for state, word in STATES.items() if state in states}
    return (
        '<form hidden><label>Find <input name="find" type="search" placeholder="id"></label>'
        + (select("skill", "Skill", {"": "all"} | {skill: skill for skill in skills}) if skills else "")
        + select("state", "Answers", answers)
        + select("order", "Order", orders)
        + '<label><input name="marks" type="checkbox"> digits in cells</label><output></output></form>'
    )


def _card(number: int, card: Card, state: str, names: list[str]) -> str:
    episode = card.episode
    sheet = columns(episode, card.attempts, card.confidence)
    longest = max(max(panel.cells.shape) for column in sheet for panel in column)
    cell = min(max(LARGEST // longest, LEAST_CELL), MOST_CELL)
    pictures = "".join(f"<div>{''.join(_figure(panel, cell) for panel in column)}</div>" for column in sheet)
    at = f" at attempt {_right(card)[0]}" if state == "solved" else ""
    skill = f'<span class="skill">{_text(card.skill)}</span>' if card.skill else ""
    scores = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_number(score)}</dd></div>" for name, score in card.scores.items()
    )
    values = " ".join(str(float(card.scores.get(name, math.nan))) for name in names)
    return (
        f'<article id="question-{number}" data-id="{_text(episode.id)}" data-skill="{_text(card.skill)}" '
        f'data-state="{state}" data-scores="{values}"><div class="head">'
        f'<h3><a href="#question-{number}">{_text(episode.id)}</a></h3>{skill}'
        f'<span class="{state}">{STATES[state]}{at}</span><dl>{scores}</dl></div>'
        f'<div class="sheet">{pictures}</div></article>'
    )


def _figure(panel: Panel, cell: int) -> str:
    height, width = panel.cells.shape
    label = f"{panel.title}, {height} by {width} cells"
    picture = svg_panel(panel.cells, f'role="img" aria-label="{label}" width="{cell * width}" height="{cell * height}"')
    return f"<figure><figcaption>{panel.title} <small>{height} × {width}</small></figcaption>{picture}</figure>"


# ---- what all galleries share ----------------------------------------------------------------------------------------

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing can be fetched

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1d21; --soft: #5b606b; --card: #f6f6f8; --edge: #d8dae0;
  --good: #00634a; --bad: #a33c00; --bar: #cfe2f5; --link: #0a4fa8 }
@media (prefers-color-scheme: dark) { :root { --paper: #131417; --ink: #e8e9ec; --soft: #a2a7b3; --card: #1d1f24;
  --edge: #383b44; --good: #4fcfa5; --bad: #ff9d5c; --bar: #24435f; --link: #8ab8f5 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.5rem } h2 { margin: 1.5rem 0 .5rem; font-size: 1.15rem } h3 { margin: 0; font-size: 1rem }
h1, h3 { overflow-wrap: anywhere }
header p { margin: .25rem 0; color: var(--soft) }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.defs { position: absolute }
.scroll { overflow-x: auto; max-width: max-content }
table { width: min-content; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--edge); text-align: right; white-space: nowrap }
tbody th { position: sticky; left: 0; background: var(--paper); text-align: left; font-weight: 500 }
thead th { color: var(--soft); font-weight: 500; white-space: normal; vertical-align: bottom }
td { min-width: 6.5rem; background: linear-gradient(90deg, var(--bar) var(--share, 0%), transparent var(--share, 0%)) }
form { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin-bottom: .75rem }
form[hidden], article[hidden] { display: none }
input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--edge);
  border-radius: .3rem; padding: .2rem .4rem; max-width: 100% }
output { color: var(--soft) }
article { margin-bottom: .75rem; padding: .75rem; background: var(--card); border: 1px solid var(--edge);
  border-radius: .5rem; content-visibility: auto; contain-intrinsic-size: auto 28rem }
article:target { border-color: var(--link) }
.head { display: flex; flex-wrap: wrap; gap: .2rem .9rem; align-items: baseline; margin-bottom: .6rem }
.skill, dt, .unknown { color: var(--soft) } .solved { color: var(--good) } .wrong { color: var(--bad) }
dl { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: 0; font-size: .875rem;
  font-variant-numeric: tabular-nums }
dl div { display: flex; gap: .3rem } dd { margin: 0 }
.sheet { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem }
figure { margin: 0 0 .6rem } figcaption { margin-bottom: .2rem; font-size: .8125rem; white-space: nowrap }
small { color: var(--soft); font-size: inherit }
figure svg { display: block; overflow: visible; max-width: 100%; height: auto }
@media (max-width: 32rem) { .sheet { column-gap: .75rem } figure svg { max-width: calc(50vw - 2.4rem) } }
"""

SCRIPT = """
const form = document.querySelector("form"), main = document.querySelector("main"), fields = form.elements;
const cards = [...main.children];
function sort() {
  const [score, sign] = fields.order.value.split(" ").map(Number);
  const value = card => sign * card.dataset.scores.split(" ")[score];
  const last = x => Number.isNaN(x) ? Infinity : x;
  main.append(...(sign ? [...cards].sort((a, b) => last(value(a)) - last(value(b)) || 0) : cards));
}
function filter() {
  const find = fields.find.value.trim().toLowerCase();
  const fits = card => card.dataset.id.toLowerCase().includes(find)
    && ["skill", "state"].every(name => !fields[name]?.value || fields[name].value === card.dataset[name]);
  for (const card of cards) card.hidden = !fits(card);
  form.querySelector("output").value = `${cards.filter(fits).length} of ${cards.length} shown`;
  document.body.classList.toggle("marks", fields.marks.checked);
}
form.addEventListener("input", filter);
fields.order.addEventListener("input", sort);
form.addEventListener("submit", event => event.preventDefault());
form.hidden = false;
sort();
filter();
"""
