"""Pictures of questions and answers: for a terminal, as SVG and as PNG.

All three show the same sheet of columns, wrapped to the width there is: a demonstration's input over its output, the
query over the truth, an attempt over its diff and the confidence in each of its cells. The marks of a diff, and those
that `marks=True` puts into every cell, tell apart what people who confuse colours could not.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.arc.grid import MAX_SIZE, NUM_COLOURS, Episode, Grid, Pair, Puzzle

# What a cell of a sheet can be: one of the ten colours, a verdict of a diff, or a confidence in tenths.
RIGHT, WRONG, MISSING, EXTRA, NOTHING, CONFIDENCE = range(NUM_COLOURS, NUM_COLOURS + 6)
MISTAKES = (WRONG, MISSING, EXTRA)  # always bear their marks
COLOURS = ["000000", "0074D9", "FF4136", "2ECC40", "FFDC00", "AAAAAA", "F012BE", "FF851B", "7FDBFF", "870C25"]
VERDICTS = ["E8E8E8", "D55E00", "56B4E9", "CC79A7", "FFFFFF"]  # of Okabe and Ito, on white
UNSURE, SURE = (0x3B, 0x0F, 0x70), (0xFD, 0xF3, 0xDC)  # the ends of the heat map
FLAT = [list(bytes.fromhex(colour)) for colour in COLOURS + VERDICTS]
RGB = np.concatenate([FLAT, np.linspace(UNSURE, SURE, 10).round()]).astype(np.uint8)  # [codes, 3]
HEX = [f"#{r:02X}{g:02X}{b:02X}" for r, g, b in RGB.tolist()]
LETTERS = "0123456789.x-+ 0123456789"
LINE = 0x6E  # grey of the lines between cells
INK = np.where(RGB @ [0.299, 0.587, 0.114] > 110, 0, 255).astype(np.uint8)  # grey of a mark that shows on each colour
# Letters of 3 x 5 dots; a row is an octal digit. A right cell bears none.
DIGITS = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71122", "75757", "75717"]
BITMAPS = np.array(
    [
        [[int(row) >> shift & 1 for shift in (2, 1, 0)] for row in letter]
        for letter in [*DIGITS, "00000", "55255", "00700", "02720", "00000", *DIGITS]
    ],
    dtype=bool,
)  # [codes, 5, 3]

# Pixels of SVG and PNG.
SHEET_WIDTH, MARGIN = 1600, 16
LINE_HEIGHT, BASELINE, LETTER_HEIGHT = 18, 12, 12
DOTS = 8  # a cell is so many dots of its mark wide
DPI = 64  # a power of two: a figure's inches are then exactly its pixels


class Panel(NamedTuple):
    title: str
    cells: np.ndarray  # uint8 [H, W], indices of RGB, LETTERS and BITMAPS


Column = list[Panel]


def columns(shown: Episode | Puzzle, attempts: Sequence = (), confidence: Sequence = ()) -> list[Column]:
    """The sheet of an episode, of `attempts` (grids) and of how sure each is of its cells (float [H, W], 0 … 1).

    A puzzle has as many questions as test inputs; `attempts` and `confidence` are then sequences for each of them.
    Raises ValueError where there are more of them than there is to answer, or a confidence does not fit its attempt.
    """
    if isinstance(shown, Episode):
        demos, questions, attempts, confidence = shown.demos, (shown.query,), (attempts,), (confidence,)
    else:
        demos, questions = shown.train, shown.test
    sheet = [_pair(pair, f"demo {k} in", f"demo {k} out") for k, pair in enumerate(demos, 1)]
    if len(attempts) > len(questions) or len(confidence) > len(questions):
        raise ValueError(f"{shown.id}: answers to {max(len(attempts), len(confidence))} of {len(questions)} questions")
    for i, (pair, tries, sure) in enumerate(itertools.zip_longest(questions, attempts, confidence, fillvalue=()), 1):
        of_several = f" {i}" if len(questions) > 1 else ""
        sheet.append(_pair(pair, f"query{of_several}", f"truth{of_several}"))
        if len(sure) > len(tries):
            raise ValueError(f"{shown.id}: confidence in {len(sure)} attempts, of which there are {len(tries)}")
        for k, (attempt, heat) in enumerate(itertools.zip_longest(tries, sure), 1):
            name = f"{of_several}.{k}" if of_several else f" {k}"
            column = [Panel(f"attempt{name}", attempt)]
            if pair.output is not None:
                column.append(_diff(attempt, pair.output, f"diff{name}"))
            if heat is not None:
                column.append(Panel(f"confidence{name}", _tenths(heat, attempt.shape, f"{shown.id}, attempt {k}")))
            sheet.append(column)
    return sheet


def _pair(pair: Pair, above: str, below: str) -> Column:
    return [Panel(title, grid) for title, grid in zip((above, below), pair, strict=True) if grid is not None]


def _diff(attempt: Grid, truth: Grid, name: str) -> Panel:
    """Over the smallest rectangle that holds both."""
    size = np.maximum(attempt.shape, truth.shape)
    said, due = (
        np.pad(x, [(0, n - m) for n, m in zip(size, x.shape, strict=True)], constant_values=NUM_COLOURS)
        for x in (attempt, truth)
    )
    in_said, in_due = said < NUM_COLOURS, due < NUM_COLOURS
    verdicts = [in_said & in_due & (said == due), in_said & in_due, in_due, in_said]
    cells = np.select(verdicts, [RIGHT, WRONG, MISSING, EXTRA], NOTHING).astype(np.uint8)
    wrong = np.isin(cells, MISTAKES).sum()
    return Panel(f"{name}: {wrong} wrong" if wrong else f"{name}: right", cells)


def _tenths(confidence: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    if confidence.shape != shape:
        raise ValueError(f"{where}: confidence for {_by(confidence.shape)} cells, of a grid of {_by(shape)}")
    bad = np.argwhere(~((confidence >= 0) & (confidence <= 1)))
    if len(bad):
        cell = tuple(bad[0].tolist())
        raise ValueError(f"{where}: confidence in cell {cell} is {confidence[cell]}; a probability lies in 0 to 1")
    return (CONFIDENCE + np.minimum(10 * confidence, 9)).astype(np.uint8)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# ---- where things lie ------------------------------------------------------------------------------------------------


class Units(NamedTuple):
    """Sizes (characters or pixels) of what is laid out."""

    cell: tuple[int, int]  # width, height
    line: int  # of a title
    letter: int
    gap: tuple[int, int]


CHARACTERS = Units((2, 1), 1, 1, (3, 1))


class Sheet(NamedTuple):
    title: str
    boxes: list[tuple[int, int, Panel]]  # left and top, where its title begins
    width: int
    height: int
    units: Units


def _laid_out(title: str, sheet: list[Column], units: Units, limit: int) -> Sheet:
    """Columns side by side, as many as go into `limit`, the panels of a row level with each other."""
    rows: list[list[tuple[int, Column]]] = [[]]
    width, x = units.letter * len(title), 0
    for column in sheet:
        wide = max(max(units.cell[0] * panel.cells.shape[1], units.letter * len(panel.title)) for panel in column)
        if rows[-1] and x + wide > limit:
            rows.append([])
            x = 0
        rows[-1].append((x, column))
        width = max(width, x + wide)
        x += wide + units.gap[0]
    boxes, y = [], units.line + units.gap[1]
    for row in rows:
        for level in itertools.zip_longest(*(column for _, column in row)):
            panels = [(x, panel) for (x, _), panel in zip(row, level, strict=True) if panel is not None]
            boxes += [(x, y, panel) for x, panel in panels]
            y += units.line + max(units.cell[1] * len(panel.cells) for _, panel in panels) + units.gap[1]
    return Sheet(printable(title), boxes, width, y - units.gap[1], units)


def _picture(shown: Episode | Puzzle, attempts: Sequence, confidence: Sequence) -> Sheet:
    """In pixels, without the margin. Small grids have large cells, but all of a sheet have the same."""
    sheet = columns(shown, attempts, confidence)
    largest = max(max(panel.cells.shape) for column in sheet for panel in column)
    cell = DOTS * min(max(MAX_SIZE // largest, 2), 4)
    return _laid_out(shown.id, sheet, Units((cell, cell), LINE_HEIGHT, 7, (20, 14)), SHEET_WIDTH)


def printable(text: str) -> str:
    """Without the control characters that a puzzle's id could hold: they would steer a terminal or break an SVG."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- terminal --------------------------------------------------------------------------------------------------------


