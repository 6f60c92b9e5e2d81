from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tasks.arc.gallery import Card, write_gallery
from tasks.arc.grid import Episode, Grid, Pair

HOSTILE = '"><script>alert(1)</script>&amp;\x00'
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Elements in order, as (tag, attributes, their own text); checks that each is closed where it should be."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]


def grid(seed: int, height: int = 4, width: int = 5) -> Grid:
    return np.random.default_rng(seed).integers(0, 10, (height, width), dtype=np.uint8)


def card(seed: int, *, known: bool = True, right: int | None = None, **scores: float) -> Card:
    """Attempt number `right` is the answer."""
    demos = (Pair(grid(seed), grid(seed + 1)), Pair(grid(seed + 2), grid(seed + 3)))
    query = Pair(grid(seed + 4), grid(seed + 5) if known else None)
    attempts = [query.output if k == right else grid(seed + 5 + k, 3, 3) for k in (1, 2)]
    return Card(Episode(f"puzzle{seed}/0", demos, query), attempts, scores, "reflect" if seed % 2 else "rotate")


@pytest.fixture
def page(tmp_path) -> Page:
    cards = [card(1, right=2, exact=0.0, cell=0.931), card(2, exact=0.0), card(3, known=False, log_prob=-12.3456)]
    summary = {
        "reflect": {"questions": 2, "exact": 0.5, "copy input": 0.0},
        HOSTILE: {"questions": 1, "exact": float("nan"), "majority colour": 1.0},
    }
    cards.append(card(4, right=1, exact=1.0)._replace(skill=HOSTILE, confidence=[np.full((4, 5), 0.5)]))
    cards[1] = cards[1]._replace(episode=cards[1].episode._replace(id=HOSTILE), scores={HOSTILE: 0.0})
    write_gallery(tmp_path / "gallery.html", f"Run {HOSTILE}", cards, summary)
    return Page(tmp_path / "gallery.html")


def test_what_people_wrote_is_text_and_not_markup(page):
    shown = HOSTILE.replace("\x00", "?")
    assert page.texts("title") == page.texts("h1") == [f"Run {shown}"]
    assert len(page.texts("script")) == 1 and "alert" not in page.texts("script")[0]
    assert page.texts("a")[1] == shown == page.attributes("article")[1]["data-id"]
    assert shown in page.texts("span") and shown == page.attributes("article")[3]["data-skill"]
    assert shown in page.texts("dt") and shown in page.texts("th") and shown in page.texts("option")


def test_the_page_needs_nothing_from_elsewhere(page, tmp_path):
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    everything = [pair for _, attributes, _ in page.elements for pair in attributes.items()]
    targets = [value for name, value in everything if name in {"href", "src", "srcset", "action", "data", "xlink:href"}]
    assert targets == [f"#question-{i}" for i in range(4)] and {target[1:] for target in targets} <= set(ids)
    text = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert "//" not in text and "@import" not in text
    assert {name for name in re.findall(r"url\((.+?)\)", text)} <= {f"#{name}" for name in ids}
    [policy] = [meta["content"] for meta in page.attributes("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_a_card_shows_its_grids_and_whether_they_are_right(page):
    articles = page.attributes("article")
    assert [article["data-state"] for article in articles] == ["solved", "wrong", "unknown", "solved"]
    assert [text for text in page.texts("span") if "solved" in text or "unknown" in text] == [
        "solved at attempt 2",
        "not solved",
        "answer unknown",
        "solved at attempt 1",
    ]
    assert page.texts("p") == ["4 questions: solved 2, not solved 1, answer unknown 1"]
    captions = [text.strip() for text in page.texts("figcaption")]
    assert len(captions) == 3 * 10 + 7 + 1  # no truth and no diffs where the answer is not known, one heat map
    assert captions.count("diff 2: right") == captions.count("diff 1: right") == captions.count("confidence 1") == 1
    labels = [picture["aria-label"] for picture in page.attributes("svg") if "role" in picture]
    assert len(labels) == len(captions) and labels[0] == "demo 1 in, 4 by 5 cells"


def test_the_grids_can_be_read_back(tmp_path):
    shown = card(1)
    write_gallery(tmp_path / "gallery.html", "Run", [shown], {})
    painted = []
    for tag, attributes, _ in Page(tmp_path / "gallery.html").elements:
        if tag == "svg" and "role" in attributes:
            _, _, width, height = attributes["viewbox"].split()
            painted.append(np.full((int(height), int(width)), 255))
        elif tag == "path" and painted:
            for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)", attributes["d"]):
                painted[-1][int(y), int(x) : int(x) + int(length)] = int(attributes["class"].removeprefix("c"))
    grids = [grid for pair in (*shown.episode.demos, shown.episode.query) for grid in pair]
    attempts = [painted[6], painted[8]]  # each before its diff
    assert all(np.array_equal(x, y) for x, y in zip(painted[:6] + attempts, grids + shown.attempts, strict=True))


def test_scores_are_shares_counts_or_dashes(page):
    cells = page.texts("td")
    assert cells == ["", "2", "50.0 %", "0.0 %", "", "1", "–", "", "100.0 %"]
    bars = [attributes.get("style") for attributes in page.attributes("td")]
    assert bars == [None, None, "--share:50.0%", "--share:0.0%", None, None, None, None, "--share:100.0%"]
    assert page.texts("dd") == ["0.0 %", "93.1 %", "0.0 %", "-12.35", "100.0 %"]


def test_cards_can_be_sorted_by_every_score_and_filtered(page):
    options = page.texts("option")
    names = ["exact", "cell", HOSTILE.replace("\x00", "?"), "log_prob"]
    assert [text.removesuffix(", lowest first") for text in options if text.endswith(", lowest first")] == names
    values = [article["data-scores"].split(" ") for article in page.attributes("article")]
    assert [value[0] for value in values] == ["0.0", "nan", "nan", "1.0"] and values[2][3] == "-12.3456"
    by_name = {attributes["name"] for tag in ("select", "input") for attributes in page.attributes(tag)}
    assert by_name == {"find", "skill", "state", "order", "marks"}
    assert {"solved", "not solved", "answer unknown", "reflect", "rotate"} <= set(options)


def test_a_gallery_of_nothing_is_a_page(tmp_path):
    write_gallery(tmp_path / "gallery.html", "Run", [], {})
    assert Page(tmp_path / "gallery.html").texts("p") == ["0 questions: none"]


def test_hundreds_of_questions_stay_under_ten_megabytes(tmp_path):
    noise = [grid(seed, 15, 15) for seed in range(10)]  # half of ARC-AGI-1's evaluation puzzles have fewer cells in all
    episode = Episode("noise/0", (Pair(*noise[:2]), Pair(*noise[2:4]), Pair(*noise[4:6])), Pair(*noise[6:8]))
    write_gallery(tmp_path / "gallery.html", "Run", [Card(episode, noise[8:], {"exact": 0.0})] * 10, {})
    assert 30 * (tmp_path / "gallery.html").stat().st_size < 10e6
