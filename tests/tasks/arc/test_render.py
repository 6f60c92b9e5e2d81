from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from tasks.arc import render
from tasks.arc.grid import Episode, Grid, Pair, Puzzle

PALETTE = ["#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25"]
SHAPES = [(1, 1), (30, 30), (3, 7), (1, 30), (12, 2), (5, 5)]
SVG = "{http://www.w3.org/2000/svg}"


def grid(height: int, width: int, seed: int = 0) -> Grid:
    return np.random.default_rng([height, width, seed]).integers(0, 10, (height, width), dtype=np.uint8)


@pytest.fixture(scope="module")
def episode() -> Episode:
    grids = [grid(*shape) for shape in SHAPES]
    return Episode("some/0", (Pair(*grids[:2]), Pair(*grids[2:4])), Pair(*grids[4:]))


@pytest.fixture(scope="module")
def attempts() -> list[Grid]:
    return [grid(5, 5, seed=1), grid(4, 6)]


def cells_of(panel: ElementTree.Element) -> np.ndarray:
    """Painted back from an SVG's strokes; NOTHING where there are none."""
    _, _, width, height = map(float, panel.get("viewBox").split())
    cells = np.full((int(height), int(width)), render.NOTHING)
    for path in panel.findall(f"{SVG}path"):
        for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d")):
            run = cells[int(y), int(x) : int(x) + int(length)]
            assert len(run) == int(length) and (run == render.NOTHING).all()
            run[:] = int(path.get("class").removeprefix("c"))
    return cells


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_a_diff_tells_wrong_missing_and_extra_cells_apart():
    attempt, truth = np.array([[1, 2], [3, 4], [5, 5]], np.uint8), np.array([[1, 2, 2], [3, 9, 2]], np.uint8)
    shown = Episode("e/0", (), Pair(truth, truth))
    (_, panel), (_, right) = render.columns(shown, [attempt, truth])[1:]
    assert ["".join(render.LETTERS[code] for code in row) for row in panel.cells] == ["..-", ".x-", "++ "]
    assert (panel.title, right.title) == ("diff 1: 5 wrong", "diff 2: right")


def test_titles_tell_questions_and_attempts_apart(episode, attempts):
    def titles(*args):
        return [[panel.title.split(":")[0] for panel in column] for column in render.columns(*args)]

    demos = [["demo 1 in", "demo 1 out"], ["demo 2 in", "demo 2 out"]]
    confidence = [np.ones((5, 5))]
    expected = [["query", "truth"], ["attempt 1", "diff 1", "confidence 1"], ["attempt 2", "diff 2"]]
    assert titles(episode, attempts, confidence) == demos + expected
    unknown = episode._replace(query=Pair(episode.query.input, None))
    assert titles(unknown, attempts, confidence)[2:] == [["query"], ["attempt 1", "confidence 1"], ["attempt 2"]]
    puzzle = Puzzle("some", episode.demos, (episode.query, unknown.query))
    expected = [["query 1", "truth 1"], ["attempt 1.1", "diff 1.1"], ["query 2"], ["attempt 2.1"]]
    assert titles(puzzle, [attempts[:1], attempts[1:]]) == demos + expected
    assert titles(puzzle) == [*demos, expected[0], expected[2]]


def test_confidence_is_shown_in_tenths(episode):
    values = np.array([[0.0, 0.09, 0.1], [0.55, 0.99, 1.0]])
    _, _, panel = render.columns(episode, [grid(2, 3)], [values])[-1]
    assert [[render.LETTERS[code] for code in row] for row in panel.cells] == [["0", "0", "1"], ["5", "9", "9"]]
    lightness = render.RGB[render.CONFIDENCE :].astype(int).sum(1)
    assert (np.diff(lightness) > 0).all()


@pytest.mark.parametrize(
    ("tries", "confidence", "sentence"),
    [
        ([grid(2, 3)], [np.ones((3, 2))], "some/0, attempt 1: confidence for 3 x 2 cells, of a grid of 2 x 3"),
        ([grid(1, 2)], [np.array([[0.5, 1.5]])], r"attempt 1: confidence in cell \(0, 1\) is 1.5; a probability lies"),
        ([grid(1, 2)], [np.array([[np.nan, 0]])], r"cell \(0, 0\) is nan"),
        ([], [np.ones((1, 1))], "some/0: confidence in 1 attempts, of which there are 0"),
    ],
)
def test_a_confidence_that_fits_no_attempt_is_refused(episode, tries, confidence, sentence):
    with pytest.raises(ValueError, match=sentence):
        render.columns(episode, tries, confidence)


def test_answers_to_questions_that_are_not_there_are_refused(episode):
    with pytest.raises(ValueError, match="some: answers to 2 of 1 questions"):
        render.columns(Puzzle("some", episode.demos, (episode.query,)), [[grid(1, 1)], [grid(1, 1)]])


# ---- the three kinds -------------------------------------------------------------------------------------------------