def terminal(
    shown: Episode | Puzzle,
    attempts: Sequence = (),
    confidence: Sequence = (),
    *,
    colour: bool | None = None,
    marks: bool = False,
    width: int | None = None,
) -> str:
    """Lines of blocks in 24-bit colour, or of digits. See `columns`.

    colour: None is yes in a terminal, unless NO_COLOR is set. width: None is the terminal's.
    """
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    limit = width or shutil.get_terminal_size().columns
    sheet = _laid_out(shown.id, columns(shown, attempts, confidence), CHARACTERS, limit)
    letters = np.full((sheet.height, sheet.width), " ")
    codes = np.full((sheet.height, sheet.width), NOTHING)
    letters[0, : len(sheet.title)] = list(sheet.title)
    for x, y, (title, cells) in sheet.boxes:
        letters[y, x : x + len(title)] = list(title)
        block = np.s_[y + 1 : y + 1 + len(cells), x : x + 2 * cells.shape[1]]
        marked = np.isin(cells, MISTAKES) | marks | (not colour)
        letters[block][:, ::2] = np.where(marked, np.array(list(LETTERS))[cells], " ")
        codes[block] = cells.repeat(2, 1)
    if not colour:
        return "\n".join("".join(line).rstrip() for line in letters) + "\n"
    return "\n".join(_escaped("".join(line), row) for line, row in zip(letters, codes, strict=True)) + "\n"