def test_the_grids_can_be_read_back_from_an_svg(episode, attempts):
    root = ElementTree.fromstring(render.svg(episode, attempts, [np.linspace(0, 1, 25).reshape(5, 5)]))
    read = [cells_of(panel) for panel in root.iter(f"{SVG}svg") if panel.get("viewBox")]
    sheet = render.columns(episode, attempts, [np.linspace(0, 1, 25).reshape(5, 5)])
    shown = [panel.cells for level in range(3) for column in sheet for panel in column[level : level + 1]]
    assert len(read) == len(shown) == 11
    assert all(np.array_equal(x, y) for x, y in zip(read, shown, strict=True))
    style = root.find(f"{SVG}style").text
    assert [re.search(rf"\.c{colour}{{stroke:(#\w+)}}", style)[1] for colour in range(10)] == PALETTE


def test_an_svg_survives_a_hostile_id_and_bears_marks_only_if_asked(episode):
    hostile = episode._replace(id="</title><script>\x00&")
    root = ElementTree.fromstring(render.svg(hostile, marks=True))
    assert root.find(f"{SVG}title").text == "</title><script>?&" and not list(root.iter("script"))
    assert root.get("class") == "marks" and 'class="marks"' not in render.svg(episode)


@pytest.mark.parametrize("marks", [False, True])
def test_the_pixels_of_a_png_are_the_palette(tmp_path, marks):
    episode = Episode("some/0", (Pair(grid(1, 1), grid(9, 3)),), Pair(grid(2, 7), grid(5, 5)))
    attempts = [grid(5, 5, seed=1), grid(4, 6)]
    render.png(tmp_path / "a.png", episode, attempts, marks=marks)
    pixels = np.round(255 * imread(tmp_path / "a.png")[..., :3]).astype(int)
    sheet = render._picture(episode, attempts, ())
    size = sheet.units.cell[0]
    assert len(sheet.boxes) == 8
    for x, y, (_, cells) in sheet.boxes:
        top, left = y + render.MARGIN + render.LINE_HEIGHT, x + render.MARGIN
        height, width = cells.shape
        drawn = pixels[top : top + size * height, left : left + size * width]
        inside = drawn.reshape(height, size, width, size, 3).swapaxes(1, 2)[:, :, 1:, 1:]  # without the lines
        colour = (inside == render.RGB[cells][:, :, None, None]).all(-1)
        ink = (inside == render.INK[cells][:, :, None, None, None]).all(-1)
        dots = np.where(marks | np.isin(cells, render.MISTAKES), render.BITMAPS[cells].sum((2, 3)), 0)
        assert (colour | ink).all() and np.array_equal((~colour).sum((2, 3)), dots * (size // 8) ** 2)


def test_every_code_has_a_colour_a_letter_and_a_mark_of_its_own():
    assert render.HEX[:10] == PALETTE
    assert len(set(render.HEX)) == len(render.RGB) == len(render.LETTERS) == len(render.BITMAPS) == len(render.INK)
    marks = {render.BITMAPS[code].tobytes(): code for code in (*range(10), *render.MISTAKES)}
    assert len(marks) == 13


def blocks_of(text: str) -> list[list[tuple[int, ...] | None]]:
    """The background of every character of the lines."""
    lines = []
    for line in text.splitlines():
        backgrounds, now = [], None
        for code, letter in re.findall(r"\x1b\[([\d;]+)m|(.)", line):
            if letter:
                backgrounds.append(now)
            else:
                now = tuple(map(int, code.split(";")))[2:5] if code != "0" else None
        lines.append(backgrounds)
    return lines


def test_a_terminal_shows_blocks_or_digits(episode, attempts):
    sheet = render._laid_out(episode.id, render.columns(episode, attempts), render.CHARACTERS, 100)
    plain = render.terminal(episode, attempts, colour=False, width=100)
    blocks = blocks_of(render.terminal(episode, attempts, colour=True, width=100))
    assert "\x1b" not in plain and max(map(len, plain.splitlines())) <= 100
    for x, y, (title, cells) in sheet.boxes:
        height, width = cells.shape
        lines = [line.ljust(x + 2 * width) for line in plain.splitlines()]
        assert lines[y][x : x + len(title)] == title
        read = [line[x : x + 2 * width : 2] for line in lines[y + 1 : y + 1 + height]]
        assert read == ["".join(render.LETTERS[code] for code in row) for row in cells]
        for row, line in zip(cells, blocks[y + 1 : y + 1 + height], strict=True):
            shown = [None if code == render.NOTHING else tuple(render.RGB[code].tolist()) for code in row]
            line = line + [None] * (x + 2 * width - len(line))
            assert line[x : x + 2 * width : 2] == shown == line[x + 1 : x + 2 * width : 2]


def test_a_terminal_gets_no_escape_sequences_unless_it_is_one(episode, monkeypatch):
    steering = episode._replace(id="\x1b[2Jgone")
    assert "\x1b" not in render.terminal(steering) and "?[2Jgone" in render.terminal(steering)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[48;2;" in render.terminal(episode)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in render.terminal(episode)


def test_marks_put_a_digit_into_every_block(episode):
    def letters(**options: bool) -> list[str]:
        text = re.sub(r"\x1b\[[\d;]+m", "", render.terminal(episode, width=100, **options))
        return [line.rstrip() for line in text.splitlines()]

    assert letters(colour=True, marks=True) == letters(colour=False) != letters(colour=True)


def test_columns_wrap_to_the_width_there_is(episode):
    narrow, wide = (render.terminal(episode, colour=False, width=width).splitlines() for width in (60, 1000))
    assert len(narrow) > len(wide) and max(map(len, narrow)) <= 60 < max(map(len, wide))