def _escaped(letters: str, codes: np.ndarray) -> str:
    """A line with the escape sequences that colour it. codes: int [len(letters)]."""
    parts = []
    for start, length in _runs(codes[None]):
        text, code = letters[start : start + length], codes[start]
        if code == NOTHING:
            parts.append(text)
        else:
            r, g, b = RGB[code]
            parts.append(f"\x1b[48;2;{r};{g};{b};38;2;{INK[code]};{INK[code]};{INK[code]}m{text}\x1b[0m")
    return "".join(parts).rstrip()


def _runs(cells: np.ndarray) -> list[tuple[int, int]]:
    """Where cells alike stand side by side in a row of [H, W]: the flat index of the first, and how many."""
    begins = np.ones(cells.shape, dtype=bool)
    begins[:, 1:] = cells[:, 1:] != cells[:, :-1]
    starts = np.flatnonzero(begins)
    return list(zip(starts.tolist(), np.diff(starts, append=cells.size).tolist(), strict=True))


# ---- SVG -------------------------------------------------------------------------------------------------------------


def svg(shown: Episode | Puzzle, attempts: Sequence = (), confidence: Sequence = (), *, marks: bool = False) -> str:
    """A file that needs no other. See `columns`."""
    sheet = _picture(shown, attempts, confidence)
    body = [f'<text y="{BASELINE}">{escape(sheet.title)}</text>']
    for x, y, (title, cells) in sheet.boxes:
        height, width = (sheet.units.cell[0] * n for n in cells.shape)
        body.append(f'<text x="{x}" y="{y + BASELINE}">{title}</text>')
        body.append(svg_panel(cells, f'x="{x}" y="{y + LINE_HEIGHT}" width="{width}" height="{height}"'))
    attributes = f'width="{sheet.width + 2 * MARGIN}" height="{sheet.height + 2 * MARGIN}"'
    if marks:
        attributes += ' class="marks"'
    style = f"text{{font:{LETTER_HEIGHT}px sans-serif;fill:#222}}{svg_style()}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>'
        f"<title>{escape(sheet.title)}</title><style>{style}</style>{svg_patterns()}"
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<g transform="translate({MARGIN} {MARGIN})">{"".join(body)}</g></svg>\n'
    )


def svg_panel(cells: np.ndarray, attributes: str) -> str:
    """An <svg> of `attributes`, coloured by `svg_style`: a path for each colour, with a stroke for each run of cells.

    Rows are centred on whole numbers, so that a run is "M3 4h5": half the bytes of a rectangle's outline.
    """
    height, width = cells.shape
    strokes: dict[int, list[str]] = {}
    for start, length in _runs(cells):
        strokes.setdefault(int(cells.flat[start]), []).append(f"M{start % width} {start // width}h{length}")
    paths = [f'<path class="c{code}" d="{"".join(d)}"/>' for code, d in strokes.items() if code != NOTHING]
    lines = f'<rect class="lines" y="-.5" width="{width}" height="{height}"/>'
    return f'<svg {attributes} viewBox="0 -.5 {width} {height}">{"".join(paths)}{lines}</svg>'


def svg_style() -> str:
    """CSS of the cells; within an element of class `marks` they bear their marks."""
    line = f"#{LINE:02x}{LINE:02x}{LINE:02x}"
    rules = [
        "path[class^=c]{shape-rendering:crispEdges}svg svg{overflow:visible}",
        f".line{{fill:none;stroke:{line};stroke-width:.1}}.lines{{fill:url(#lines);stroke:{line};stroke-width:.05}}",
    ]
    for code, colour in enumerate(HEX):
        where = "" if code in MISTAKES else ".marks "
        rules.append(f".c{code}{{stroke:{colour}}}{where}.c{code}{{stroke:url(#mark{code})}}")
    return "".join(rules)


def svg_patterns() -> str:
    """The <defs> that `svg_style` refers to: a cell with its mark for each code, and the lines between cells."""
    tile = 'width="1" height="1" patternUnits="userSpaceOnUse" patternTransform="translate(0 -.5)"'
    patterns = [f'<pattern id="lines" {tile}><path class="line" d="M0 1V0H1"/></pattern>']
    for code, colour in enumerate(HEX):
        dots = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(BITMAPS[code]).tolist())
        ink = "#000" if INK[code] == 0 else "#fff"
        mark = f'<path transform="translate(.32 .2) scale(.12)" fill="{ink}" d="{dots}"/>'
        patterns.append(f'<pattern id="mark{code}" {tile}><rect width="1" height="1" fill="{colour}"/>{mark}</pattern>')
    return f"<defs>{''.join(patterns)}</defs>"


# ---- PNG -------------------------------------------------------------------------------------------------------------


def png(
    path: Path | str,
    shown: Episode | Puzzle,
    attempts: Sequence = (),
    confidence: Sequence = (),
    *,
    marks: bool = False,
) -> None:
    """Write a picture, pixel for pixel in the palette but for its titles. See `columns`."""
    from matplotlib.figure import Figure  # here, because it takes half a second that only who draws needs

    sheet = _picture(shown, attempts, confidence)
    width, height = sheet.width + 2 * MARGIN, sheet.height + 2 * MARGIN
    tiles = _tiles(sheet.units.cell[0], marks)
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    for x, y, (_, cells) in sheet.boxes:
        pixels = _raster(cells, tiles)
        left, top = x + MARGIN, y + LINE_HEIGHT + MARGIN
        image[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
    figure = Figure((width / DPI, height / DPI), dpi=DPI)
    figure.figimage(image)
    text = {"size": LETTER_HEIGHT * 72 / DPI, "color": "#222222", "parse_math": False}
    for x, y, title in [(0, 0, sheet.title), *((x, y, panel.title) for x, y, panel in sheet.boxes)]:
        figure.text((x + MARGIN) / width, 1 - (y + BASELINE + MARGIN) / height, title, **text)
    figure.savefig(path, format="png")


def _tiles(size: int, marks: bool) -> np.ndarray:
    """uint8 [codes, size, size, 3]: a cell of each code, with the lines above and to its left."""
    dots = BITMAPS.repeat(size // DOTS, 1).repeat(size // DOTS, 2)
    marked = np.ones(len(RGB), dtype=bool) if marks else np.isin(np.arange(len(RGB)), MISTAKES)
    around = [((size + 1 - n) // 2, (size - n) // 2) for n in dots.shape[1:]]
    stencils = np.pad(dots & marked[:, None, None], [(0, 0), *around])
    tiles = np.where(stencils[..., None], INK[:, None, None, None], RGB[:, None, None])
    tiles[:, 0], tiles[:, :, 0] = LINE, LINE
    return tiles


def _raster(cells: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """uint8 [S H + 1, S W + 1, 3] of cells [H, W] and tiles [codes, S, S, 3]."""
    (height, width), size = cells.shape, tiles.shape[1]
    image = np.full((size * height + 1, size * width + 1, 3), LINE, dtype=np.uint8)
    image[:-1, :-1] = tiles[cells].swapaxes(1, 2).reshape(size * height, size * width, 3)
    return image
